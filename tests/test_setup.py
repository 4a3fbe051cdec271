"""What `make` sets up: the Makefile with a stand-in for Python, and requirements.txt against what is imported."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

# Writes its arguments down, makes "virtual environments" with itself inside, and is too old if OLD is 1.
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c "*) exit ${OLD:-0} ;;
esac
"""
INSTALL = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"


class Checkout:
    """A folder with the Makefile and a Python; `make` returns its exit code and what Python was called with."""

    def __init__(self, place: Path) -> None:
        self.folder, self.log, self.python = place / "my project", place / "log", place / "my python" / "python3"
        self.folder.mkdir()
        for name in ("Makefile", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder)
        self.install(self.python)

    def install(self, python: Path) -> None:
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON, encoding="utf-8")
        python.chmod(0o755)

    def make(self, *targets: str, **environment: object) -> tuple[int, list[str]]:
        self.log.write_text("", encoding="utf-8")
        environment = {"PATH": os.environ["PATH"], "LOG": self.log, "PYTHON": self.python, **environment}
        environment = {name: str(value) for name, value in environment.items()}
        done = subprocess.run(["make", *targets], cwd=self.folder, env=environment, capture_output=True)
        calls = self.log.read_text(encoding="utf-8").splitlines()
        return done.returncode, [call for call in calls if not call.startswith("-c ")]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("name", ["env", "my env", " my  env", "bob's env", 'a"b', "a$b", "a#b", "a:b", "a%b;c&d", "é"])
def test_an_active_environment_is_used_whatever_its_path(name, checkout, tmp_path):
    checkout.install(tmp_path / name / "bin" / "python")
    code, calls = checkout.make("setup", "lint", "records", VIRTUAL_ENV=tmp_path / name)
    assert code == 0
    assert calls == [INSTALL, "-m ruff check .", "-m ruff format --check .", "-m pytest -m records"]
    assert not (checkout.folder / ".venv").exists()
    assert checkout.make("run", VIRTUAL_ENV=tmp_path / name)[1] == [
        "train_sr_trad.py --resume auto",
        "extract_emb.py",
        "finetune.py --resume auto",
        "distill.py --resume auto",
        "recommend.py --history Star Wars; Return of the Jedi; Raiders of the Lost Ark --k 3",
    ]


@pytest.mark.parametrize("active", [{}, {"VIRTUAL_ENV": ""}])
def test_without_one_it_is_made_once_and_filled_when_the_requirements_change(active, checkout):
    assert checkout.make("setup", **active) == (0, ["-m venv .venv", INSTALL])
    shared = "-m pytest --numprocesses auto --maxprocesses 4 --dist loadfile"
    assert checkout.make("test", **active) == (0, ["-m ruff check .", "-m ruff format --check .", shared])
    requirements = checkout.folder / "requirements.txt"
    before = requirements.read_bytes()
    for content in (b"torch\n", before):  # also when they change back
        requirements.write_bytes(content)
        assert checkout.make("setup", **active) == (0, [INSTALL])
        assert checkout.make("setup", **active) == (0, [])


def test_a_python_that_is_too_old_is_refused_and_leaves_nothing(checkout, tmp_path):
    assert checkout.make("setup", OLD=1) == (2, []) and not (checkout.folder / ".venv").exists()
    checkout.install(tmp_path / "my env" / "bin" / "python")
    assert checkout.make("setup", OLD=1, VIRTUAL_ENV=tmp_path / "my env") == (2, [])
    assert checkout.make("setup") == (0, ["-m venv .venv", INSTALL])


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_requirements_name_every_package_that_is_imported():
    own = {"": ROOT} | {name: ROOT / name for name in ("models", "utils", "datasets", "benchmarks", "tests")}
    files = [path for folder in own.values() for path in folder.glob("*.py")] + [*(ROOT / "models").rglob("*.py")]
    names = {name for path in files for name in imported(path)}
    names -= set(sys.stdlib_module_names) | {path.stem for path in files} | set(own)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split("[=<>]", line)[0].lower() for line in lines if not line.startswith("#")}
    packages = packages_distributions()
    unnamed = {name for name in names if not required & {found.lower() for found in packages.get(name, [name])}}
    assert len(names) >= 12 and not unnamed


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"setup", "pipeline"}),
        (["-m", "not pipeline"], {"setup"}),
        (["-m", "records"], {"records"}),
        (["-m", "pipeline or records"], {"pipeline", "records"}),
    ],
)
def test_slow_tests_and_checks_of_records_are_chosen_by_their_marks(flags, expected):
    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.names = {item.path.stem.removeprefix("test_") for item in session.items}

    collected = Collected()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("setup", "pipeline", "records")]
    pytest.main([f"--rootdir={ROOT}", "--collect-only", *flags, *files], plugins=[collected])
    assert collected.names == expected
