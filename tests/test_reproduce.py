"""reproduce.py: which runs a table needs and in which order, what it does when one stops, and what it shows of them."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, forget, tiny_sources
from kills import contents
from safetensors.torch import load_file, save_file

import reproduce
from utils import cli, experiments, paper_recipes, paper_runs, paper_tables, paper_times
from utils.experiments import Experiment
from utils.metrics import metrics_from_ranks, paired_bootstrap

DATASET_FOLDER = reproduce.assets.dataset_folder

RUNS = """
protocols:
  strong: {weights: {cos: 1, ms: 0.1}}
  released:
    weights: {cos: 1, ms: {small: 0.5, others: 2}}
    terms: [ms]
    flags: {train_sr_trad: {train_targets: last}}
runs:
  SASRec: {script: train_sr_trad}
  item table: {script: extract_emb, reads: [SASRec]}
  teacher: {script: finetune, reads: [item table], flags: {num_layers: full, train_strategy: full}}
  student: {script: distill, reads: [teacher]}
  cos: {script: distill, reads: [teacher, SASRec], terms: [cos]}
  student + SASRec: {script: evaluate, reads: [student, SASRec]}
  layers: {script: evaluate, reads: [teacher], flags: {layers: all}}
"""
TABLE = """
title: A table
paper: [table_2, table_3]
seeds: {small: {strong: [1, 12], released: [1]}}
rows: {SASRec: {run: SASRec, paper: SASRec}, ours: {run: student, paper: "SLMRec_4<-8"}, Caser: {paper: Caser}}
pairs: [[student, SASRec]]
"""


CLAIMS = """
title: Claims
shape: claims
seeds: {small: {strong: [1]}}
rows: [SASRec, student]
claims: [{claim: the student beats SASRec, paper: 1, better: [student, SASRec]}]
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A checkout with one table and no runs."""
    (tmp_path / "recipes" / "paper").mkdir(parents=True)
    (tmp_path / "recipes" / "paper" / "runs.yaml").write_text(RUNS)
    (tmp_path / "recipes" / "paper" / "table2.yaml").write_text(TABLE)
    (tmp_path / "recipes" / "small.yaml").write_text("sr: {num_epochs: 2}\n")
    (tmp_path / "results" / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "paper_tables.json", tmp_path / "results")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "TABLES", tmp_path / "results" / "TABLES.md")
    monkeypatch.setattr(reproduce, "base_layers", lambda experiment: 30)
    monkeypatch.setattr(reproduce.assets, "dataset_folder", lambda dataset: tmp_path)
    forget()
    yield tmp_path
    forget()


class Process:
    """In place of a script: leaves a run with ranks of 50 users, fails where `failing` says, or never ends."""

    def __init__(self, place: Path, failing: tuple[str, ...] = (), endless: tuple[str, ...] = ()):
        self.place, self.failing, self.endless, self.commands = place, failing, endless, []

    def __call__(self, command: list[str], cwd: Path) -> "Process":
        self.commands.append(command[1:])
        return self

    def wait(self, timeout: float) -> int:
        words = self.commands[-1]
        folder = self.place / words[words.index("--output_dir") + 1]
        if folder.name in self.endless and timeout != experiments.PATIENCE:
            raise subprocess.TimeoutExpired(words[0], timeout)
        if folder.name in self.failing:
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"run_id": folder.name, "kind": "sr"}))
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
        if words[0] == "extract_emb.py" or folder.name in self.endless:
            return 0
        rng = np.random.default_rng(len(self.commands))
        ranks = {kind: rng.integers(0, 40, 50) for kind in ("sampled", "full")}
        save_file(
            {f"test_{k}": torch.from_numpy(v.astype(np.int32)) for k, v in ranks.items()}, folder / "ranks.safetensors"
        )
        metrics = {kind: metrics_from_ranks(found) for kind, found in ranks.items()}
        report = {"run_id": folder.name, "valid": metrics, "test": metrics, "protocol": {}, "environment": {}}
        (folder / "metrics.json").write_text(json.dumps(report))
        return 0

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGINT


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce.py", *words])
    reproduce.main()


def process(monkeypatch, place: Path, **options) -> Process:
    found = Process(place, **options)
    monkeypatch.setattr(experiments.subprocess, "Popen", found)
    return found


def test_a_row_may_be_of_some_datasets_until_it_is_asked_for(place, monkeypatch, capsys):
    text = TABLE.replace("{run: student,", "{run: student, datasets: [large],")
    (place / "recipes" / "paper" / "table2.yaml").write_text(text)
    for asked, there in (([], False), (["--dataset", "large"], True), (["--rows", "ours"], True)):
        call(monkeypatch, "plan", "table2", *asked)
        assert ("student" in capsys.readouterr().out) == there


def test_every_run_comes_once_after_those_that_it_reads_and_first_seeds_come_first(place, monkeypatch):
    ran = process(monkeypatch, place)
    call(monkeypatch, "run", "table2")
    named = [Path(words[words.index("--output_dir") + 1]).name for words in ran.commands]
    chain = ["sasrec", "item-table", "teacher", "student"]
    first = [f"{name}-seed1" for name in chain] + [f"{name}-released-seed1" for name in chain]
    assert named == first + [f"{name}-seed12" for name in chain]
    teacher = ran.commands[2]
    assert teacher[0] == "finetune.py" and "outputs/small/paper/item-table-seed1" in teacher
    assert (
        teacher[teacher.index("--train_strategy") + 1] == "full" and teacher[teacher.index("--num_layers") + 1] == "30"
    )
    assert teacher[teacher.index("--seed") + 1] == "1"
    ran.commands.clear()
    call(monkeypatch, "run", "table2")
    assert not ran.commands  # all is there


def test_terms_get_the_weights_of_the_protocol_and_the_others_none(place):
    found = {(p, n): Experiment("small", p, n, 1).flags() for p in ("strong", "released") for n in ("student", "cos")}
    assert found["strong", "student"] == {}  # the recipe's
    assert found["strong", "cos"] == found["released", "cos"] == {"lambda_cos": 1, "lambda_ms": 0}
    assert found["released", "student"] == {"lambda_cos": 0, "lambda_ms": 0.5}
    assert Experiment("large", "released", "student", 1).flags() == {"lambda_cos": 0, "lambda_ms": 2}
    assert Experiment("small", "released", "SASRec", 1).flags() == {"train_targets": "last"}
    command = Experiment("small", "strong", "cos", 1).command(lambda: 30)
    paper = "outputs/small/paper/"
    assert command[command.index("--teacher") + 1] == f"{paper}teacher-seed1"
    assert command[command.index("--kl_teacher") + 1] == f"{paper}sasrec-seed1"


def test_what_reads_a_failed_run_is_left_out_and_the_rest_goes_on(place, monkeypatch, capsys):
    ran = process(monkeypatch, place, failing=("teacher-seed1",))
    with pytest.raises(reproduce.RunError, match=r"2 runs failed: outputs/small/paper/teacher-seed1, .*student-seed1"):
        call(monkeypatch, "run", "table2")
    assert "student on small, strong, seed 1: not run, as teacher failed" in capsys.readouterr().out
    assert [words[0] for words in ran.commands].count("distill.py") == 2  # of seed 12, and of the other protocol
    call(monkeypatch, "plan", "table2")
    states = [line.split("|")[5].strip() for line in capsys.readouterr().out.splitlines() if "small |" in line]
    assert states == ["failed", "to run"]
    ran.failing = ()
    call(monkeypatch, "run", "table2")
    assert [words[0] for words in ran.commands[-2:]] == ["finetune.py", "distill.py"]


EQUAL = """
  again: {script: distill, reads: [teacher], flags: {num_epochs: 3, lambda_cos: 1, lambda_ms: 0}}
  alone: {script: distill, reads: [teacher], terms: [cos], flags: {num_epochs: 3}}
  of again: {script: distill, reads: [again]}
  last: {script: distill, reads: [alone]}
  as in the recipe: {script: train_sr_trad, flags: {num_epochs: 2}}
  longer: {script: train_sr_trad, flags: {num_epochs: 3}}
