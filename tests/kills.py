"""What a kill at any moment leaves on disk.

A killed process leaves what the files hold at that moment. So the work is done once, and before each of its
file-system events the folder is copied.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "ctypes.dlopen"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
WATCHER: list[Callable] = []  # an audit hook stays for the life of the process: it is installed once, and mostly idle


def hook(event: str, arguments: tuple) -> None:
    if WATCHER and (event in EVENTS or (event == "open" and arguments[2] & WRITES)):
        WATCHER[0](event, arguments)


sys.addaudithook(hook)


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
        path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | os.PathLike) else None
        inside = path is not None and path.absolute().is_relative_to(place)
        if not inside and event != "ctypes.dlopen":
            return
        WATCHER.clear()  # not the events of the copy
        if opened and opened.is_file() and opened.stat().st_size > 1:
            keep(cut=opened)
        keep()
        opened = path.absolute() if event == "open" else None
        WATCHER.append(watch)

    WATCHER.append(watch)
    try:
        action()
    finally:
        WATCHER.clear()
    return found
