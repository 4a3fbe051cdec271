"""Files: JSON and safetensors, written whole or not at all, and checked when read. No pickle anywhere."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.cli import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: it replaces `path` only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_over(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, not what a living one is writing."""
    for part in folder.glob(".*.part"):
        try:
            os.kill(int(part.name.split(".")[-2]), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)


def check_space(folder: Path, size: int) -> None:
    """UserError unless `size` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{size / 2**20:,.0f} MiB are to be written to {folder}, whose disk has {free / 2**20:,.0f} MiB left: "
            "make room, or move the folder to a larger disk"
        )


def write_json(value: object, path: Path) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, missing: str) -> dict:
    """A JSON object; UserError with the text `missing` where there is no file, or naming the file if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(missing) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the step that writes it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; run the step that writes it again")
    return value


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write as safetensors; non-contiguous tensors are made contiguous."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as part:
        try:
            save_file(plain, part, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise UserError(f"{path} cannot be written: {error}; free space or choose another --output_dir") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read safetensors; UserError where the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run the step that writes it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); run the step that writes it again") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