"""


@pytest.fixture
def named_twice(place) -> Path:
    """A table of runs of which some resolve to the same: by terms or flags, by recipe or flags, by what they read."""
    names = ["alone", "again", "SASRec", "longer", "as in the recipe", "last", "of again"]
    (place / "recipes" / "paper" / "runs.yaml").write_text(RUNS + EQUAL)
    table = f"title: Twice\nseeds: {{small: {{strong: [1]}}}}\nrows: {json.dumps(names)}\n"
    (place / "recipes" / "paper" / "twice.yaml").write_text(table)
    return place


def test_what_resolves_to_the_same_is_run_once_and_shown_by_each_name(named_twice, monkeypatch, capsys):
    ran = process(monkeypatch, named_twice)
    call(monkeypatch, "run", "twice")
    named = [Path(words[words.index("--output_dir") + 1]).name.removesuffix("-seed1") for words in ran.commands]
    assert named == ["sasrec", "item-table", "teacher", "again", "longer", "of-again"]
    found = {Experiment("small", "strong", name, 1).fingerprint() for name in ("SASRec", "as in the recipe")}
    assert len(found) == 2  # what decides is what they resolve to
    last = ran.commands[-1]
    assert last[last.index("--teacher") + 1] == "outputs/small/paper/again-seed1"
    ran.commands.clear()
    call(monkeypatch, "run", "twice", "--rows", "last", "alone", "as in the recipe")
    call(monkeypatch, "record")
    shutil.rmtree(named_twice / "outputs")
    call(monkeypatch, "run", "twice", "--rows", "last", "alone", "as in the recipe")
    assert not ran.commands
    capsys.readouterr()
    call(monkeypatch, "show", "twice")
    rows = [line.split("|")[1:] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = {name.strip(): values for name, *values in rows}
    assert cells["alone"] == cells["again"] != cells["SASRec"] == cells["as in the recipe"] != cells["longer"]
    assert cells["last"] == cells["of again"] != cells["again"]


def test_a_run_that_is_there_counts_by_whichever_name(named_twice, monkeypatch):
    """The one that is finished is taken, though another one of the same comes first in runs.yaml."""
    ran = process(monkeypatch, named_twice)
    experiments.execute(Experiment("small", "strong", "alone", 1), lambda: 30, float("inf"))
    ran.commands.clear()
    call(monkeypatch, "run", "twice", "--rows", "again", "of again")
    assert len(ran.commands) == 1
    assert ran.commands[0][ran.commands[0].index("--teacher") + 1] == "outputs/small/paper/alone-seed1"


def test_other_data_under_the_same_name_are_another_run(place, monkeypatch):
    """Of a run folder, and of a record."""
    process(monkeypatch, place)
    dataset, sasrec = place / "datasets" / "small" / "dataset.json", Experiment("small", "strong", "SASRec", 1)
    words = ("run", "table2", "--protocol", "strong", "--seeds", "1", "--rows", "SASRec")
    call(monkeypatch, *words)
    config = place / sasrec.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dataset_fingerprint": "a"}))
    dataset.parent.mkdir(parents=True)
    dataset.write_text(json.dumps({"fingerprint": "a"}))
    call(monkeypatch, "record")
    states = {}
    for data in "ab":
        dataset.write_text(json.dumps({"fingerprint": data}))
        states[data] = [sasrec.state()]
    with pytest.raises(
        reproduce.UserError, match=r"sasrec-seed1\.json are of other flags, another recipe or other data"
    ):
        call(monkeypatch, *words)
    shutil.rmtree(place / "outputs")
    for data in "ab":
        dataset.write_text(json.dumps({"fingerprint": data}))
        states[data].append(sasrec.state())
    assert states == {"a": ["finished", "recorded"], "b": ["changed", "to run"]}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_lost_weights_are_told_before_what_reads_them_is_run(damage, place, monkeypatch):
    ran, words = process(monkeypatch, place), ("run", "table2", "--protocol", "strong", "--seeds", "1", "--rows")
    call(monkeypatch, *words, "SASRec")
    ran.commands.clear()
    damage(place / "outputs" / "small" / "paper" / "sasrec-seed1" / "model.safetensors")
    call(monkeypatch, *words, "SASRec")  # nothing reads them
    with pytest.raises(reproduce.UserError, match=r"model\.safetensors is .*, or move .*sasrec-seed1\.json away"):
        call(monkeypatch, *words, "ours")
    assert not ran.commands


COUNTS = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *args: got.append(1))
open(sys.argv[1], "w").write("0")
while not got:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "w").write(str(len(got)))
"""


