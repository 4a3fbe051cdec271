"""What a kill at any moment leaves on disk, and small runs of the steps to be killed.

A killed process leaves what the files hold at that moment. So the work is done once, and before each of its
file-system events the folder is copied.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

from conftest import last_of_each
from matplotlib.figure import Figure

import distill
import finetune
import train_open_p5
import train_sr_trad
from models.sr import MODELS
from utils import cli

COMMON = "--batch_size 8 --max_steps 4 --eval_steps 2"
EARLY = "--max_steps 6 --patience 1 --learning_rate 10 --warmup_steps 0"  # too high a rate: it stops after 4 steps
STEPS = {
    "train_sr_trad": (train_sr_trad, "sr", f"--item_dim 8 --num_layers 1 {EARLY}"),
    "finetune": (finetune, "teacher", "--base_model {0}/base --item_embeddings {0}/table --num_layers 2 --lora_r 2"),
    "distill": (distill, "student", "--teacher {1}/teacher --num_layers 1 --num_blocks 1 --lambda_ms 0 --lora_r 2"),
    "train_open_p5": (train_open_p5, "open_p5", "--base_model {0}/base --num_layers 2 --lora_r 2"),
}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "ctypes.dlopen"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
WATCHER: list[Callable] = []  # an audit hook stays for the life of the process: it is installed once, and mostly idle


def hook(event: str, arguments: tuple) -> None:
    if WATCHER and (event in EVENTS or (event == "open" and arguments[2] & WRITES)):
        WATCHER[0](event, arguments)


sys.addaudithook(hook)


def path_of(event: str, arguments: tuple) -> Path | None:
    """The absolute path that an event is about, which `shutil.rmtree` names by its folder's descriptor."""
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return None
    at = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}.get(event)
    if at is not None and arguments[at] >= 0:
        return Path(f"/proc/self/fd/{arguments[at]}").readlink() / os.fsdecode(arguments[0])
    return Path(os.fsdecode(arguments[0])).absolute()


def contents(place: Path) -> dict[str, str]:
    paths = (path for path in sorted(place.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def snapshots(place: Path, copies: Path, action: Callable) -> list[Path]:
    """Copies of `place` before each file-system event of `action` in it; a file just written is also cut in half."""
    found, seen, opened = [], set(), None

    def keep(cut: Path | None = None) -> None:
        copy = copies / f"{len(found):04d}"
        shutil.copytree(place, copy, symlinks=True)
        if cut:
            half = copy / cut.relative_to(place)
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        state = json.dumps(sorted(contents(copy).items())) + str(sorted(p.name for p in copy.rglob("*") if p.is_dir()))
        if state in seen:
            shutil.rmtree(copy)
        else:
            seen.add(state)
            found.append(copy)

    def watch(event: str, arguments: tuple) -> None:
        nonlocal opened
        path = path_of(event, arguments)
        inside = path is not None and path.is_relative_to(place)
        if not inside and event != "ctypes.dlopen":
            return
        WATCHER.clear()  # not the events of the copy
        if opened and opened.is_file() and opened.stat().st_size > 1:
            keep(cut=opened)
        keep()
        opened = path if event == "open" else None
        WATCHER.append(watch)

    WATCHER.append(watch)
    try:
        action()
    finally:
        WATCHER.clear()
    return found


def on_a_full_disk(place: Path, at: int, action: Callable) -> object:
    """What `action` returns on a disk that is full from its write number `at` in `place`; None where it makes fewer."""
    writes = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal writes
        if event not in ("open", "os.mkdir", "os.link", "os.symlink"):
            return
        path = path_of(event, arguments)
        if path is not None and path.is_relative_to(place):
            writes += 1
            if writes > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    WATCHER.append(watch)
    try:
        found = action()
    finally:
        WATCHER.clear()
    return found if writes > at else None


def restore(copy: Path, place: Path) -> None:
    """Make `place` what it was when `copy` was taken: runs record their own path."""
    shutil.rmtree(place)
    shutil.copytree(copy, place, symlinks=True)


def step(script, section: str, sources: Path, *flags: object) -> None:
    """A script on the tiny dataset in `sources`."""
    words = ["--dataset", sources / "data", *COMMON.split(), *flags]
    script.main(**cli.resolve(script.main, section, list(map(str, words)), models=MODELS))


def start(name: str, sources: Path, place: Path, seed: int, resume: str, run: str = "run") -> None:
    """One of STEPS, with the run in `place`; its curve is not drawn. Raises what `main` raises."""
    script, section, words = command(name, sources, place, seed, resume, run)
    with undrawn():
        script.main(**cli.resolve(script.main, section, words, models=MODELS))
    assert read_metrics(place / run)["stopped_early"] == (EARLY in STEPS[name][2])


def exit_code(name: str, sources: Path, place: Path, seed: int, resume: str) -> int:
    """The same as from the shell: what went wrong is a line on standard error, and the exit code."""
    script, section, words = command(name, sources, place, seed, resume)
    try:
        with undrawn():
            cli.run(script.main, section, last_of_each(words), models=MODELS)
    except SystemExit as stop:
        return stop.code
    return 0


def undrawn() -> AbstractContextManager:
    """A figure costs more time than all the rest of such a run."""
    return patch.object(Figure, "savefig", lambda self, path, **how: Path(path).write_bytes(b"a figure"))


def command(name: str, sources: Path, place: Path, seed: int, resume: str, run: str = "run") -> tuple:
    """The script of a step, its section of a recipe, and the words of its command line."""
    script, section, own = STEPS[name]
    words = f"--dataset {sources}/data {COMMON} {own}".format(sources, place).split()
    return script, section, [*words, "--seed", str(seed), "--resume", resume, "--output_dir", str(place / run)]


def prepare(name: str, sources: Path, place: Path) -> None:
    """What the step reads from `place`."""
    place.mkdir()
    if name == "distill":
        start("finetune", sources, place, 1, "never", run="teacher")


def read_metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def outcome(run: Path) -> tuple[dict, dict[str, str]]:
    """Metrics, and the SHA-256 of every file of weights or ranks."""
    metrics = read_metrics(run)
    weights = {name: digest for name, digest in contents(run).items() if name.endswith(".safetensors")}
    return {split: metrics[split] for split in ("valid", "test")}, weights
