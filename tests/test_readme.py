"""What the README claims and code can break: tables as they are printed, names of files, commands and flags."""

import importlib
import inspect
import json
import re
from collections import Counter
from itertools import product

import pytest
from conftest import ROOT

from benchmarks import cost, llm_step, order, same_metrics, seeds
from utils import cli
from utils.report import comparison

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = ROOT / "results" / "benchmarks"


@pytest.mark.parametrize("dataset", ["ml-100k", "beauty", "clothing2014"])
def test_the_results_tables_are_those_of_the_committed_records(dataset):
    records = sorted(BENCHMARKS.parent.glob(f"runs/{dataset}-*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in records]
    assert {run["config"]["kind"] for run in runs} == {"sr", "teacher", "student"}
    assert comparison(runs) in README


TABLES = {"order": order.table, "llm_step": llm_step.speed_table, "cost": cost.measures_table, "seeds": seeds.table}
TABLES |= dict.fromkeys(("same_metrics", "same_metrics_dropout"), same_metrics.table)


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_the_tables_of_benchmarks_are_those_of_their_records(name, table):
    assert table(json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))) in README


def test_the_papers_hours_stand_beside_what_a_gpu_measured():
    """PAPER, table 7: 3.95 and 0.60 hours an epoch, 0.415 and 0.052 hours of inference."""
    record = json.loads((BENCHMARKS / "llm_step.json").read_text(encoding="utf-8"))
    assert llm_step.paper_table(record) in README
    assert llm_step.paper_table(record).count("not measured") == 2
    record["settings"]["base_model"], record["environment"]["hardware"] = llm_step.LLAMA, "some GPU"
    record["rows"] = [{"kind": "training", "released": "32 layers", "ours": "student 4", "ratio": 41.26}]
    found = llm_step.paper_table(record).splitlines()
    assert [cell.strip() for cell in found[2].split("|")[2:-1]] == ["3.95", "0.6", "6.6", "41.3, some GPU"]
    assert [cell.strip() for cell in found[3].split("|")[2:-1]] == [
        "0.415",
        "0.052",
        "8.0",
        "needs a GPU, not measured",
    ]


@pytest.mark.parametrize("name", re.findall(r"`([a-z_/]+\.(?:py|yaml|md))`", README))
def test_files_that_the_readme_names_exist(name):
    places = ("", "models", "utils", "recipes", "datasets")
    assert "mine" in name or any((ROOT / place / name).exists() for place in places), name


def test_commands_in_the_readme_use_flags_that_exist():
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"(?<!`)`(python [^`]+)`", README)]
    commands = [found for found in (re.match(r"python ([a-z_/]+\.py)(.*)", line) for line in blocks + spans) if found]
    assert len(commands) >= 14
    for script, flags in (found.groups() for found in commands):
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in re.findall(r"--([a-z_]+)", flags.split("#")[0]):
            assert f"    {flag}: " in source or re.search(f'"(--)?{flag}"', source), f"{script} --{flag}"


# released scripts | their flags | what became of them | here
FLAG_MAP = re.findall(r"^\| (.+?\.py`) \| (.+?) \| (same|renamed|fixed|dead there) \| (.+?) \|$", README, re.M)
SECTIONS = {"train_sr_trad": "sr", "finetune": "teacher", "distill": "student"}


def scripts_and_flags(row: tuple[str, ...]) -> tuple[list[str], list[str]]:
    return re.findall(r"`(\w+)\.py`", row[0]), re.findall(r"`([\w-]+)`", row[1])


def test_the_map_of_released_flags_names_each_of_them_once():
    """The released parsers (commit 0555b8d) have 15, 34 and 48 flags; extract_emb.py has none."""
    named = Counter((script, flag) for row in FLAG_MAP for script, flag in product(*scripts_and_flags(row)))
    assert set(named.values()) == {1}
    assert Counter(script for script, _ in named) == {"train_sr_trad": 15, "finetune": 34, "distill": 48}


@pytest.mark.parametrize("row", FLAG_MAP, ids=lambda row: f"{row[2]}: {row[1]}")
def test_the_map_of_released_flags_leads_to_flags_that_exist(row):
    """With the values that it names; `--flag` of `script.py` is one of that script, any other one of all in its row."""
    scripts, released = scripts_and_flags(row)
    here = re.findall(r"`--(\w+) ?([\w.]*)`(?: of `(\w+)\.py`)?", row[3])
    if row[2] == "same":
        here = [(flag, "", "") for flag in released]
    assert here or row[2] != "renamed" or "`HF_HUB_CACHE`" in row[3]
    for flag, value, only in here:
        for script in [only] if only else scripts:
            parameters = inspect.signature(importlib.import_module(script).main).parameters
            assert flag in parameters, script
            if value:
                assert cli.coerce(f"--{flag}", value, parameters[flag].annotation, flag) is not None
    files = re.findall(r"`([a-z_/]+\.py)`", row[3])
    assert files or row[2] != "fixed", "where it is fixed"
    assert all((ROOT / path).is_file() for path in files)