@pytest.mark.parametrize("reaches", ["both", "parent"])
def test_one_ctrl_c_interrupts_a_run_once(reaches, place, monkeypatch):
    """A terminal sends it to the run too."""
    begin, file = subprocess.Popen, place / "count"
    child = []

    def start(command, cwd):
        child.append(begin([sys.executable, "-c", COUNTS, str(file)]))
        threading.Thread(target=press).start()
        return child[0]

    def press():
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        if reaches == "both":
            child[0].send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(experiments.subprocess, "Popen", start)
    monkeypatch.setattr(experiments, "ALONE", 2)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            experiments.execute(Experiment("small", "strong", "SASRec", 1), lambda: 30, float("inf"))
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert child[0].returncode == 0 and file.read_text() == "1"


@pytest.mark.parametrize("verb", ["list", "run"])
def test_a_pipe_that_closes_early_ends_in_silence_what_is_only_shown(verb, place, monkeypatch):
    def broken(args) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(reproduce, {"list": "show_list", "run": "run"}[verb], broken)
    with nullcontext() if verb == "list" else pytest.raises(BrokenPipeError):
        call(monkeypatch, verb)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": 5},
        {"config": {"num_layers": "many"}},
        {"metrics": {"peak_memory_bytes": "much"}},
        {"metrics": {"protocol": {"interactions": "many"}}},
        {"metrics": {"layers": [1]}},
        {"metrics": {"environment": {"threads": "two"}}},
    ],
)
def test_a_record_of_another_shape_is_told(changes, place, monkeypatch):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    call(monkeypatch, "record")
    path = place / "results" / "runs" / "small" / "teacher-seed1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(reproduce.UserError, match=r"teacher-seed1\.json: (config|metrics)"):
        call(monkeypatch, "show", "table2")


def test_a_base_model_in_the_working_folder_is_found_from_the_checkout(place, tmp_path_factory, monkeypatch):
    work, ran = tmp_path_factory.mktemp("work"), process(monkeypatch, place)
    (work / "mine").mkdir()
    monkeypatch.chdir(work)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1", "--base_model", "./mine")
    (teacher,) = (words for words in ran.commands if words[0] == "finetune.py")
    assert teacher[teacher.index("--base_model") + 1] == str(work / "mine")


def test_attributes_are_data_too(place, monkeypatch):
    process(monkeypatch, place)
    folder, sasrec = place / "datasets" / "small", Experiment("small", "strong", "SASRec", 1)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1", "--rows", "SASRec")
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": "a", "attributes_fingerprint": "b"}))
    config, states = place / sasrec.folder / "config.json", []
    held = json.loads(config.read_text()) | {"dataset_fingerprint": "a"}
    for changes in ({}, {"attributes_fingerprint": "b"}, {"attributes_fingerprint": None}):
        config.write_text(json.dumps(held | changes))
        states.append(sasrec.state())
    assert states == ["finished", "finished", "changed"]


def test_records_of_two_versions_of_a_dataset_are_told(place, monkeypatch):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    call(monkeypatch, "record")
    path = place / "results" / "runs" / "small" / "teacher-seed1.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"config": run["config"] | {"dataset_fingerprint": "other"}}))
    with pytest.raises(reproduce.UserError, match=r"1 of \d records of small, as .*teacher-seed1\.json, are of"):
        call(monkeypatch, "show", "table2")


