"""Memory: what is free, what a piece of work takes, and how many examples fit in it at once."""

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from utils.errors import RunError, UserError, is_out_of_memory
from utils.threads import control_groups

SHARE = 0.8  # of the free memory: the rest is for what differs from batch to batch, and for other processes
MIB = 2**20
MEASURED = ("cuda", "cpu")  # devices whose memory can be measured here


def check_measured(device: torch.device) -> None:
    """UserError where --micro_batch_size auto has nothing to go by."""
    if device.type not in MEASURED:
        raise UserError(f"--micro_batch_size auto cannot measure the memory of {device.type}: give a number")


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that are free on a GPU, else this process's share of those of the machine."""
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
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as many processes look at the same memory


def peak_extra_bytes(work: Callable[[], object], device: torch.device | str) -> int:
    """Memory that `work` takes at its peak beyond what was in use before: of a GPU, else of this process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(AttributeError, TypeError):  # glibc alone has it: what was freed may still count as resident
        ctypes.CDLL(None).malloc_trim(0)
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
    while the next doubling is expected to fit, by what the last one took per example: a try that is too large is
    avoided, as most systems kill the process. reserved: bytes that training will need besides. Raises RunError if not
    even one fits.
    """
    free = max(0, free_memory(device) - reserved)
    room, found = int(SHARE * free), [(0, 0)]  # examples, bytes
    while (size := found[-1][0]) < most:
        tried = min(max(1, 2 * size), most)
        if size:
            before, taken = found[-2:]
            each = (taken[1] - before[1]) / (taken[0] - before[0])
            if taken[1] + each * (tried - size) > (free if size == 1 else room):  # of one, what is fixed is not known
                break
        try:
            need = peak_extra_bytes(lambda n=tried: step(n), device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if need > room:
            break
        found.append((tried, max(need, found[-1][1])))
    size, need = found[-1]
    if not size:
        raise RunError(f"out of memory: not one example fits in {free // MIB:,} MiB; lower --max_seq_length or --dtype")
    return size, need, free


def check_sharded(config: dict, processes: int) -> None:
    """UserError for what cannot run on a base of which each process holds a part."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process reads the base, not the first one alone
    if processes == 1:
        raise UserError("--use_fsdp shares the base among processes, and there is one: start several, or leave it out")
    if config.get("train_strategy") == "full":
        raise UserError("--train_strategy full trains the layers that --use_fsdp shards: leave out one of them")
    if config["micro_batch_size"] == "auto":
        raise UserError("--micro_batch_size auto tries sizes in each process alone: with --use_fsdp give a number")
