"""How the product is built: imports run downward, files and functions are short, one file knows the libraries."""

import ast

import pytest
from conftest import ROOT

FILES = sorted(
    path
    for pattern in ("*.py", "utils/*.py", "models/**/*.py", "datasets/*.py")
    for path in ROOT.glob(pattern)
)  # fmt: skip
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"utils", "models"},
    "datasets": {"utils.checked", "utils.files", "utils.errors"},
}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"utils", "models", "datasets", "benchmarks", "tests"}
INSIDE = "models/llm/attention.py"


def imported(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return found | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_the_product_is_found():
    assert len(TREES) > 35 and INSIDE in TREES and "datasets/readers.py" in TREES and "distill.py" in TREES


@pytest.mark.parametrize("name", TREES)
def test_no_import_runs_upward(name):
    """utils knows no model, models know no script, datasets/ knows three modules of utils, nothing knows benchmarks."""
    ours = {module for module in imported(TREES[name]) if module.split(".")[0] in OURS}
    room = name.split("/")[0]
    if room == "datasets":
        siblings = {path.stem for path in (ROOT / "datasets").glob("*.py")}
        assert ours <= MAY_IMPORT["datasets"] | siblings
    elif room in MAY_IMPORT:
        assert {module.split(".")[0] for module in ours} <= MAY_IMPORT[room]
    assert not any(module.split(".")[0] in ("benchmarks", "tests", "datasets") for module in ours)


@pytest.mark.parametrize("name", TREES)
def test_files_and_functions_are_short(name):
    lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert lines <= 350, lines
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[name])
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > 60
    }
    assert not long


@pytest.mark.parametrize("name", [name for name in TREES if name != INSIDE])
def test_one_file_knows_the_inside_of_transformers_and_peft(name):
    """Elsewhere their public modules alone, and no attribute of theirs that begins with an underscore."""
    for module in imported(TREES[name]):
        package, *rest = module.split(".")
        assert package not in ("transformers", "peft") or rest in ([], ["utils"]), module
    own = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    own |= {node.name for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)}
    used = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert used <= own, used - own