def test_a_record_of_another_recipe_is_left_out_of_the_tables(place, monkeypatch, capsys):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    call(monkeypatch, "record")
    call(monkeypatch, "show", "table2")
    before = capsys.readouterr()
    (place / "recipes" / "small.yaml").write_text("sr: {num_epochs: 3}\n")
    forget()
    call(monkeypatch, "show", "table2")
    after = capsys.readouterr()
    assert "left out" not in before.err and "3 records of small are left out: of other flags" in after.err
    cells = [[line for line in said.out.splitlines() if line.startswith("| ours ")] for said in (before, after)]
    assert cells[0] and cells[0] != cells[1]


def test_a_record_of_a_run_that_has_no_name_any_more_is_told(place, monkeypatch):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    call(monkeypatch, "record")
    runs, table = (place / "recipes" / "paper" / f"{name}.yaml" for name in ("runs", "table2"))
    runs.write_text(RUNS.replace("[student, SASRec]", "[pupil, SASRec]").replace("  student:", "  pupil:"))
    table.write_text(TABLE.replace("run: student", "run: pupil").replace("[[student,", "[[pupil,"))
    forget()
    with pytest.raises(reproduce.UserError, match=r"student-seed1\.json: runs\.yaml has no run 'student' in 'strong'"):
        call(monkeypatch, "show", "table2")


def test_records_of_base_models_of_the_same_name_do_not_replace_each_other(place, monkeypatch):
    process(monkeypatch, place)
    for base in ("one/base", "other/base"):
        call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1", "--base_model", base)
        if base == "one/base":
            call(monkeypatch, "record")
            shutil.rmtree(place / "outputs")
    with pytest.raises(reproduce.UserError, match="is of another run, whose base model has the same name"):
        call(monkeypatch, "record")


def test_a_run_stops_when_the_budget_is_used_up_and_goes_on_later(place, monkeypatch, capsys):
    ran = process(monkeypatch, place, endless=("teacher-seed1",))
    times = iter([0.0, *range(10), *[10.0**6] * 99])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    call(monkeypatch, "run", "table2", "--budget_hours", "0.5")
    assert "the budget is used up: 10 of 12 runs are left" in capsys.readouterr().out
    assert [words[0] for words in ran.commands] == ["train_sr_trad.py", "extract_emb.py", "finetune.py"]
    assert Experiment("small", "strong", "teacher", 1).state() == "interrupted"
    ran = process(monkeypatch, place)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    call(monkeypatch, "run", "table2")
    assert next(words[0] for words in ran.commands) == "finetune.py" and len(ran.commands) == 10
    assert "the budget" not in capsys.readouterr().out


def test_another_recipe_makes_another_run(place, monkeypatch):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    before = {name: Experiment("small", "strong", name, 1).fingerprint() for name in ("SASRec", "student")}
    (place / "recipes" / "small.yaml").write_text("# a comment\nsr: {num_epochs: 2, another_model: {dropout: 0.1}}\n")
    forget()
    assert Experiment("small", "strong", "SASRec", 1).fingerprint() == before["SASRec"]
    (place / "recipes" / "small.yaml").write_text("sr: {num_epochs: 3}\n")
    forget()
    assert Experiment("small", "strong", "student", 1).fingerprint() != before["student"]  # it reads SASRec's table
    assert Experiment("small", "strong", "student", 1).state() == "changed"
    with pytest.raises(reproduce.UserError, match=r"sasrec-seed1\.json are of other flags"):
        call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")


def test_hours_come_from_a_calibration_where_no_other_seed_was_run(place, monkeypatch, capsys):
    """3 steps took 6 s of 40 s, an evaluation 4 s: 2 epochs of 10 steps take 34 s more, 3 more evaluations 12 s."""
    short = paper_times.calibration(Experiment("small", "strong", "SASRec", 1))
    folder = place / short.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_epochs": 2, "eval_steps": 5}))
    seconds = {"train": 6.0, "score_test": 4.0}
    (folder / "metrics.json").write_text(json.dumps({"steps": 3, "steps_per_epoch": 10, "seconds": seconds}))
    kept = {"fingerprint": short.fingerprint(), "outcome": "finished", "seconds": 40.0}
    (place / f"{short.folder}.json").write_text(json.dumps(kept))
    assert paper_times.expected_seconds(Experiment("small", "released", "SASRec", 1)) is None
    for seed in (1, 7):
        assert paper_times.expected_seconds(Experiment("small", "strong", "SASRec", seed)) == pytest.approx(
            40 + 34 + 12
        )
    call(monkeypatch, "plan", "table2", "--rows", "SASRec", "--seeds", "1", "--protocol", "strong")
    assert "1 runs, 0.0 hours\n" in capsys.readouterr().out


def test_a_calibration_that_failed_tells_no_time(place, monkeypatch, capsys):
    """What reads it is not run, and the next plan tries again."""
    ran = process(monkeypatch, place, failing=("teacher-seed0",))
    monkeypatch.setattr(paper_times, "planned_steps", lambda config, per_epoch: 3)
    monkeypatch.setattr(paper_times, "read_config", lambda folder: {"eval_steps": 3})
    report = {"steps": 3, "steps_per_epoch": 3, "seconds": {"train": 1.0, "score_test": 1.0}}
    monkeypatch.setattr(paper_times, "read_metrics", lambda folder: report)
    argv = ["plan", "table2", "--protocol", "strong", "--seeds", "1", "--rows", "ours", "--calibrate"]
    for _ in range(2):
        ran.commands.clear()
        with pytest.raises(reproduce.RunError, match="2 runs failed: outputs/small/calibration/teacher-seed0, "):
            call(monkeypatch, *argv)
        assert ran.commands[-1][0] == "finetune.py"
    teacher = Experiment("small", "strong", "teacher", 1)
    assert paper_times.expected_seconds(teacher) is None
    call(monkeypatch, *argv[:-1])
    assert "of which no time is known" in capsys.readouterr().out


