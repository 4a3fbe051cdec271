"""A kill before a file-system event of a small run, or a full disk: the next start ends as if nothing had happened.

Each event of step 1, every third of the others. `benchmarks/kills.py` goes further: each event of all steps, resumed
runs, both ways to start again, and kills at random moments.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import tiny_sources
from kills import STEPS, contents, exit_code, on_a_full_disk, outcome, prepare, restore, snapshots, start

from utils.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tiny_sources(tmp_path_factory.mktemp("kill"))


def each(name: str) -> int:
    return 1 if name == "train_sr_trad" else 3


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_at_any_moment_of_a_fresh_run_is_survived(name, sources, tmp_path):
    place = tmp_path / "place"
    prepare(name, sources, place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(name, sources, place, 2, "auto"))
    wanted, files = outcome(place / "run"), set(contents(place))
    assert len(copies) > 25
    for copy in copies[:: each(name)]:
        restore(copy, place)
        start(name, sources, place, 2, "auto")
        assert outcome(place / "run") == wanted, copy
        assert set(contents(place)) == files, copy


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_at_any_moment_of_a_replacement_is_survived(name, sources, tmp_path):
    place = tmp_path / "place"
    prepare(name, sources, place)
    start(name, sources, place, 2, "never")
    wanted = outcome(place / "run")
    start(name, sources, place, 1, "never")
    earlier, earlier_files = outcome(place / "run"), contents(place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(name, sources, place, 2, "never"))
    files = set(contents(place))
    assert outcome(place / "run") == wanted != earlier and len(copies) > 30
    untouched = 0
    for number, copy in enumerate(copies[:: each(name)]):
        restore(copy, place)
        try:
            start(name, sources, place, 2, "never" if number % 8 == 7 else "auto")
        except UserError as error:  # not replaced yet: the earlier run is there, whole, and says how to go on
            assert "--resume never to replace it" in str(error)
            assert earlier_files.items() <= contents(place).items()
            untouched += 1
            start(name, sources, place, 2, "never")
        assert outcome(place / "run") == wanted, copy
        assert set(contents(place)) == files, copy
    assert 1 <= untouched <= 3


@pytest.mark.parametrize("name", ["train_sr_trad", "finetune", "distill"])
def test_a_disk_that_is_full_from_any_write_is_told_in_a_line_and_costs_nothing(name, sources, tmp_path, capsys):
    place, before = tmp_path / "place", tmp_path / "before"
    prepare(name, sources, place)
    shutil.copytree(place, before)
    start(name, sources, place, 2, "auto")
    wanted, files = outcome(place / "run"), set(contents(place))
    full_from = told = 0
    restore(before, place)
    while (code := on_a_full_disk(place, full_from, lambda: exit_code(name, sources, place, 2, "auto"))) is not None:
        if code:  # what only cleans up may be left out
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}.py: ")]
            assert code == 2 and len(lines) == 1 and "No space left on device" in lines[0], lines
            told += 1
        start(name, sources, place, 2, "auto")
        assert outcome(place / "run") == wanted and set(contents(place)) == files, full_from
        full_from += 2 * each(name)
        restore(before, place)
        capsys.readouterr()
    assert told > 5 / each(name) and outcome(place / "run") == wanted


@pytest.mark.parametrize("name", ["train_sr_trad"])
def test_a_clock_that_was_set_back_changes_nothing(name, sources, tmp_path):
    """Every file that a kill left is of tomorrow, and the newest has the oldest date."""
    place = tmp_path / "place"
    prepare(name, sources, place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(name, sources, place, 2, "auto"))
    wanted, files = outcome(place / "run"), set(contents(place))
    for copy in copies[::4]:
        restore(copy, place)
        for number, path in enumerate(sorted(place.rglob("*"), reverse=True)):
            os.utime(path, times=(time.time() + 86400 + number,) * 2)
        start(name, sources, place, 2, "auto")
        assert outcome(place / "run") == wanted and set(contents(place)) == files, copy


def test_half_removed_folders_are_among_the_copies(tmp_path):
    """`shutil.rmtree` names what it removes by the descriptor of its folder."""
    folder = tmp_path / "place" / "checkpoints"
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_text(name)
    copies = snapshots(tmp_path / "place", tmp_path / "copies", lambda: shutil.rmtree(folder))
    assert [len(list(copy.glob("checkpoints/*"))) for copy in copies] == [3, 2, 1, 0]
