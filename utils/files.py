"""Files and folders: written whole or not at all. How they are read: utils/checked.py.

What is being written stands beside its place as `.NAME.HOST.PID.part`, so that what a killed process left can be told
from what a living one, here or on another machine of a shared file system, still writes.
"""

import ctypes
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

from utils.checked import check_file
from utils.errors import UserError

if TYPE_CHECKING:  # datasets/process.py uses this module and needs no torch
    import torch

HOST = re.sub(r"[^\w-]", "-", platform.node()) or "host"
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.(?P<kind>part|old)")
FORGOTTEN = 24 * 3600  # seconds after which another machine's half-written file is taken for left over


def beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{kind}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place only if the block ends without an error.

    A `path` that is a symbolic link stays one: what it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device, or a pipe that another program reads
        raise UserError(f"{path} is no plain file; remove it, or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path.parent, path.name)
    temporary = beside(path, "part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder. One that is there is replaced with all that it holds: see `check_replaceable`."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path.parent)
    temporary, old = beside(path, "part"), beside(path, "old")
    remove([temporary])
    temporary.mkdir()
    try:
        yield temporary
        if not (path.exists() and exchange(temporary, path)):
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in a single step, so that none is ever absent; False where that cannot be."""
    with suppress(TypeError, AttributeError):  # Windows; another C library
        system = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if platform.system() == "Darwin":
            return system.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return system.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    return False


def remove_left_over(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder` (of `name` alone), and not what a living one writes.

    A folder that was to be replaced, and was moved away when the process was killed, gets its place back.
    """
    for path in folder.glob(f".{glob.escape(name) if name else '*'}.*.*.*"):
        found = TEMPORARY.fullmatch(path.name)
        if not found or (name and found["name"] != name) or is_being_written(path, found["host"], int(found["pid"])):
            continue
        with suppress(OSError):  # another user's, or removed by another process meanwhile: not worth a failure
            if found["kind"] == "old" and not (folder / found["name"]).exists():
                os.replace(path, folder / found["name"])
            else:
                remove([path])


def is_being_written(path: Path, host: str, pid: int) -> bool:
    if host == HOST:
        return psutil.pid_exists(pid)  # also another user's, which may not be asked
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < FORGOTTEN
    return True


def remove(paths: Iterable[Path]) -> None:
    """Delete files and folders; what is not there is passed over."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """UserError unless files may be made in `folder`, or in the folder in which it is to be made."""
    folder = Path(os.path.realpath(folder))
    nearest = next(part for part in (folder, *folder.parents) if part.exists())
    if not nearest.is_dir():
        raise UserError(f"{flag}: {nearest} is a file; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: nothing may be written to {nearest}; choose another place")


def check_replaceable(folder: Path, names: list[str], flag: str) -> None:
    """UserError unless `folder` is absent, empty, or holds names[0] and nothing but the files `names`."""
    folder = Path(os.path.realpath(folder))
    if folder.is_symlink():
        raise UserError(f"{flag} {folder} is a link to itself; remove it, or choose another place")
    check_writable(folder.parent, flag)
    check_writable(folder, flag)
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strange = sorted(held.difference(names)) or (held and names[0] not in held and sorted(held))
    if strange:
        raise UserError(f"{flag} {folder} holds something else ({strange[0]}); choose another place, or move it away")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same `path`; one that comes second waits. The lock ends with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that makes {path}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_plain_name(text: str) -> bool:
    """Whether `text` can be the name of a folder and nothing more: letters, digits, '-', '_' and '.' inside."""
    return re.fullmatch(r"[\w-][\w.-]*", text) is not None


def check_space(folder: Path, size: int) -> None:
    """UserError unless `size` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{size / 2**20:,.0f} MiB are to be written to {folder}, whose disk has {free / 2**20:,.0f} MiB left: "
            "make room, or move the folder to a larger disk (a teacher's hidden states need half of it with "
            "--teacher_states bfloat16, and none with per_batch)"
        )


def write_json(value: object, path: Path) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def not_written(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be written: {error}; free space or choose another --output_dir")


def save_tensors(tensors: dict[str, "torch.Tensor"], path: Path) -> None:
    """Write as safetensors; non-contiguous tensors are made contiguous."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_file(path) as part:
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(plain, part)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise not_written(path, error) from error
        part.chmod(mode)  # safetensors lets nobody but the owner read


def sha256(path: Path) -> str:
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