def test_a_run_without_its_folder_is_planned_at_its_time(place, monkeypatch):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1", "--rows", "SASRec")
    sasrec = Experiment("small", "strong", "SASRec", 1)
    path = place / f"{sasrec.folder}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 50.0}))
    assert paper_times.expected_seconds(sasrec) == 0
    shutil.rmtree(place / sasrec.folder)
    assert paper_times.expected_seconds(sasrec) == 50


def test_all_that_a_run_needs_is_looked_for_before_it_begins(place, monkeypatch):
    ran = process(monkeypatch, place)

    def absent(experiment: Experiment) -> int:
        raise reproduce.UserError("no such base model")

    monkeypatch.setattr(reproduce, "base_layers", absent)
    with pytest.raises(reproduce.UserError, match="no such base model"):
        call(monkeypatch, "run", "table2")
    assert not ran.commands
    call(monkeypatch, "run", "table2", "--rows", "SASRec")  # needs none
    assert {words[0] for words in ran.commands} == {"train_sr_trad.py"}


def test_what_record_leaves_out_is_told(place, monkeypatch, capsys):
    process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1")
    assert "all 2 runs are there" in capsys.readouterr().out
    (place / "recipes" / "small.yaml").write_text("sr: {num_epochs: 3}\n")
    forget()
    call(monkeypatch, "record")
    assert "outputs/small/paper/sasrec-seed1 is left out: changed" in capsys.readouterr().out


def test_what_others_report_is_shown_beside_their_data_alone(place, monkeypatch, capsys):
    published = "{run: student, published: {ndcg: 0.0599, loss: ce, source: a paper},"
    text = TABLE.replace("{run: student,", published).replace("paper: [table_2, table_3]", "shape: published")
    (place / "recipes" / "paper" / "table2.yaml").write_text(text)
    (place / "recipes" / "other.yaml").write_text("{}")
    process(monkeypatch, place)
    monkeypatch.setattr(paper_tables, "measured", lambda *args: [{"test": {"full": {"NDCG@10": 0.06}}}])
    monkeypatch.setattr(reproduce, "measured", paper_tables.measured)
    monkeypatch.setattr(reproduce, "difference_table", lambda *args: "")
    for dataset, shown in (("small", True), ("other", False)):
        call(monkeypatch, "show", "table2", "--dataset", dataset)
        assert ("0.0599" in capsys.readouterr().out) == shown


def test_records_stand_for_runs_and_make_the_tables(place, monkeypatch, capsys):
    ran = process(monkeypatch, place)
    call(monkeypatch, "run", "table2", "--protocol", "strong")
    call(monkeypatch, "record")
    folders = dict.fromkeys((1, 12), place / "outputs/small/paper")
    ranks = {
        (name, seed): load_file(folder / f"{name}-seed{seed}" / "ranks.safetensors")["test_full"].numpy()
        for seed, folder in folders.items()
        for name in ("student", "sasrec")
    }
    shutil.rmtree(place / "outputs")  # as in a new clone
    ran.commands.clear()
    call(monkeypatch, "run", "table2", "--protocol", "strong")
    assert not ran.commands
    capsys.readouterr()
    call(monkeypatch, "show", "table2")
    shown = capsys.readouterr().out
    assert shown.strip() in (place / "results" / "TABLES.md").read_text(encoding="utf-8")

    values = [100 * metrics_from_ranks(ranks["student", seed])["NDCG@10"] for seed in (1, 12)]
    row = next(line for line in shown.splitlines() if line.startswith("| ours"))
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in row and "18.07" in row
    assert re.search(r"\| Caser +\| +- \| +- .* 12\.66 ", shown)
    both = [np.concatenate([ranks[name, seed] for seed in (1, 12)]) for name in ("student", "sasrec")]
    mean, low, high = paired_bootstrap(*both, clusters=2)
    assert re.search(
        rf"student - SASRec \| +full \| +2 \| +{re.escape(f'{mean:+.4f} | {low:+.4f} .. {high:+.4f}')}", shown
    )
    assert "small, protocol released: not measured yet." in shown

    call(monkeypatch, "run", "table2", "--protocol", "strong", "--seeds", "1", "12", "7", "--rows", "ours")
    assert len(ran.commands) == 4  # a new seed needs its whole chain, the recorded ones nothing


def test_average_ranks_share_a_place_where_values_are_equal():
    found = paper_tables.average_ranks({"a": [3.0, 1.0], "b": [2.0, 1.0], "none": [], "c": [1.0, 5.0]})
    assert found == {"a": "1.8", "b": "2.2", "c": "2.0"}


