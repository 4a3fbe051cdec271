"""What ends a program with one line instead of a traceback."""

import errno
import os
import sys

ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space, or choose another place")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to")
ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is to be; choose another place")
ADVICE |= {errno.EMFILE: "allow more open files (ulimit -n)", errno.ENAMETOOLONG: "choose a shorter name"}


class UserError(Exception):
    """Bad input: exit code 2."""


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, say): exit code 1."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: NumPy has MemoryError, torch an error of its own or a plain RuntimeError."""
    texts = ("out of memory", "allocate memory", "alloc_failed")  # of CUDA and MPS, a CPU, cuBLAS
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def describe_error(error: OSError) -> str:
    """The system's own words, the file that they are about, and what helps."""
    file = f": {error.filename}" if error.filename else ""
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    return f"{error.strerror or error}{file}{advice}"


def end_output() -> None:
    """Drop what standard output does not take (full disk, closed pipe): Python's own end would print a traceback."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
