"""What ends a program with one line instead of a traceback."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space, or choose another place")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM), "ask its owner, or choose a place that you may read and write")
ADVICE |= {errno.EROFS: "choose a place that you may write to"}
ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is to be; choose another place")
ADVICE |= {errno.EMFILE: "allow more open files (ulimit -n)", errno.ENAMETOOLONG: "choose a shorter name"}


class UserError(Exception):
    """Bad input: exit code 2."""


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, say): exit code 1."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: NumPy has MemoryError, torch an error of its own or a plain RuntimeError."""
    # of CUDA and MPS, a CPU, cuBLAS, and what is too large to be asked for
    texts = ("out of memory", "allocate memory", "alloc_failed", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def first_line(error: Exception) -> str:
    """The first line of its message; the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_error(error: OSError) -> str:
    """The system's own words, the file that they are about, and what helps."""
    file = f": {error.filename}" if error.filename else ""
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    return f"{error.strerror or error}{file}{advice}"


def at_home(text: str) -> str:
    """A path, or several with commas between, with ~ expanded: a shell does it in --name VALUE, not in --name=VALUE."""
    return re.sub("(^|,)~(?=/|$)", lambda found: found[1] + str(Path.home()), text)


class Once(argparse.Action):
    """Keep the value of a flag that is given once; argparse itself would keep the last and drop the others."""

    given_in: argparse.Namespace | None = None

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, flag: str | None = None
    ) -> None:
        if flag and self.given_in is namespace:
            parser.error(f"argument {flag}: it is given twice")
        self.given_in = namespace
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """One whose mistakes are UserErrors, and whose help shows the text as it is written."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("action", None, Once)
        self.register("action", "store", Once)
        self.register("type", Path, lambda text: Path(at_home(text)))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        args = sys.argv[1:] if args is None else args
        for before, word in zip(["", *args], args, strict=False):
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(
                    f"what follows {word or before or self.prog} is empty, as a variable of the shell that is not set"
                )
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@contextmanager
def told_in_one_line(script: str, go_on: str) -> Iterator[None]:
    """What goes wrong inside ends the program, with one line that begins with the script's name instead of a traceback.

    Exit code 2 for bad input and for what the system refuses, 1 for a RunError, 130 for an interruption: its line says
    how to `go_on`. A terminal that is not UTF-8 shows what it cannot print as \\u2019.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        stop(script, str(error), 2)
    except RunError as error:
        stop(script, str(error), 1)
    except OSError as error:
        stop(script, describe_error(error), 2)
    except KeyboardInterrupt:
        stop(script, f"interrupted; {go_on}", 130)
    finally:
        end_output()


@contextmanager
def cut_short() -> Iterator[None]:
    """Around what is printed for people: a pipe that takes no more of it (`show | head`) ends it in silence."""
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        end_output()


def stop(script: str, message: str, code: int) -> NoReturn:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


def end_output() -> None:
    """Drop what standard output does not take (full disk, closed pipe): Python's own end would print a traceback."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