def test_ours_stands_beside_what_others_published():
    def run(ndcg: float, hardware: str = "CPU") -> dict:
        trained = {
            "parameters": {"total": 2_500_000},
            "seconds": {"train_epoch": 7.25},
            "environment": {"threads": 1, "hardware": hardware},
        }
        return {"metrics": {"test": {"full": {"NDCG@10": ndcg}}, "baselines": {}} | trained}

    published = {"ndcg": 0.04, "loss": "ce", "source": "a paper"}
    names = {"near": (0.0376, 0.0384), "far": (0.0379,), "above": (0.05,), "ours alone": (0.02,)}
    rows = {name: paper_recipes.Row(name, published=None if name == "ours alone" else published) for name in names}
    rows["to come"] = paper_recipes.Row("to come", published=published)
    found = {("strong", name, seed): run(v) for name, values in names.items() for seed, v in enumerate(values)}
    found |= {("strong", "elsewhere", seed): run(0.04, f"CPU {seed}") for seed in (0, 1)}
    rows["elsewhere"] = paper_recipes.Row("elsewhere", published=published)
    table = paper_recipes.Table("baselines", "", rows, {"beauty": {"strong": [0, 1]}}, shape="published")
    lines = paper_tables.published_table(table, "beauty", "strong", found).splitlines()
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in (text.split("|") for text in lines[2:])}
    assert cells["near"] == [
        "0.0400",
        "ce",
        "2",
        "0.0380 ± 0.0006",
        "-5.0 %",
        "yes",
        "2.50",
        "7.2 ± 0.0",
        "1",
        "a paper",
    ]
    assert cells["far"][3:6] == ["0.0379", "-5.2 %", "no"] and cells["above"][4:6] == ["+25.0 %", "yes"]
    assert cells["ours alone"] == ["-", "-", "1", "0.0200", "-", "-", "2.50", "7.2", "1", "-"]
    assert cells["to come"] == ["0.0400", "ce", *"-------", "a paper"]
    assert cells["elsewhere"][6:9] == ["2.50", "-", "1"]  # seconds of two machines have no mean


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show tabel2", "no table tabel2.*did you mean table2"),
        ("run table2 --rows SASRek", "table2 has no such row.*did you mean SASRec"),
        ("run table2 --protocol weak", "--protocol weak: it is one of strong, released"),
        ("run table2 --dataset smal", "--dataset smal: neither"),
        ("plan table2 --dataset ../small", "--dataset ../small: the name of a dataset"),
        ("record --dataset /tmp/x", "--dataset /tmp/x: the name of a dataset"),
        ("record --dataset a**b", "the name of a dataset"),
        ("plan table2 --dataset smal", "--dataset smal: neither"),
        ("show table2 --dataset smal", "--dataset smal: neither"),
        ("record --dataset small", "outputs/small/paper/ holds no run"),
        ("show claims --protocol released", "--protocol has no effect on what claims shows"),
        ("show claims --rows student", "--rows has no effect"),
    ],
)
def test_what_is_not_there_is_refused(place, monkeypatch, words, message):
    monkeypatch.setattr(reproduce.assets, "dataset_folder", DATASET_FOLDER)
    (place / "recipes" / "paper" / "claims.yaml").write_text(CLAIMS)
    before = contents(place)
    with pytest.raises(reproduce.UserError, match=message):
        call(monkeypatch, *words.split())
    assert contents(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "run table2 --seeds -1",
        "plan table2 --seeds 1.5",
        "record --base_model x",
        "run table2 --budget_hours no",
        "run table2 --seeds 1 --seeds 2",
        "show table2 --dataset a --dataset b",
    ],
)
def test_flags_that_a_verb_does_not_take_are_refused(place, monkeypatch, words):
    verb, *_, flag, value = words.split()
    if words.count(flag) == 2:
        value = "twice"
    with pytest.raises(reproduce.UserError, match=rf"{flag}.*{value}.*; see reproduce.py( {verb})? --help"):
        call(monkeypatch, *words.split())


def test_an_empty_variable_of_the_shell_is_not_everything(place, monkeypatch):
    with pytest.raises(reproduce.UserError, match="is empty"):
        call(monkeypatch, "run", "all", "--dataset", "")


