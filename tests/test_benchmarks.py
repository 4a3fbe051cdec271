"""Benchmarks: they start, and what they replace in the product comes back, whatever happens meanwhile."""

import ast
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_llm_rec, tiny_sources
from safetensors.torch import load_file

from benchmarks import against_recbole, busy, cost, efficiency, evaluation, llm_step, read_outs, same_time
from models.llm.recommender import LLMRec
from utils import metrics
from utils.data import Sequences, training_examples
from utils.experiments import pack

NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "command")
REPLACED = {name: lambda model, off=off: llm_step.without(model, *off) for name, (off, _) in cost.OFF.items() if off}


@pytest.mark.parametrize("name", NAMES)
def test_help_is_printed(name, capsys, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0 and module.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["against_recbole", "efficiency", "llm_step", "same_time"])
def test_bad_input_ends_with_one_line(name, tmp_path, capsys, monkeypatch):
    """A dataset that is not there, and a record of another dataset. Nothing is written."""
    module, out = importlib.import_module(f"benchmarks.{name}"), tmp_path / "out.json"
    first = ["quality", "--python", sys.executable] if name == "against_recbole" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *first, "--dataset", "nowhere", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        module.run_main(module.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"{name}.py: ") and "nowhere" in line and not out.exists()
    if name == "llm_step":  # it replaces its record
        return
    held = json.dumps({"datasets": {"quality": "a"}, "settings": {"dataset": "a"}, "dataset": "a"})
    out.write_text(held, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        module.run_main(module.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"{out} holds what was measured on a" in line and out.read_text() == held


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_layers", "6"], "6 layers do not make 4 blocks"),
        (["--student_layers", "4", "3"], "3 layers do not make 4 blocks"),
        (["--base_model", "llama-7b-shape", "--full_layers", "33"], "llama-7b-shape has 32 layers"),
    ],
)
def test_depths_that_a_benchmark_cannot_measure_are_told_first(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llm_step.py", *flags, "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr(llm_step, "Benchmark", lambda *_: 1 / 0)  # what measures
    with pytest.raises(SystemExit) as stop:
        llm_step.run_main(llm_step.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and words in line


@pytest.mark.parametrize("place", [".", "nowhere/out.json", "file/out.json", "out.png"])
def test_a_place_that_takes_no_record_is_told_first(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cost.py", "--out", str(tmp_path / place)])
    with pytest.raises(SystemExit) as stop:
        cost.run_main(cost.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(tmp_path / place) in line


def test_a_process_that_fails_is_told_with_what_it_said(capsys):
    words = [sys.executable, "-c", "import sys; sys.exit('it is broken')"]
    with pytest.raises(SystemExit) as stop:
        busy.run_main(lambda: busy.subprocess.run(words, check=True, capture_output=True, encoding="utf-8"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "status 1" in line and "it is broken" in line


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_a_number_that_measures_nothing_is_refused(value, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["read_outs.py", "--repeats", value])
    with pytest.raises(SystemExit) as stop:
        read_outs.run_main(read_outs.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--repeats" in line


def state(model: LLMRec) -> list[dict]:
    """All that is set in a model."""
    hooks = [hooks for part in model.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    return [dict(vars(model)), *(dict(found) for found in hooks)]


@pytest.mark.parametrize("replaced", REPLACED.values(), ids=REPLACED)
def test_what_was_replaced_comes_back_after_an_error(replaced):
    model = tiny_llm_rec()
    before = state(model)
    with pytest.raises(KeyError), replaced(model):
        assert state(model) != before
        raise KeyError
    assert state(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_imported_is_assigned_to(name):
    """`unittest.mock.patch.object` puts back what it replaces."""
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            assert ast.unparse(node).split(".")[0] not in imported, ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            assert ast.unparse(node.args[0]).split(".")[0] not in imported, ast.unparse(node)


def test_busy_compares_within_a_turn():
    found = {"default": {"quiet": [1.0, 2.0, 4.0], "busy": [8.0, 9.0, 7.0]}}
    found["A=1"] = {"quiet": [1.5, 2.2, 4.0], "busy": [2.0, 4.5, 3.5]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in busy.table({"seconds": found}).splitlines()]
    assert rows[2:] == [["default", "2.00", "1.00", "8.00", "1.00"], ["A=1", "2.20", "1.10", "3.50", "0.50"]]


@pytest.mark.pipeline
def test_busy_measures_a_step_of_the_default_teacher():
    assert 0 < busy.step_seconds(1) < 600


def test_a_setting_of_busy_reaches_the_process_and_others_do_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    seen = []
    monkeypatch.setattr(
        busy.subprocess,
        "run",
        lambda command, env, **how: seen.append(env) or busy.subprocess.CompletedProcess(command, 0, "recipe\n1.5\n"),
    )
    assert busy.measure("default", 2) == busy.measure("OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1", 2) == 1.5
    found = [{name: value for name, value in env.items() if "OMP_" in name} for env in seen]
    assert found == [{}, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}] and "PATH" in seen[0]


def test_efficiency_scales_a_few_steps_to_an_epoch_and_compares_with_full_depth(tmp_path, monkeypatch):
    """Every step and pass takes 2 s here: an epoch takes 2 s per batch's share of its targets."""
    place = tiny_sources(tmp_path, layers=6)
    monkeypatch.setattr(efficiency, "dataset_folder", lambda name: place / "data")
    monkeypatch.setattr(efficiency, "base_model_path", lambda name: place / "base")
    monkeypatch.setattr(efficiency, "released_ranks", lambda *args: None)  # its 999 negatives are not there
    monkeypatch.setattr(efficiency, "seconds", lambda work: (work(), 2.0)[1])
    monkeypatch.setattr(efficiency, "RELEASED_BATCH", 10)
    argv = ["efficiency.py", "--depths", "2", "--repeats", "1", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr("sys.argv", argv)
    efficiency.main()
    record = json.loads((tmp_path / "found.json").read_text())
    rows = record["rows"]
    assert list(rows) == ["SASRec", "E4SRec, released", "E4SRec", "E4SRec_2", "SLMRec_4"]
    users = len(Sequences.load(place / "data").users)  # all of them in one batch; of the released one in three
    assert users == 30 and rows["E4SRec, released"]["score_seconds"] == 6
    assert {rows[name]["train_seconds"] for name in ("SASRec", "E4SRec", "SLMRec_4")} == {2}
    assert rows["E4SRec"]["total"] > rows["SLMRec_4"]["total"] > rows["E4SRec_2"]["total"]
    rows["SLMRec_4"]["train_seconds"] = 0.5
    cells = [cell.strip() for cell in efficiency.table(record).splitlines()[-1].split("|")]
    assert cells[1:4] == ["SLMRec_4", "0.5 (4.0)", "2.0 (1.0)"]


def test_the_measures_of_cost_and_of_the_read_outs_run(monkeypatch):
    """With tiny models, on users of different lengths; their speeds say nothing."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 20, 128)
    offsets = np.append(0, lengths.cumsum())
    data = Sequences("tiny", rng.integers(1, 41, offsets[-1]).astype(np.int32), offsets, 40, np.arange(128), "0" * 64)
    for module in (cost, llm_step):
        monkeypatch.setattr(module, "make_data", lambda *_: data)
    for module in (cost, read_outs):
        monkeypatch.setattr(module, "make_model", lambda _, layers, *__, **options: tiny_llm_rec(layers, **options))
    monkeypatch.setattr(llm_step, "released_ranks", lambda *_: None)  # it draws 999 of an item's 39 rivals
    device = torch.device("cpu")
    work = llm_step.Workload(None, cost.BATCH, device)
    found = cost.one_off(work, 1)
    assert [row["off"] for row in found] == [*cost.TRAINING, *cost.INFERENCE]
    states, many = cost.teachers_states(1, device), cost.many_targets(None, 1, device)
    for speeds in ({row["off"]: row["per_s"] for row in found}, states, many, cost.micro_batches(work, 1)):
        assert min(speeds.values()) > 0
    for row in read_outs.measure(work, 1, 1):
        assert min(row["released"], row["response"], row["item"]) > 0


def test_users_whose_last_items_share_a_time_are_apart():
    """Against a loop over users."""
    rng = np.random.default_rng(0)
    offsets = np.append(0, rng.integers(3, 9, 50).cumsum())
    times, users = rng.integers(0, 3, offsets[-1]), np.flatnonzero(rng.random(50) < 0.8)
    data = Sequences("tiny", rng.integers(1, 9, offsets[-1]).astype(np.int32), offsets, 8, users, "0" * 64)
    same = same_time.same_time(data, times)
    expected = []
    for user in users:
        *_, before, last = times[offsets[user] : offsets[user + 1]].tolist()
        expected.append(before == last)
    assert same.tolist() == expected and 0 < sum(expected) < len(users)
    ranks = rng.integers(0, 20, len(users))
    run = {"experiment": {"name": "SASRec"}, "ranks": {"test_full": pack(ranks)}}
    (row,) = same_time.measure({("strong", "SASRec", 42): run, ("strong", "the same run", 42): run}, same)
    for kind, wanted in (("same", True), ("others", False)):
        hits = [
            1 / np.log2(rank + 2) if rank < 10 else 0
            for rank, is_same in zip(ranks, expected, strict=True)
            if is_same == wanted
        ]
        assert row[kind]["NDCG@10"] == pytest.approx(np.mean(hits))


def test_an_epoch_beside_recbole_is_the_median_step_times_the_steps(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    offsets = np.append(0, rng.integers(4, 20, 200).cumsum())
    data = Sequences("tiny", rng.integers(1, 41, offsets[-1]).astype(np.int32), offsets, 40, np.arange(200), "0" * 64)
    monkeypatch.setattr(against_recbole, "theirs", lambda *_: {"seconds": [2.0, 3.0, 9.0], "batches": 7})
    monkeypatch.setattr(against_recbole, "TARGETS", 100)
    args = SimpleNamespace(part="speed", seed=0, repeats=2)
    for name in against_recbole.SETTINGS:
        run = against_recbole.speed(args, name, data, tmp_path)
        targets = training_examples(data, "all", 200).num_targets.sum()
        assert run["epoch_seconds"]["recbole"] == 21 and run["epoch_seconds"]["ours"] > 0
        assert targets / run["steps"]["ours"] == pytest.approx(100, rel=0.15)


def test_quality_beside_recbole_is_of_the_same_users(tmp_path, monkeypatch):
    """Ours is trained; RecBole's ranks are given. The table's interval is that of a bootstrap over users."""
    place = tiny_sources(tmp_path)
    data = Sequences.load(place / "data")
    given = {split: np.arange(len(data.users)) for split in ("valid", "test")}
    monkeypatch.setattr(against_recbole, "theirs", lambda *_: given | {"epochs": 3})
    monkeypatch.setattr(against_recbole, "EPOCHS", 1)
    args = SimpleNamespace(part="quality", seed=5, dataset=place / "data")
    run = against_recbole.quality(args, "SASRec", data, tmp_path)
    ours = load_file(tmp_path / "ours" / metrics.RANKS_FILE)["test_full"].numpy()
    expected = [
        sum(1 / np.log2(rank + 2) for rank in ranks if rank < 10) / len(data.users) for ranks in (ours, given["test"])
    ]
    assert [run["test"]["ours"], run["test"]["recbole"]] == pytest.approx(expected) and run["seed"] == 5
    record = {"quality": {"SASRec": [run]}, "speed": {}, "datasets": {"quality": "tiny"}}
    cells = against_recbole.table(record).splitlines()[-1]
    assert f"{expected[0]:.4f}" in cells and f": {expected[0] - expected[1]:+.4f}, interval" in cells


def test_an_evaluation_that_processes_share_is_timed(capsys):
    evaluation.measure_seconds(30)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0 and len(found["ranks"]) == 30 and min(found["ranks"]) >= 0
