"""Files and folders: replaced whole, never absent, never another's."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kills import contents, snapshots

from utils import checked, files
from utils.errors import UserError


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)


def replace(place: Path) -> None:
    with files.atomic_folder(place / "data") as part:
        (part / "a.txt").write_text("new")
        (part / "b.txt").write_text("new")


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_the_old_or_the_new_one_wherever_a_kill_comes(swaps, tmp_path, monkeypatch):
    """Where the system cannot swap two names, the next writer gives a folder that was moved away its place back."""
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    place = tmp_path / "place"
    place.mkdir()
    fill(place / "data", "old")
    copies = snapshots(place, tmp_path / "copies", lambda: replace(place))
    assert len(copies) >= 5
    monkeypatch.setattr(files.psutil, "pid_exists", lambda pid: False)  # the process is killed
    for copy in copies:
        files.remove_left_over(copy)
        held = contents(copy)
        assert set(held) == {"data/a.txt", "data/b.txt"} and len(set(held.values())) == 1
        replace(copy)
        assert contents(copy) == contents(place)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no system call that swaps two names is known")
def test_a_folder_that_is_replaced_is_never_absent(tmp_path):
    fill(tmp_path / "data", "old")
    seen, done = [], threading.Event()

    def look():
        while not done.is_set():
            seen.append((tmp_path / "data").exists())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(200):
        replace(tmp_path)
    done.set()
    thread.join()
    assert all(seen) and len(seen) > 200


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    fill(tmp_path / "data", "old")
    before = contents(tmp_path)
    for whole, name in ((files.atomic_folder, "data"), (files.atomic_file, "new.txt")):
        with pytest.raises(ZeroDivisionError), whole(tmp_path / name) as part:
            part.mkdir(exist_ok=True) if whole is files.atomic_folder else part.write_text("half")
            raise ZeroDivisionError
    assert contents(tmp_path) == before


def test_a_symbolic_link_stays_one(tmp_path):
    fill(tmp_path / "far", "old")
    (tmp_path / "data").symlink_to(tmp_path / "far", target_is_directory=True)
    replace(tmp_path)
    assert (tmp_path / "data").is_symlink() and (tmp_path / "far" / "a.txt").read_text() == "new"
    (tmp_path / "far.json").write_text("{}")
    (tmp_path / "near.json").symlink_to("far.json")
    files.write_json({"a": 1}, tmp_path / "near.json")
    assert (tmp_path / "near.json").is_symlink() and checked.read_json(tmp_path / "far.json", "") == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"far", "data", "far.json", "near.json"}


def test_tensors_are_as_readable_as_other_files(tmp_path):
    files.write_json({}, tmp_path / "a.json")
    files.save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_left_over_parts_go_and_living_ones_stay(tmp_path):
    dead, week = ended_process(), time.time() - 7 * 24 * 3600
    gone = [f".data.{files.HOST}.{dead}.part", f".a.b.{files.HOST}.{dead}.part", ".data.elsewhere.1.part"]
    kept = [f".data.{files.HOST}.1.part", ".other.elsewhere.1.part", ".data.part", ".data.x.y.part", "data.1.2.part"]
    for name in gone + kept:
        fill(tmp_path / name, "half")
        if name == ".data.elsewhere.1.part":  # another machine's, forgotten
            os.utime(tmp_path / name, (week, week))
    (tmp_path / f".b.{files.HOST}.{dead}.part").write_text("a file")
    files.remove_left_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_process_that_may_not_be_asked_is_alive(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    part = tmp_path / f".data.{files.HOST}.1.part"
    fill(part, "another user's")
    files.remove_left_over(tmp_path)
    assert part.exists()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"table": "1", "thesis.txt": "precious"}, "thesis.txt"),
        ({"thesis.txt": "precious"}, "thesis.txt"),
        ({"table": "1"}, "table"),
        ({"mark": "1", ".hidden": "1"}, ".hidden"),
        ({}, None),
        ({"mark": "1"}, None),
        ({"mark": "1", "table": "1"}, None),
    ],
)
def test_only_a_folder_that_is_ours_may_be_replaced(held, words, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in held.items():
        (folder / name).write_text(text)
    before = contents(tmp_path)
    if words:
        with pytest.raises(UserError, match=rf"--here .*{words}"):
            files.check_replaceable(folder, ["mark", "table"], "--here")
    else:
        files.check_replaceable(folder, ["mark", "table"], "--here")
    with pytest.raises(UserError, match="is a file"):
        (tmp_path / "file").write_text("")
        files.check_replaceable(tmp_path / "file", ["mark"], "--here")
    with pytest.raises(UserError, match="file is a file"):
        files.check_replaceable(tmp_path / "file" / "new" / "folder", ["mark"], "--here")
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("closed", ["folder", "folder/held"])
def test_a_folder_that_is_closed_is_told_before_it_is_needed(closed, tmp_path, monkeypatch):
    (tmp_path / "folder" / "held").mkdir(parents=True)
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path / closed)
    with pytest.raises(UserError, match=r"--here: nothing may be written to"):
        files.check_replaceable(tmp_path / "folder" / "held", ["mark"], "--here")
    files.check_writable(tmp_path / "other" / "folder", "--here")


ONE_AT_A_TIME = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.files import locked
place = Path({place!r})
with locked(place / "thing"):
    if not (place / "thing").exists():
        time.sleep(0.5)
        (place / "thing").write_text("made")
        print("made")
"""


def test_what_several_processes_want_is_made_once(tmp_path):
    code = ONE_AT_A_TIME.format(root=str(ROOT), place=str(tmp_path))
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    out = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum(text.count("made\n") for text in out) == 1 and sum("waiting" in text for text in out) >= 1


@pytest.mark.parametrize("name", ["ml-100k", "a.b", "_x", "Ünï"])
def test_plain_names(name):
    assert files.is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", ".hidden", "a b", "a\n", "a\\b", "~"])
def test_names_that_could_lead_elsewhere(name):
    assert not files.is_plain_name(name)