def test_a_recipe_may_hold_what_yaml_takes_for_a_date(place, monkeypatch, capsys):
    (place / "recipes" / "small.yaml").write_text("sr: {num_epochs: 2, output_dir: 2024-05-01}\n")
    call(monkeypatch, "plan", "table2")
    assert "12 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "entry",
    ['{"experiment": {"name": "SASRec"}}', '{"experiment": 3}', "{", '{"experiment": {"name": "SASRec", "seed": "1"}}'],
)
def test_a_damaged_file_of_a_run_is_told(place, monkeypatch, entry):
    folder = place / "outputs" / "small" / "paper"
    folder.mkdir(parents=True)
    (folder / "sasrec-seed1.json").write_text(entry)
    with pytest.raises(reproduce.UserError, match=r"sasrec-seed1\.json"):
        call(monkeypatch, "record")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("runs", RUNS.replace("script: distill", "script: distil"), "unknown script distil.*did you mean distill"),
        ("runs", RUNS.replace("[student, SASRec]", "[teacher 2]"), "reads 'teacher 2', which does not stand before it"),
        ("runs", "runs: [", "runs.yaml is no YAML"),
        ("runs", RUNS.replace("flags: {num", "flgs: {num"), "flgs"),
        ("runs", RUNS.replace("terms: [cos]", "terms: [norm]"), "no weight of the term 'norm'"),
        (
            "runs",
            RUNS.replace("{train_sr_trad: {", "{train_sr: {"),
            "unknown script train_sr.*did you mean train_sr_trad",
        ),
        (
            "runs",
            RUNS.replace("reads: [item table], flags", "reads: [item table], terms: [cos], flags"),
            "of a student",
        ),
        (
            "runs",
            RUNS.replace("reads: [SASRec]}", "reads: [SASRec, SASRec]}"),
            "item table reads 2 runs, extract_emb 1",
        ),
        ("table2", TABLE.replace("run: student", "run: studet"), "no run 'studet'.*did you mean student"),
        ("table2", TABLE.replace("released: [1]", "loose: [1]"), "no protocol 'loose'"),
        ("table2", TABLE + "shape: round", "shape 'round' is none of metrics"),
        ("table2", TABLE.replace("paper: [table_2, table_3]", "shape: efficiency"), "paper is missing"),
        ("table2", TABLE.replace("table_3", "table_33"), "paper .'table_33'.: keys of paper_tables.json"),
        ("table2", TABLE.replace("title:", "tilte:"), "tilte"),
        (
            "table2",
            TABLE.replace("{run: student,", "{run: student, published: {nccg: 1},"),
            "published is dict of 1, expected ndcg",
        ),
        (
            "table2",
            TABLE.replace("{run: student,", "{run: student, published: 0.05,"),
            "published is 0.05, expected ndcg",
        ),
        ("claims", CLAIMS.replace(", paper: 1", ""), "expected a claim, what the paper says"),
        ("claims", CLAIMS.replace("better:", "beter:"), "expected a claim"),
        ("claims", CLAIMS.replace("better: [", "share: [total, "), "expected a claim"),
        ("table2", TABLE.replace("{run: student,", "{run: student, datasets: small,"), "expected a list of names"),
        ("table2", TABLE.replace("released: [1]", "released: []"), "expected a list of seeds"),
        ("claims", CLAIMS.replace("better: [student, SASRec]", "better: 3"), "expected a claim"),
        ("claims", CLAIMS.replace("better: [student, SASRec]", "better: [student]"), "expected a claim"),
        ("table2", "just text", "expected name: value lines"),
        (
            "table2",
            TABLE.replace("{run: student,", "{run: student, published: {ndcg: 1, loss: ce, source: 2024},"),
            "expected ndcg, loss and source",
        ),
        ("claims", CLAIMS.replace("claim: the student beats SASRec", "claim: 13"), "expected a claim"),
        ("claims", CLAIMS.replace("paper: 1", "paper: 1, datasets: [smal]"), "names 'smal', which `seeds` has not"),
        (
            "table2",
            TABLE.replace("[table_2, table_3]", "[table_7]"),
            "metrics can show nothing of the paper's table_7",
        ),
        (
            "table2",
            TABLE.replace("[table_2, table_3]", "[table_2]\nshape: efficiency"),
            "show nothing of the paper's table_2",
        ),
        ("table2", TABLE.replace("paper: SASRec}", "paper: SASrec}"), "row 'SASRec' names 'SASrec', expected one of"),
        (
            "table2",
            TABLE.replace("Caser: {", "Count: {baseline: SASRec, model: Popularty}, Caser: {"),
            "row 'Count' names 'Popularty', expected one of Popularity, Transitions",
        ),
        ("table2", TABLE.replace("[[student,", "[[layers,"), "'layers' measures every layer of a model"),
        (
            "table2",
            TABLE.partition("rows")[0].replace("[table_2, table_3]", "[table_7]\nshape: efficiency")
            + "rows: [student + SASRec]",
            "row 'student . SASRec' trains nothing",
        ),
        (
            "table2",
            TABLE.replace("{run: student,", "{run: layers,"),
            "'layers' measures every layer of a model; only rows of shape depth",
        ),
    ],
)
def test_recipes_that_do_not_fit_together_are_refused(place, monkeypatch, file, text, message):
    (place / "recipes" / "paper" / f"{file}.yaml").write_text(text)
    with pytest.raises(reproduce.UserError, match=message):
        call(monkeypatch, "list")


def test_the_committed_recipes_name_flags_that_scripts_have():
    """Each run of recipes/paper/runs.yaml, in both protocols, passes the scripts' own check of the command line."""
    import distill
    import evaluate
    import extract_emb
    import finetune
    import train_open_p5
    import train_sr_trad
    from models.sr import MODELS

    scripts = {m.__name__: m for m in (distill, evaluate, extract_emb, finetune, train_open_p5, train_sr_trad)}
    forget()
    for table in paper_recipes.table_names():
        paper_recipes.read_table(table)
    for protocol in paper_runs.protocols():
        for name, spec in paper_runs.specs().items():
            command = Experiment("beauty", protocol, name, 42).command(lambda: 30)
            models = None if spec.script == "evaluate" else MODELS
            cli.resolve(scripts[spec.script].main, paper_runs.SECTIONS[spec.script] or None, command[1:], models=models)


TINY = """
data: {max_seq_length: 8, batch_size: 8, warmup_steps: 2, eval_steps: 20}
sr: {sasrec: {item_dim: 8, num_layers: 1, num_heads: 1}, max_steps: 20}
teacher: {num_layers: 2, lora_r: 2, max_steps: 80}
student: {num_layers: 1, num_blocks: 1, lambda_ms: 0, max_steps: 20}
"""


