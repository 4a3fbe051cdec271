"""The four steps on real data (80 users of MovieLens-100K) and the real SmolLM2-135M.

`work` runs them once, as processes that start in another folder than the checkout; the tests look at what they left,
kill others, load their results, and feed them bad input. What needs no process of its own is called in the process of
the tests: half of a short process goes into importing.
"""

import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, last_of_each
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, LlamaConfig, Qwen3NextConfig

import distill
from models.llm.storage import load_base, load_llm_rec
from models.sr import MODELS
from utils import assets, cli
from utils.candidates import SPLITS, draw_negatives
from utils.data import Sequences
from utils.errors import UserError
from utils.metrics import evaluate, metrics_from_ranks
from utils.run import Run

pytestmark = pytest.mark.pipeline
SCRIPTS = {"train_sr_trad": "sr", "extract_emb": "extract", "finetune": "teacher", "distill": "student"}
STEPS = {"sasrec": 24, "teacher": 12, "student": 12}
FAST = ["--eval_steps", "4", "--warmup_steps", "2", "--seed", "1", "--max_steps"]  # and how many


def start(script: str, *arguments: object, cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{script}.py"), *last_of_each(arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(script: str, *arguments: object, cwd: Path, **options) -> str:
    process = start(script, *arguments, cwd=cwd, **options)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def train(script: str, *arguments: object) -> None:
    """The same in the process of the tests, with the error line and the exit code of the shell."""
    cli.run(importlib.import_module(script).main, SCRIPTS[script], last_of_each(arguments), models=MODELS)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder with the dataset `small` and the runs sasrec, items, teacher (4 layers) and student (2 of 4)."""
    place = tmp_path_factory.mktemp("pipeline")
    real = assets.dataset_folder("ml-100k")
    names = [line.split("\t")[0] for line in (real / "items.tsv").read_text().splitlines()[1:]]
    items, offsets, times = (np.load(real / f"{name}.npy") for name in ("items", "offsets", "timestamps"))
    rows = ["user_id\titem_id\ttimestamp\n"]
    for user in range(80):
        for at in range(offsets[user], offsets[user + 1]):
            rows.append(f"{user}\t{names[items[at] - 1]}\t{times[at]}\n")
    (place / "small.tsv").write_text("".join(rows))
    command = [sys.executable, ROOT / "datasets/process.py", "interactions", "--input", place / "small.tsv"]
    command += ["--name", "small", "--output", place, "--timestamp", "timestamp"]
    subprocess.run(list(map(str, command)), check=True)
    for name, (script, arguments) in steps(place).items():
        run(script, *arguments, "--output_dir", place / name, cwd=place)
    return place


def steps(place: Path) -> dict[str, tuple[str, list]]:
    data = ["--dataset", place / "small"]
    many = ["--train_targets", 4, "--batch_size", 8, "--head_learning_rate", "1e-3", *FAST, STEPS["teacher"]]
    student = ["--num_layers", 2, "--num_blocks", 2, "--block_reduction", "mean", "--lambda_ms", 0.1]
    return {
        "sasrec": (
            "train_sr_trad",
            [*data, *FAST, STEPS["sasrec"], "--train_targets", "all", "--learning_rate", "3e-3"],
        ),
        "items": ("extract_emb", [*data, "--sr_dir", place / "sasrec"]),
        "teacher": ("finetune", [*data, *many, "--item_embeddings", place / "items", "--num_layers", 4]),
        "student": ("distill", [*data, *many, *student, "--teacher", place / "teacher"]),
    }


def tree(place: Path) -> dict[str, str]:
    files = (p for p in sorted(place.rglob("*")) if p.is_file())
    return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def metrics(folder: Path) -> dict:
    return {split: json.loads((folder / "metrics.json").read_text())[split] for split in SPLITS}


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name.endswith(".safetensors")}


# --- what a run leaves ---


def test_run_folders_are_complete(work):
    common = {"config.json", "metrics.json", "log.jsonl", "curve.png", "README.md", "items.jsonl", ".slmrec.lock"}
    common.add("ranks.safetensors")
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"}
    for name, own in {
        "sasrec": {"model.safetensors"},
        "teacher": {"rec_heads.safetensors"} | adapter,
        "student": {"rec_heads.safetensors"} | adapter,
    }.items():
        found = {path for path in tree(work / name) if not path.startswith("states/")}
        assert found == common | own
        report = json.loads((work / name / "metrics.json").read_text())
        assert set(report["test"]["sampled"]) == {"HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"}
        assert report["protocol"]["users"] == 80 and report["steps"] == STEPS[name] and report["best_step"] % 4 == 0
        assert report["environment"]["packages"]["torch"] and report["peak_memory_bytes"] > 1e8
        assert report["parameters"]["total"] >= report["parameters"]["trained"] > 0
        size = sum(path.stat().st_size for path in (work / name).rglob("*.safetensors"))
        assert size < 30e6, "the frozen base is never written"
    assert {p.suffix for p in work.rglob("*")}.isdisjoint({".pt", ".pth", ".bin", ".pkl"})


@pytest.mark.parametrize("name", ["sasrec", "teacher", "student"])
def test_the_ranks_of_the_users_are_kept(name, work):
    ranks = {kind: load_file(work / name / "ranks.safetensors")[f"test_{kind}"].numpy() for kind in ("sampled", "full")}
    assert {kind: metrics_from_ranks(found) for kind, found in ranks.items()} == metrics(work / name)["test"]


def test_each_step_inherits_from_its_predecessor_and_says_so(work, tmp_path, capsys):
    teacher, student = (json.loads((work / n / "config.json").read_text()) for n in ("teacher", "student"))
    for name in ("base_model", "lora_r", "max_seq_length", "train_targets", "dataset_fingerprint", "table_sha256"):
        assert teacher[name] == student[name]
    assert student["teacher_layers"] == 4 and teacher["item_dim"] == 128
    script, arguments = steps(work)["student"]
    train(script, *arguments, "--lora_r", 4, "--max_steps", 1, "--output_dir", tmp_path / "narrow")
    out = capsys.readouterr().out
    assert "inherited from" in out and "lora_alpha=16.0" in out and "overridden: lora_r=4 (was 16)" in out


def test_distillation_terms_are_in_the_log(work):
    """Fault 1, in the real process: every term is there and the shares of the gradient are told."""
    rows = [json.loads(line) for line in (work / "student" / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == STEPS["student"] and all(
        row[term] > 0 for row in trained for term in ("ce", "cos", "norm", "ms")
    )
    assert all(set(row["gradient_share"]) == {"ce", "cos", "norm", "ms"} for row in rows if "gradient_share" in row)


def test_the_frozen_teacher_is_untouched_and_its_states_are_reused(work, tmp_path, capsys):
    states = list((work / "teacher" / "states").glob("*.npy"))
    assert len(states) == 1
    before = tree(work / "teacher")
    script, arguments = steps(work)["student"]
    stamp = states[0].stat().st_mtime_ns
    train(script, *arguments, "--lambda_cos", 2, "--output_dir", tmp_path / "other")
    assert tree(work / "teacher") == before and states[0].stat().st_mtime_ns == stamp
    assert re.search(r"teacher states: \d+ MiB, .*\(found\)", capsys.readouterr().out)
    with open(states[0], "r+b") as file:  # one wrong bit
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    train(script, *arguments, "--output_dir", tmp_path / "other")
    assert "(damaged, computed anew)" in capsys.readouterr().out and tree(work / "teacher") == before


# --- kill and resume ---


@pytest.mark.parametrize("name", ["sasrec", "teacher", "student"])
def test_sigkill_and_resume_equal_the_uninterrupted_run(name, work, capsys):
    script, arguments = steps(work)[name]
    folder = work / f"{name}-killed"
    process = start(script, *arguments, "--output_dir", folder, cwd=work)
    while not list(folder.glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "metrics.json").exists()
    train(script, *arguments, "--output_dir", folder, "--resume", "auto")
    assert "continuing from step" in capsys.readouterr().out
    assert metrics(folder) == metrics(work / name) and weights(folder) == {
        path: digest for path, digest in weights(work / name).items() if not path.startswith("states/")
    }
    before = tree(folder)
    train(script, *arguments, "--output_dir", folder, "--resume", "auto")  # finished: nothing to do
    assert tree(folder) == before and "NDCG@10" in capsys.readouterr().out
    shutil.rmtree(folder)


# --- loading ---


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_saved_model_loads_from_its_folder_with_identical_scores(name, work):
    model = load_llm_rec(str(work / name))
    data = Sequences.load(work / "small")
    how = {"max_length": 30, "batch_size": 512}
    got = {split: evaluate(model, data, split, draw_negatives(data, split), **how)[0] for split in SPLITS}
    assert got == metrics(work / name)


READ_OUT = ["--read_out", "item", "--train_targets", "all", "--input_map", "mlp", "--normalize_items", "true"]
INHERITED = [
    "normalize_items",
    "read_out",
    "input_map",
    "item_output",
    "item_dropout",
    "state_dropout",
    "train_targets",
]
READ_OUT += ["--item_dropout", 0.1, "--state_dropout", 0.1]


@pytest.mark.parametrize("item_output", ["residual", "trained"])
def test_a_model_that_is_read_at_items_resumes_loads_and_teaches(item_output, work, tiny_base, tmp_path, monkeypatch):
    """A run that was interrupted, and one that was not; then its student, with its states stored and per batch."""
    more = [*READ_OUT, "--item_output", item_output, "--base_model", tiny_base, "--learning_rate", 0.01]
    save, saved = Run.save_checkpoint, []

    def interrupt(run: Run, *state) -> None:
        save(run, *state)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    for name in ("whole", "halves"):
        arguments = on_tiny("finetune", work, [*more, "--resume", "auto"], tmp_path / name)
        arguments[arguments.index("--max_steps") + 1], arguments[arguments.index("--eval_steps") + 1] = 4, 1
        if name == "halves":
            monkeypatch.setattr(Run, "save_checkpoint", interrupt)
            with pytest.raises(SystemExit):
                train("finetune", *arguments)
            monkeypatch.setattr(Run, "save_checkpoint", save)
        train("finetune", *arguments)
    assert weights(tmp_path / "whole") == weights(tmp_path / "halves")
    model, data = load_llm_rec(tmp_path / "whole"), Sequences.load(work / "small")
    assert not torch.equal(model.item_vectors(), model.table) and model.response_ids.shape[1] == 0
    options = {"max_length": 30, "batch_size": 512}
    got = {split: evaluate(model, data, split, draw_negatives(data, split), **options)[0] for split in SPLITS}
    assert got == metrics(tmp_path / "whole")

    taught = json.loads((tmp_path / "whole/config.json").read_text())
    told = []
    for other in ({}, {"item_output": "residual" if item_output == "trained" else "trained"}):
        one = (taught | {"num_layers": 1} | other, load_base(taught, tiny_base), tmp_path / "whole", told.append)
        student = distill.start_of_student(*one)
        assert torch.equal(student.item_vectors(), student.table if other else model.item_vectors())
        assert len(told) == bool(other)
    for kind in ("stored", "bfloat16", "per_batch"):
        student = on_tiny("distill", work, ["--teacher_states", kind], tmp_path / kind)
        student[student.index("--teacher") + 1] = tmp_path / "whole"
        train("distill", *student)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert {name: config[name] for name in INHERITED} == {name: taught[name] for name in INHERITED}
        assert load_llm_rec(tmp_path / kind).response_ids.shape[1] == 0
    logs = [(tmp_path / kind / "log.jsonl").read_text().splitlines() for kind in ("stored", "per_batch")]
    losses = [[row["loss"] for row in map(json.loads, log) if "loss" in row] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "whole/states").glob("*.npy"))
    assert len(sizes) == 2 and sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A base model folder of another depth, with the real tokenizer."""
    place = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    AutoModel.from_config(LlamaConfig(vocab_size=49152, **sizes)).save_pretrained(place)
    AutoTokenizer.from_pretrained(assets.base_model_path("smollm2-135m")).save_pretrained(place)
    return place


def test_an_adapter_on_a_base_of_another_depth_is_refused(work, tiny_base, tmp_path):
    """PEFT only warns."""
    with pytest.raises(UserError, match="num_hidden_layers"):
        load_llm_rec(work / "teacher", tiny_base)
    copy = tmp_path / "teacher"
    shutil.copytree(work / "teacher", copy)
    config = json.loads((copy / "config.json").read_text())
    for depth in (2, 6):
        (copy / "config.json").write_text(json.dumps(config | {"num_layers": depth}))
        with pytest.raises(UserError, match=f"do not fit {depth} layers"):
            load_llm_rec(copy, assets.base_model_path("smollm2-135m"))


def on_tiny(script: str, work: Path, more: list, folder: Path) -> list:
    """Arguments of a short run of two layers, or of one with its teacher beside it."""
    options = {"--dataset": work / "small", "--max_steps": 2, "--eval_steps": 2, "--output_dir": folder}
    if script == "finetune":
        options |= {"--item_embeddings": work / "items", "--num_layers": 2}
    else:
        options |= {"--teacher": folder.parent / "teacher", "--num_layers": 1, "--num_blocks": 1, "--lambda_ms": 0}
    return [*more, *(word for pair in options.items() for word in pair)]


def test_a_student_is_made_on_its_teachers_base_and_on_no_other(work, tiny_base, tmp_path, capsys, monkeypatch):
    """A base in a relative folder whose name could be a hub id, used again from elsewhere; then other weights in it."""
    base, other = tmp_path / "models/tiny", tmp_path / "models/other"
    shutil.copytree(tiny_base, base)
    AutoModel.from_config(AutoConfig.from_pretrained(base)).save_pretrained(other)
    monkeypatch.chdir(tmp_path)
    train("finetune", *on_tiny("finetune", work, ["--base_model", "models/tiny"], tmp_path / "teacher"))
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    assert config["base_model"] == str(base) and re.fullmatch("[0-9a-f]{64}", config["base_fingerprint"])
    student = on_tiny("distill", work, [], tmp_path / "student")
    monkeypatch.chdir(work)
    train("distill", *student)
    student_config = json.loads((tmp_path / "student/config.json").read_text())
    assert student_config["base_model"] == str(base)
    assert re.fullmatch("[0-9a-f]{64}", student_config["base_fingerprint"])  # of one layer, not of the teacher's two
    assert student_config["base_fingerprint"] != config["base_fingerprint"]

    (base / "model.safetensors").rename(tmp_path / "kept")
    shutil.copy(other / "model.safetensors", base)
    for folder in (tmp_path / "student", tmp_path / "teacher"):
        with pytest.raises(UserError, match="other weights, another tokenizer"):
            load_llm_rec(folder)
    how = {"place": tmp_path, "capsys": capsys, "monkeypatch": monkeypatch}
    refused("distill", *student, words="other weights, another tokenizer", **how)
    unfinished = tmp_path / "teacher-killed"
    shutil.copytree(tmp_path / "teacher", unfinished)
    (unfinished / "metrics.json").unlink()
    teacher = on_tiny("finetune", work, ["--base_model", base, "--resume", "auto"], unfinished)
    refused("finetune", *teacher, words="base_fingerprint", **how)

    shutil.copy(tmp_path / "kept", base / "model.safetensors")
    edit(tmp_path / "teacher/config.json", base_fingerprint=None)
    refused("distill", *student, words="early version, which had another prompt", **how)


def test_a_student_keeps_to_the_commit_of_its_teachers_base(work, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub, commits = tmp_path / "hub/models--org--tiny", ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree(tiny_base, hub / "snapshots" / commit)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_base)).save_pretrained(hub / "snapshots" / commits[1])
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(commits[0])
    train("finetune", *on_tiny("finetune", work, ["--base_model", "org/tiny"], tmp_path / "teacher"))
    (hub / "refs/main").write_text(commits[1])  # the model's authors go on
    train("distill", *on_tiny("distill", work, [], tmp_path / "student"))
    found = [json.loads((tmp_path / name / "config.json").read_text())["base_model"] for name in ("teacher", "student")]
    assert found == [f"org/tiny@{commits[0]}"] * 2
    histories = torch.tensor([[1, 2, 3]])
    vectors = [load_llm_rec(tmp_path / "student", given).user_vectors(histories) for given in (None, "org/tiny")]
    assert torch.equal(*vectors)


