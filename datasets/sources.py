"""Bytes, lines and text of a source file, compressed or not."""

import bz2
import io
import lzma
import os
import signal
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from isal import igzip, isal_zlib

from utils.errors import UserError

BLOCK = 2**23  # bytes read at once
UNREADABLE = {b"(\xb5/\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!": "RAR"}
DAMAGE = (EOFError, OSError, RuntimeError, isal_zlib.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def open_zip(path: Path) -> io.BufferedIOBase:
    """The only file in a zip archive."""
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise UserError(f"{path} holds {len(names)} files; unpack it, and give the one to read")
    return archive.open(names[0])


OPENERS = {
    b"\x1f\x8b": igzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"PK\3\4": open_zip,
    b"PK\5\6": open_zip,
}


def first_bytes(path: Path) -> bytes:
    if path.is_fifo():
        raise UserError(f"{path} is a pipe, which cannot be read twice; write it to a file first")
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give one that may be read") from error


def is_parquet(path: Path) -> bool:
    return first_bytes(path).startswith(b"PAR1")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A plain, gzip, bz2, xz or zip file, told apart by its first bytes."""
    start = first_bytes(path)
    for magic, kind in UNREADABLE.items():
        if start.startswith(magic):
            raise UserError(f"{path} is a {kind} file, which is not read here; unpack it first")
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
    try:
        return opener(path) if opener is open_zip else opener(path, "rb")
    except (*DAMAGE, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from error


def blocks(path: Path) -> Iterator[bytes]:
    """Blocks of whole lines; a second thread decompresses the next block meanwhile."""
    if is_parquet(path):
        raise UserError(f"{path} is a Parquet file, which `interactions` alone reads; write it as text")
    with open_bytes(path) as file, ThreadPoolExecutor(1) as ahead:
        rest, start, future = b"", True, ahead.submit(file.read, BLOCK)
        while True:
            try:
                block = future.result()
            except DAMAGE as error:
                raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from error
            if not block:
                break
            future = ahead.submit(file.read, BLOCK)
            if start and block[257:262] == b"ustar":
                raise UserError(f"{path} is a tar archive; unpack it, and give the file to read")
            if start and block.startswith((*OPENERS, *UNREADABLE)):
                raise UserError(f"{path} holds a compressed file; unpack it, and give the file to read")
            start = False
            whole, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
            rest = tail if newline else rest + block
        if rest:
            yield rest


def json_blocks(path: Path) -> Iterator[bytes]:
    """Blocks of JSON lines, which are UTF-8; a mark of the byte order is left out, a CR alone ends a line too."""
    for number, block in enumerate(blocks(path)):
        if number == 0:
            block = block.removeprefix(b"\xef\xbb\xbf")
            if block.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{path} is in UTF-16; JSON is read in UTF-8: convert it first")
        yield block if b"\n" in block else block.replace(b"\r", b"\n")


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends its workers


def in_parallel(parse: Callable, path: Path) -> Iterator:
    """parse(block) of every block of JSON lines, in order, by one process per core; the first one runs here."""
    source = json_blocks(path)
    first, second = next(source, None), next(source, None)
    if first is not None:
        yield parse(first)
    if second is None:
        return
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, initializer=ignore_interrupts) as pool:
        waiting = deque([pool.submit(parse, second)])
        for block in source:
            waiting.append(pool.submit(parse, block))
            if len(waiting) > workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """A whole file as text whose lines end with a newline character, however they end in the file.

    A carriage return within a line of a file that has newlines is a character like others.
    """
    data = b"".join(blocks(path))
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        advice = "it looks like UTF-16: pass utf-16" if utf16 else "pass its own (latin-1, cp1252, utf-16 ...)"
        text = (
            f"{path} cannot be read ({error}): it is no text in {encoding.upper()}, the value of --encoding; {advice}"
        )
        raise UserError(text) from error
    if "\0" in text:
        raise UserError(f"{path} holds NUL characters, so it is no text in {encoding.upper()}; see --encoding")
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")