def checkout_at(place: Path) -> Path:
    """A copy of this checkout without records, runs and data, and with the recipes of the paper."""
    parts = [ROOT / name for name in ("utils", "models", "recipes", *(path.name for path in ROOT.glob("*.py")))]
    parts += (ROOT / "datasets").glob("*.py")
    for part in parts:
        target = place / part.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            shutil.copytree(part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, target)
    (place / "results").mkdir()
    shutil.copy(ROOT / "results" / "paper_tables.json", place / "results")
    return place


@pytest.mark.pipeline
def test_a_table_that_is_killed_goes_on_to_the_same_digits(tmp_path):
    """The steps of a table as real processes, with a tiny base: killed while the teacher trains, and started again."""
    sources, checkout = tiny_sources(tmp_path), checkout_at(tmp_path / "checkout")
    shutil.copytree(sources / "data", checkout / "datasets" / "tiny")
    (checkout / "recipes" / "tiny.yaml").write_text(TINY)
    (checkout / "recipes" / "paper" / "tiny.yaml").write_text(TABLE.replace("small: ", "tiny: "))
    command = [sys.executable, "reproduce.py", "run", "tiny", "--protocol", "strong", "--seeds", "1"]
    command += ["--base_model", str(sources / "base")]
    runs = checkout / "outputs" / "tiny" / "paper"

    def run_to_the_end() -> dict:
        subprocess.run(command, cwd=checkout, check=True)
        found = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/metrics.json")}
        assert set(found) == {"sasrec-seed1", "teacher-base-seed1", "student-base-seed1"}
        return {name: (run["valid"], run["test"]) for name, run in found.items()}

    plan = [word if word != "run" else "plan" for word in command] + ["--calibrate"]  # from three steps of each run
    found = subprocess.run(plan, cwd=checkout, check=True, capture_output=True, encoding="utf-8").stdout
    assert re.search(r"^4 runs, \d+\.\d hours$", found, re.M), found
    uninterrupted = run_to_the_end()
    for path in [*runs.glob("teacher-*"), *runs.glob("student-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    started = subprocess.Popen(command, cwd=checkout, start_new_session=True)
    while not list(runs.glob("teacher-base-seed1/checkpoints/step-*")):
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not list(runs.glob("teacher-base-seed1/metrics.json"))
    assert run_to_the_end() == uninterrupted


@pytest.mark.pipeline
def test_the_commands_for_the_papers_own_cells(tmp_path):
    """As docs/reproduce.md prints them, on a small raw file, with a tiny LLaMA of 8 layers and fewer steps."""
    checkout = checkout_at(tmp_path / "checkout")
    base = tiny_sources(tmp_path, layers=8) / "base"
    recipe = checkout / "recipes" / "cloth.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("max_steps: 1500", "max_steps: 4"), encoding="utf-8")
    runs = checkout / "recipes" / "paper" / "runs.yaml"
    runs.write_text(runs.read_text(encoding="utf-8").replace("num_epochs: 50", "num_epochs: 2"), encoding="utf-8")
    rng = np.random.default_rng(0)
    lines = [
        {"overall": 5.0, "reviewerID": f"U{user}", "asin": f"I{item}", "unixReviewTime": 86400 * int(day)}
        for user in range(60)
        for day, item in enumerate(rng.permutation(20)[:10])
    ]
    raw = checkout / "datasets" / "raw" / "Clothing_Shoes_and_Jewelry_5.json.gz"
    raw.parent.mkdir()
    with gzip.open(raw, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8").split("## The paper's own cells")[1]
    commands = [
        shlex.split(line, comments=True) for line in re.search(r"```bash\n(.*?)```", page, re.S)[1].splitlines()
    ]
    assert len(commands) == 7
    printed = ""
    for words in commands:
        if words[2:4] in (["run", "table6"], ["run", "figure2"]):
            continue  # the same scripts with other flags, which another test checks
        if words[1] == "reproduce.py" and words[2] != "record":
            words += ["--base_model", str(base)]
        if words[2:4] == ["run", "table2"]:  # each of the other traditional models is trained by another test
            words += ["--rows", "SASRec", "E4SRec", "E4SRec_8", "E4SRec_4", "SLMRec_4<-8"]
        found = subprocess.run([sys.executable, *words[1:]], cwd=checkout, capture_output=True, encoding="utf-8")
        assert found.returncode == 0, found.stderr
        printed += found.stdout
    for row, paper in {"SASRec": "15.01", "E4SRec": "18.09", "E4SRec_8": "16.91", "E4SRec_4": "16.32"}.items():
        assert re.search(rf"^\| {row} +\| +1 \|( +\d+\.\d\d \|)+.* {paper} ", printed, re.M), row
    assert re.search(r"^\| SLMRec_4<-8 +\| +1 \|.* 18\.07 ", printed, re.M)
    assert re.search(r"^\| E4SRec +\| +\d+\.\d \(\d+\.\d\d\) .* 3\.95 \(6\.58\)", printed, re.M)


def test_output_that_nobody_reads_or_that_has_no_room_is_no_traceback():
    words = [sys.executable, "reproduce.py", "list"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert found.returncode == 2 and found.stderr.startswith("reproduce.py: No space left on device")
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    found = subprocess.run(words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, encoding="utf-8", env=env)
    os.close(write)
    assert found.returncode == 0 and not found.stderr