# --- bad input ---


def refused(script: str, *arguments: object, place: Path, words: str, capsys, monkeypatch) -> None:
    """One line with `words`, exit code 2, and not a byte below `place` has changed."""
    monkeypatch.chdir(place)
    before = tree(place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(script, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{script}.py: "), lines
    assert words in lines[0], lines[0]
    assert tree(place) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(path: Path, key: str) -> None:
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))


def spoil_table(path: Path, value: float, name: str = "items.weight") -> None:
    tensors = load_file(path)
    tensors[name][3].fill_(value)
    save_file(tensors, path)


NONE = lambda place: None  # noqa: E731
OTHER_WEIGHTS = lambda place: save_file({"a": torch.ones(1)}, place / "sasrec/model.safetensors")  # noqa: E731
BAD = {
    # name: (script, arguments, what is done to a copy of the work folder first, words of the message)
    "unknown flag": ("finetune", ["--learning_rte", 1], NONE, "did you mean --learning_rate"),
    "wrong type": ("distill", ["--num_blocks", "four"], NONE, "whole number"),
    "impossible value": ("train_sr_trad", ["--num_layers", 0], NONE, ">= 1"),
    "heads do not divide": ("train_sr_trad", ["--num_heads", 3], NONE, "does not divide"),
    "no such dataset": ("train_sr_trad", ["--dataset", "no-such"], NONE, "datasets/process.py"),
    "empty dataset": ("train_sr_trad", [], lambda p: np.save(p / "small/items.npy", np.zeros(0, "i4")), "is empty"),
    "truncated dataset": ("train_sr_trad", [], lambda p: cut(p / "small/items.npy"), "cannot be read"),
    "ids out of range": ("finetune", [], lambda p: edit(p / "small/dataset.json", items=9), "outside 1..9"),
    "a dataset's name that leads elsewhere": (
        "train_sr_trad",
        [],
        lambda p: edit(p / "small/dataset.json", name="../../elsewhere"),
        "no plain name",
    ),
    "damaged dataset.json": ("distill", [], lambda p: cut(p / "small/dataset.json"), "cannot be read"),
    "no trained recommender": ("extract_emb", [], lambda p: shutil.rmtree(p / "sasrec"), "train_sr_trad.py"),
    "unfinished recommender": ("extract_emb", [], lambda p: (p / "sasrec/metrics.json").unlink(), "train_sr_trad.py"),
    "truncated weights": ("extract_emb", [], lambda p: cut(p / "sasrec/model.safetensors"), "damaged"),
    "weights without the table": ("extract_emb", [], OTHER_WEIGHTS, "weights do not fit its flags"),
    "config without a model": (
        "extract_emb",
        [],
        lambda p: drop(p / "sasrec/config.json", "model"),
        "model None is not known",
    ),
    "metrics without test": ("extract_emb", [], lambda p: drop(p / "sasrec/metrics.json", "test"), "has no 'test'"),
    "model that is not known": ("extract_emb", [], lambda p: edit(p / "sasrec/config.json", model="gru"), "sasrec"),
    "table without its SHA-256": ("finetune", [], lambda p: drop(p / "items/config.json", "table_sha256"), "has no"),
    "NaN in the table": ("extract_emb", [], lambda p: spoil_table(p / "sasrec/model.safetensors", torch.nan), "NaN"),
    "no item table": ("finetune", [], lambda p: shutil.rmtree(p / "items"), "extract_emb.py"),
    "truncated item table": ("finetune", [], lambda p: cut(p / "items/item_embeddings.safetensors"), "damaged"),
    "item table changed since": (
        "finetune",
        [],
        lambda p: spoil_table(p / "items/item_embeddings.safetensors", 0.5, "item_table"),
        "changed since",
    ),
    "table of another dataset": (
        "finetune",
        [],
        lambda p: edit(p / "items/config.json", dataset_fingerprint="x"),
        "another dataset",
    ),
    "no such base model": ("finetune", ["--base_model", "/no/such/model"], NONE, "no model found"),
    "too many layers": ("finetune", ["--num_layers", 31], NONE, "the base model has 30 layers"),
    "no such layer": ("finetune", ["--num_layers", 2, "--layer_selection", "0,30"], NONE, "choose from 0..29"),
    "layers that contradict": ("finetune", ["--num_layers", 3, "--layer_selection", "0,1"], NONE, "--num_layers 2"),
    "no such layer of a student": ("distill", ["--layer_selection", "0,30"], NONE, "choose from 0..29"),
    "the teacher's own list": (
        "distill",
        [],
        lambda p: edit(p / "teacher/config.json", layer_selection="0,2,4,6"),
        "as in --layer_selection 0,2",
    ),
    "no such module": ("finetune", ["--lora_target_modules", "gate_proj,up"], NONE, "no linear module named up"),
    "bad targets": ("finetune", ["--train_targets", "some"], NONE, "last, all or a number"),
    "targets that are no digit": ("train_sr_trad", ["--train_targets", "²"], NONE, "last, all or a number"),
    "targets beyond 64 bits": ("train_sr_trad", ["--train_targets", "9" * 30], NONE, "last, all or a number"),
    "another base than the teacher's": ("distill", ["--base_model", "x"], NONE, "unknown flag --base_model"),
    "no teacher": ("distill", [], lambda p: shutil.rmtree(p / "teacher"), "finetune.py"),
    "a recommender for a teacher": ("distill", ["--teacher", "sasrec"], NONE, "no run of finetune.py"),
    "truncated adapter": (
        "distill",
        [],
        lambda p: cut(p / "teacher/adapter/adapter_model.safetensors"),
        "damaged",
    ),
    "truncated teacher of logits": (
        "distill",
        ["--lambda_kl", 1, "--kl_teacher", "sasrec"],
        lambda p: cut(p / "sasrec/model.safetensors"),
        "sasrec/model.safetensors is damaged",
    ),
    "damaged config": ("distill", [], lambda p: cut(p / "teacher/config.json"), "cannot be read"),
    "teacher of another dataset": (
        "distill",
        [],
        lambda p: edit(p / "teacher/config.json", dataset_fingerprint="x"),
        "another dataset",
    ),
    "student deeper than its teacher": ("distill", ["--num_layers", 8], NONE, "the teacher has 4 layers"),
    "blocks do not divide": ("distill", ["--num_blocks", 3], NONE, "does not divide"),
    "supervision of no block": ("distill", ["--num_blocks", 1, "--lambda_ms", 1], NONE, "--lambda_ms 0"),
    "output is the teacher": ("distill", ["--output_dir", "teacher"], NONE, "no run of this step"),
    "longer than the teacher": ("distill", ["--max_seq_length", 31], NONE, "the teacher reads 30 items"),
    "a teacher for a recommender": ("extract_emb", ["--sr_dir", "teacher"], NONE, "no run of train_sr_trad.py"),
    "no item table there": ("finetune", ["--item_embeddings", "sasrec"], NONE, "not written by extract_emb.py"),
    "a size that nothing could read again": (
        "train_sr_trad",
        ["--max_seq_length", 2**21],
        NONE,
        "--max_seq_length 2097152: at most 1,048,576",
    ),
    "output is a file": ("train_sr_trad", ["--output_dir", "small.tsv"], NONE, "is a file"),
    "output holds other things": ("train_sr_trad", ["--output_dir", "small"], NONE, "no run"),
    "table over a thesis": (
        "extract_emb",
        ["--output_dir", "items"],
        lambda p: (p / "items/thesis.txt").write_text("precious"),
        "holds something else (thesis.txt)",
    ),
    "table over another model's configuration": (
        "extract_emb",
        ["--output_dir", "other"],
        lambda p: ((p / "other").mkdir(), (p / "other/config.json").write_text('{"model_type": "bert"}')),
        "holds something else (config.json)",
    ),
    "a teacher that is being replaced": (
        "distill",
        [],
        lambda p: edit(p / "teacher/config.json", run_id="new"),
        "holds no finished teacher",
    ),
    "table over other things": ("extract_emb", ["--output_dir", "sasrec"], NONE, "holds something else"),
    "resume with other flags": (
        "train_sr_trad",
        ["--output_dir", "sasrec", "--resume", "auto", "--seed", 5],
        NONE,
        "resume never",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_touches_nothing(case, work, tmp_path, capsys, monkeypatch):
    script, arguments, spoil, words = BAD[case]
    place = tmp_path / "work"
    shutil.copytree(work, place)
    spoil(place)
    name = {"train_sr_trad": "sasrec", "extract_emb": "items", "finetune": "teacher", "distill": "student"}[script]
    usual = [str(word) for word in steps(place)[name][1]] + ["--output_dir", str(place / "new")]
    for at in range(0, len(arguments) - 1, 2):  # the case's flags replace the usual ones
        if arguments[at] in usual:
            del usual[usual.index(arguments[at]) : usual.index(arguments[at]) + 2]
    refused(script, *usual, *arguments, place=place, words=words, capsys=capsys, monkeypatch=monkeypatch)


def test_base_models_that_are_damaged_or_no_decoders_are_refused(work, tiny_base, tmp_path, capsys, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_base, damaged)
    cut(damaged / "model.safetensors")
    encoder = tmp_path / "encoder"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    AutoModel.from_config(BertConfig(vocab_size=99, **sizes)).save_pretrained(encoder)
    usual = [*steps(work)["teacher"][1][:-2], "--num_layers", 2, "--output_dir", tmp_path / "new"]
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_base, foreign)
    tensors = load_file(foreign / "model.safetensors")
    save_file({f"strange.{name}": value for name, value in tensors.items()}, foreign / "model.safetensors")
    bases = {
        "hybrid": Qwen3NextConfig(vocab_size=49152, num_experts=4, **sizes),
        "few": LlamaConfig(vocab_size=99, **sizes),
        "short": LlamaConfig(vocab_size=49152, max_position_embeddings=80, **sizes),
    }
    for name, config in bases.items():
        shutil.copytree(tiny_base, tmp_path / name)
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
    words_of = {damaged: "cannot be read", foreign: "its weights lack", encoder: "not a LLaMA-like decoder"}
    words_of |= {tmp_path / "hybrid": "not a LLaMA-like decoder", tmp_path / "few": "its embedding has 99 rows"}
    words_of |= {tmp_path / "short": "positions of 80"}
    for base, words in words_of.items():
        arguments = [*usual, "--base_model", base]
        refused("finetune", *arguments, place=work, words=words, capsys=capsys, monkeypatch=monkeypatch)
    assert not (tmp_path / "new").exists()


@contextmanager
def small_files() -> Iterator[None]:
    """No file above 100 KiB: what a full disk does to a process, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["sasrec", "items", "teacher", "student"])
def test_a_full_disk_gets_one_line_and_leaves_no_broken_file(name, work, tmp_path, capsys):
    script, arguments = steps(work)[name]
    if name == "student":  # its first large file are the teacher's states, beside the teacher
        shutil.copytree(work / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("states"))
        before = tree(tmp_path)
        arguments = [*arguments[:-1], tmp_path / "teacher"]
    with small_files(), pytest.raises(SystemExit) as stop:
        train(script, *arguments, "--output_dir", tmp_path / "new")
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{script}.py")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert "free space" in lines[0]
    assert not list(tmp_path.rglob("*.part"))
    assert tree(tmp_path) == before if name == "student" else not list(tmp_path.rglob("*.safetensors"))


# --- installation ---


def test_what_is_cached_needs_no_network(work, monkeypatch):
    monkeypatch.setattr(assets, "extract", lambda *args: pytest.fail("the network was asked"))
    assert (assets.dataset_folder("ml-100k") / "dataset.json").is_file()
    assert (Path(assets.base_model_path("smollm2-135m")) / "model.safetensors").is_file()


def test_runs_beside_an_installed_datasets_package(work, tmp_path):
    """Our folder datasets/ and Hugging Face's package of that name: it runs with the package and without.

    The package is a stand-in with what transformers and accelerate look at, its metadata and two classes. Any other use
    of the name, such as an import of our folder as a package, fails beside it.
    """
    site = tmp_path / "site"
    for file, content in {
        "datasets/__init__.py": "class Dataset: ...\nclass IterableDataset: ...\n",
        "datasets-4.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n",
    }.items():
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text(content, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from accelerate.utils import is_datasets_available; "
    code += "import transformers.trainer as trainer; print(is_datasets_available(), trainer.datasets.__file__)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["True", str(site / "datasets/__init__.py")], found.stderr  # it wins over our folder
    for name in ("sasrec", "teacher"):
        script, arguments = steps(work)[name]
        out = run(script, *arguments, "--max_steps", 1, "--output_dir", tmp_path / name, cwd=tmp_path, env=environment)
        assert "NDCG@10" in out
    assert not (ROOT / "datasets" / "__init__.py").exists()
