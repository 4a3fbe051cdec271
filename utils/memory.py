"""Memory: what is free, what a piece of work takes, and how many examples fit in it at once."""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from utils.errors import RunError, is_out_of_memory
from utils.threads import control_groups

SHARE = 0.8  # of the free memory: the rest is for what differs from batch to batch, and for other processes
MIB = 2**20


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that are free on a GPU, else those that this process may still take of the machine's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = [psutil.virtual_memory().available]
    versions = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for group in control_groups("memory", root):
        for names in versions:
            try:
                limit, used = (int((group / name).read_text(encoding="utf-8")) for name in names)
                rows = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                cached = sum(int(row.split()[1]) for row in rows if row.split()[0] == "inactive_file")
            except (OSError, ValueError, IndexError):  # not there, or "max"
                continue
            free.append(max(0, limit - used + cached))
    return min(free)


def peak_extra_bytes(work: Callable[[], object], device: torch.device | str) -> int:
    """Memory that `work` takes at its peak beyond what was in use before: of a GPU, else of this process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what was freed may still count as resident
    if trim:
        trim(0)
    me, done = psutil.Process(), threading.Event()
    before = peak = me.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, me.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak - before


def examples_that_fit(
    step: Callable[[int], object], most: int, device: torch.device, reserved: int = 0
) -> tuple[int, int, int]:
    """How many examples fit in memory at once, at most `most`; the bytes that they take, and the bytes that are free.

    step(n): what a training step does with n examples, none of which is longer than any of the others. n is doubled
    while twice the memory fits too, so that no attempt fails where memory can be told beforehand. reserved: bytes that
    training will need besides. Raises RunError if not even one fits.
    """
    free = free_memory(device) - reserved
    size = need = 0
    while size < most:
        tried = min(max(1, 2 * size), most)
        if size and need * tried / size > SHARE * free:
            break
        try:
            taken = peak_extra_bytes(lambda n=tried: step(n), device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if taken > SHARE * free:
            break
        size, need = tried, max(need, taken)
    if not size:
        raise RunError(f"out of memory: not one example fits in {free // MIB} MiB; lower --max_seq_length, or --dtype")
    return size, need, free
