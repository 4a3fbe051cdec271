"""As many threads as there are free cores, before torch is imported; the user's own setting goes before."""

import ast
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT, control_groups

from utils import threads

SCRIPTS = ["train_sr_trad", "extract_emb", "finetune", "distill", "train_open_p5", "recommend", "evaluate"]


@pytest.mark.parametrize(
    ("used", "cores", "limit", "free"),
    [
        ([0, 0], [0, 1], math.inf, 2),
        ([3, 40], [0, 1], math.inf, 2),
        ([100, 4], [0, 1], math.inf, 1),
        ([60, 60], [0, 1], math.inf, 1),
        ([100, 100], [0, 1], math.inf, 1),
        ([100] + [0] * 15, list(range(16)), math.inf, 15),
        ([100, 0, 0, 0], [1, 2], math.inf, 2),  # the busy core is not one of ours
        ([0] * 8, list(range(8)), 1.5, 2),
        ([0] * 8, list(range(8)), 0.2, 1),
    ],
)
def test_free_cores(used, cores, limit, free, monkeypatch):
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda seconds, percpu: used)
    monkeypatch.setattr(threads.psutil.Process, "cpu_affinity", lambda self: cores, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: limit)
    assert threads.free_cores() == (free, len(cores))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, math.inf),
        ("0::/gone\n", {}, math.inf),
        ("5:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("5:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, math.inf),
    ],
)
def test_quota(groups, files, expected, tmp_path):
    control_groups(tmp_path, groups, files)
    assert threads.quota(tmp_path) == expected
    assert threads.quota(tmp_path / "no Linux") == math.inf


def chosen(**settings: str) -> tuple[str, str]:
    """OMP_NUM_THREADS after the import in a fresh process, and what was printed."""
    clean = {name: value for name, value in os.environ.items() if name not in threads.OWN_SETTINGS}
    code = "import os, utils.threads; print(os.environ.get('OMP_NUM_THREADS'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=clean | settings, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_beside_busy_processes_one_thread_is_left():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        number, told = chosen()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert number == "1" and "OMP_NUM_THREADS" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("setting", threads.OWN_SETTINGS)
def test_the_users_own_setting_wins(setting):
    number, told = chosen(**{setting: "7"})
    assert number == ("7" if setting == "OMP_NUM_THREADS" else "None") and not told


@pytest.mark.parametrize("name", SCRIPTS)
def test_threads_are_set_before_torch_is_imported(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    imported = [node.names[0].name if isinstance(node, ast.Import) else node.module for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    foreign = [module for module in imported if module.split(".")[0] not in sys.stdlib_module_names]
    assert foreign[0] == "utils.threads"
