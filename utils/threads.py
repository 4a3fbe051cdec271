"""How many threads torch gets: as many as there are free cores. Import this before torch, which reads it once.

OpenMP's threads spin while they wait for one another. Where another process holds one of two cores, a training step on
two threads takes nearly twice as long as on one (benchmarks/busy.py). A setting of the user's own goes before.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

OWN_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_THREAD_LIMIT", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SECONDS = 0.5  # of watching what the cores do


def quota(root: Path = Path("/")) -> float:
    """Cores that the control group (a container's limit, say) gives to this process; infinity without a limit."""
    limits = [float("inf")]
    for group in control_groups("cpu", root):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
            try:
                words = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
                limits += [int(words[0]) / int(words[1])] if int(words[0]) > 0 else []
            except (OSError, ValueError, IndexError):  # not there, or "max"
                continue
    return min(limits)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each before those around it."""
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").split()]
    except OSError:  # no Linux
        return
    for controllers, path in groups:
        top = root / "sys/fs/cgroup" / (controllers if controller in controllers.split(",") else "")
        for group in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            yield group
            if group == root / "sys/fs/cgroup":
                break


def free_cores() -> tuple[int, int]:
    """Cores that are free for this process, at least one, and all that it may use."""
    process = psutil.Process()
    allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else list(range(psutil.cpu_count() or 1))
    used = psutil.cpu_percent(SECONDS, percpu=True)
    busy = sum(used[core] for core in allowed if core < len(used)) / 100
    free = min(len(allowed) - busy, quota())
    return max(1, int(free + 0.5)), len(allowed)


def set_threads() -> None:
    if "torch" in sys.modules or any(name in os.environ for name in OWN_SETTINGS):
        return
    free, allowed = free_cores()
    if free < allowed:
        os.environ["OMP_NUM_THREADS"] = str(free)
        print(f"{free} of {allowed} cores free: {free} threads (set OMP_NUM_THREADS to choose)", file=sys.stderr)


set_threads()
