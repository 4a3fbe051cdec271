"""The training loop: resuming, accumulation, selection, schedules, refusals. Real kills are in test_pipeline.py."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, make_sequences, tiny_llm_rec
from kills import contents
from transformers import get_scheduler

from models import losses
from models.slmrec import SLMRec
from models.sr.sasrec import SASRec
from utils.candidates import draw_negatives
from utils.catalogue import Catalogue
from utils.checked import load_tensors
from utils.data import training_examples
from utils.errors import RunError, UserError
from utils.files import check_space, save_tensors
from utils.flags import FORMER_DEFAULTS
from utils.metrics import SelectBy
from utils.report import closing_table, comparison, finished_runs, git_commit, protocol
from utils.run import LOCK, Run
from utils.train import Loop, fit, gradient_shares, rate_factor

CONFIG = {
    "dataset": "synthetic",
    "max_seq_length": 8,
    "batch_size": 16,
    "micro_batch_size": None,
    "eval_batch_size": 64,
    "num_epochs": 4.0,
    "max_steps": -1,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "warmup_steps": 3,
    "lr_scheduler": "cosine",
    "max_grad_norm": 1.0,
    "eval_steps": 4,
    "select_by": "sampled/NDCG@10",
    "patience": None,
    "seed": 7,
    "dtype": "float32",
    "resume": "never",
    "report_to": "none",
    "kind": "sr",
    "title": "SASRec",
}


class Interrupted(Exception):
    pass


class Model(SASRec):
    """SASRec with a fuse: raises, or spoils its loss, in the given training step."""

    def __init__(self, dropout: float = 0.3, raise_at: int = -1, spoil_at: int = -1):
        config = SASRec.Config(item_dim=16, max_seq_length=8, num_layers=1, num_heads=2, dropout=dropout)
        super().__init__(config, make_sequences().training_part())
        self.calls, self.raise_at, self.spoil_at = 0, raise_at, spoil_at

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.raise_at:
            raise Interrupted
        terms = super().forward(batch)
        return {"ce": terms["ce"], "other": terms["ce"] * (torch.nan if self.calls == self.spoil_at else 0.5)}


def train(folder, model_options=None, data=None, **changes):
    data = data or make_sequences(users=80)
    run = Run(CONFIG | {"output_dir": str(folder)} | changes, data, "unused")
    model = Model(**(model_options or {}))
    state = fit(run, model, training_examples(data, "all", 8))
    return run, model, state


def finish(run, model, state):
    run.finish(
        model, state, {"total": 1, "trained": 1}, lambda f: save_tensors(model.state_dict(), f / "model.safetensors")
    )


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("at", [2, 4, 5, 7, 9, 19])
def test_an_interrupted_run_continues_exactly(at, tmp_path):
    _, whole, expected = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", {"raise_at": at})
    _, resumed, state = train(tmp_path / "cut", resume="auto")
    done = at - 1
    saved = max(done // 4 * 4, done // 5 * 5)  # evaluated every four steps; five steps are an epoch
    assert same(whole, resumed) and resumed.calls == expected["step"] - saved
    assert state["evaluations"] == expected["evaluations"] and state["best_step"] == expected["best_step"]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    rows = [[json.loads(line) | {"samples_per_second": 0} for line in log] for log in logs]
    assert rows[0] == rows[1]


class Staged(Model):
    """Two epochs of pre-training, which uses weights of its own, and leaves one to the training."""

    def __init__(self, raise_at: int = -1):
        super().__init__(raise_at=raise_at)
        self.early, self.late = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))

    def stages(self):
        return [("pretrain", 1.6)]

    def batch(self, examples, index, rng):
        return super().batch(examples, index, rng) | {"noise": torch.from_numpy(rng.random((3, 3))).float()}

    def forward(self, batch):
        self.seen = [*getattr(self, "seen", []), self.stage]
        weights = self.early if self.stage == "pretrain" else self.late
        return super().forward(batch) | {self.stage: (batch["noise"] @ weights).square().sum()}


@pytest.mark.parametrize("at", [2, 7, 10, 14, 20])  # pre-training is steps 1 to 8
def test_a_run_with_stages_continues_exactly_within_each(at, tmp_path):
    """Adam counts the steps of each weight by itself: `late` has none before the ninth."""
    data, options, found = make_sequences(users=80), CONFIG | {"num_epochs": 3.0}, {}
    for name, cut in (("whole", -1), ("cut", at), ("cut", -1)):
        resume = {"output_dir": str(tmp_path / name), "resume": "auto" if name in found else "never"}
        found[name], run, model = None, Run(options | resume, data, "unused"), Staged(cut)
        try:
            state = fit(run, model, training_examples(data, "all", 8))
            found[name] = model, state["evaluations"], rows_of(tmp_path / name)
            finish(run, model, state)  # draws the terms of each stage
        except Interrupted:
            assert cut > 0
    whole, cut = found["whole"], found["cut"]
    assert same(whole[0], cut[0]) and whole[1:] == cut[1:]
    assert whole[0].seen == ["pretrain"] * 8 + ["train"] * 15 and min(e["step"] for e in whole[1]) > 8
    rates = [row["lr"] for row in whole[2] if "lr" in row]
    assert rates[0] == rates[8] == 0 and rates[3] == rates[11] == CONFIG["learning_rate"]  # a warm-up each


def rows_of(folder) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"samples_per_second": 0} for line in lines]


def test_each_stage_has_its_own_steps_and_an_adam_that_knows_no_other(tmp_path, monkeypatch):
    real, taken = Loop.one_step, []

    def one_step(self, step):
        row = real(self, step)
        taken.append({int(of["step"]) for of in self.optimizer.state.values() if of})
        return row

    monkeypatch.setattr(Loop, "one_step", one_step)
    run = Run(CONFIG | {"output_dir": str(tmp_path / "a"), "max_steps": 3}, make_sequences(users=80), "unused")
    examples = training_examples(make_sequences(users=80), "all", 8)
    fit(run, Staged(), examples)
    assert taken == [{1}, {2}, {3}, {1}, {2}, {3}]


def test_a_kill_between_checkpoint_and_evaluation_loses_nothing(tmp_path, monkeypatch):
    _, whole, expected = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "select", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            train(tmp_path / "cut")
    _, resumed, state = train(tmp_path / "cut", resume="auto")
    assert same(whole, resumed) and state["evaluations"] == expected["evaluations"]


def test_two_runs_with_one_seed_are_identical_and_other_seeds_differ(tmp_path):
    _, a, _ = train(tmp_path / "a")
    _, b, _ = train(tmp_path / "b")
    _, c, _ = train(tmp_path / "c", seed=8)
    assert same(a, b) and not same(a, c)


def test_batch_size_takes_effect(tmp_path):
    """Fault 6: in the released code batch_size has none."""
    steps = {size: train(tmp_path / str(size), batch_size=size, num_epochs=1.0)[2]["step"] for size in (8, 16, 100)}
    examples = len(training_examples(make_sequences(users=80), "all", 8))
    assert steps == {size: -(-examples // size) for size in steps}


@pytest.mark.parametrize("micro", [1, 5])
def test_accumulation_keeps_the_global_batch(micro, tmp_path):
    """Micro-batches with unequal numbers of targets add up to the gradient of the mean over the whole batch."""
    examples = training_examples(make_sequences(users=80), "all", 8)
    index = np.arange(16)
    assert len(set(examples.num_targets[index])) > 3
    found = []
    for size in (None, micro):
        run = Run(CONFIG | {"output_dir": str(tmp_path / "a"), "micro_batch_size": size}, make_sequences(), "unused")
        model = Model(dropout=0.0)
        trained = dict(model.named_parameters())
        loop = Loop(run, model, examples)
        loop.wrapped = model
        terms = loop.backward(index, 0, shares=False)
        found.append((terms, torch.cat([p.grad.flatten() for p in trained.values()])))
    (whole_terms, whole), (terms, gradient) = found
    assert terms == pytest.approx(whole_terms) and (gradient - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("strategy", ["lora", "full", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_share_the_prompt_prefix(dtype, strategy, tmp_path):
    """The prefix runs once per step, and the gradient is that of the whole batch."""
    examples, index, found = training_examples(make_sequences(users=80), "all", 8), np.arange(16), []
    model = tiny_llm_rec(train_strategy=strategy)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, through = model.base.layers[0], []
    first.register_forward_hook(lambda module, args, output: through.append(output.shape[1]))
    for size in (None, 5):
        flags = {"output_dir": str(tmp_path / "a"), "micro_batch_size": size, "dtype": dtype}
        run = Run(CONFIG | flags, make_sequences(), "unused")
        model.to(run.accelerator.device)
        through.clear()
        loop = Loop(run, model, examples)
        loop.wrapped = model
        terms = loop.backward(index, 0, shares=False)
        found.append((terms, torch.cat([p.grad.flatten() for p in trained.values()]), list(through)))
        model.zero_grad(set_to_none=True)
        assert model.kept_prefix is None
    (whole_terms, whole, one_pass), (terms, gradient, passes) = found
    tolerance = 1e-5 if dtype == "float32" else 0.02  # bfloat16 has 8 bits
    assert terms == pytest.approx(whole_terms, rel=tolerance) and (gradient - whole).norm() < tolerance * whole.norm()
    assert len(one_pass) == 1 and len(passes) == 5 and passes[0] == 11 and sum(passes) == one_pass[0]


def test_the_weights_that_did_best_on_validation_are_left_in_the_model(tmp_path, capsys):
    """By whichever metric is asked for; they do not agree on the step."""
    best_steps = {}
    for number, metric in enumerate(get_args(SelectBy)):
        kind, name = metric.split("/")
        changes = {} if metric == CONFIG["select_by"] else {"select_by": metric}
        run, model, state = train(tmp_path / str(number), learning_rate=0.1, num_epochs=6.0, **changes)
        values = {e["step"]: e["metrics"][kind][name] for e in state["evaluations"]}
        assert state["best_step"] == max(values, key=values.get) and len(values) == -(-state["step"] // 4)
        metrics, _ = run.evaluate(model, "valid")
        assert metrics[kind][name] == max(values.values())
        assert f"valid {kind} {name} {max(values.values()):.4f} (best)" in capsys.readouterr().out
        best_steps[metric] = state["best_step"]
    assert len(best_steps) == 12 and set(best_steps.values()) > {best_steps["sampled/NDCG@10"]}
    finish(run, model, state)
    written = json.loads((run.folder / "metrics.json").read_text())
    assert written["selected_by"] == "valid full MRR" and "(valid full MRR)" in (run.folder / "README.md").read_text()


# --- early stopping ---

FICKLE = {"learning_rate": 0.1, "num_epochs": 8.0, "eval_steps": 3}


@pytest.mark.parametrize(("patience", "idle"), [(4, False), (5, True)])
def test_patience_without_effect_is_told(patience, idle, tmp_path, capsys):
    """Evaluations after steps 3, 6, 9, 12, 15 and 16: what comes with the last one stops nothing."""
    train(tmp_path / "a", patience=patience, eval_steps=3, num_epochs=3.2, max_steps=16)
    told = f"--patience {patience} has no effect: 6 evaluations are planned" in capsys.readouterr().out
    assert told == idle


def step_of_stop(evaluations: list[dict], patience: int) -> int:
    best, since = -1.0, 0
    for evaluation in evaluations:
        value = evaluation["metrics"]["sampled"]["NDCG@10"]
        best, since = (value, 0) if value > best else (best, since + 1)
        if since == patience:
            break
    return evaluation["step"]


@pytest.fixture(params=[[], [("pretrain", 1.5)]], ids=["one stage", "pre-training"])
def patient(request, tmp_path, monkeypatch):
    """stop(name, ...): train with FICKLE, after these stages."""
    monkeypatch.setattr(Model, "stages", lambda self: request.param)
    return lambda name, *model_options, **changes: train(tmp_path / name, *model_options, **FICKLE | changes)


def test_patience_stops_where_a_replay_of_the_validation_values_says(patient, capsys):
    _, _, whole = patient("whole")
    stops = {patience: step_of_stop(whole["evaluations"], patience) for patience in (1, 2, 3, 99)}
    assert stops[1] < stops[2] < stops[99] == whole["step"]
    for patience, stop in stops.items():
        capsys.readouterr()
        run, model, state = patient(str(patience), patience=patience)
        kept = [e for e in whole["evaluations"] if e["step"] <= stop]
        assert state["step"] == stop and state["evaluations"] == kept
        said = f"stopped early (--patience {patience}), {whole['step']} steps were planned"
        assert (said in capsys.readouterr().out) == (stop < whole["step"])
        rates = [
            [row["lr"] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "lr" in row]
            for folder in (run.folder, run.folder.parent / "whole")
        ]
        assert rates[0] == rates[1][:stop]  # the schedule is that of the full length
        finish(run, model, state)
        written = json.loads((run.folder / "metrics.json").read_text())
        assert (written["steps"], written["planned_steps"]) == (stop, whole["step"])
        assert written["stopped_early"] == ("stopped early" in (run.folder / "README.md").read_text())
        assert written["stopped_early"] == (stop < whole["step"])
        before = contents(run.folder)
        assert Run(run.config | {"resume": "auto"}, run.data, "unused").finished and contents(run.folder) == before


def test_every_device_goes_by_the_metrics_of_the_first(tmp_path, monkeypatch):
    """Or one would stop while another waits for it."""
    _, _, first = train(tmp_path / "first", **FICKLE, patience=2)
    told = iter([e["metrics"] for e in first["evaluations"]])
    monkeypatch.setattr("utils.train.broadcast_object_list", lambda own: [next(told)])
    _, _, other = train(tmp_path / "other", **FICKLE, patience=2, seed=8)
    assert other["step"] == first["step"] and other["best_step"] == first["best_step"]


def test_a_run_that_stops_early_continues_exactly(patient, tmp_path, monkeypatch):
    _, whole, expected = patient("whole", patience=2)
    assert expected["step"] < expected["planned_steps"]
    select, counted = Loop.select, []

    def last_evaluation_killed(loop):
        counted.append(loop)
        if len(counted) == len(expected["evaluations"]):
            raise Interrupted
        select(loop)

    for at in range(2, expected["step"] + 1, 3):
        with pytest.raises(Interrupted):
            patient(f"cut-{at}", {"raise_at": at}, patience=2)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "select", last_evaluation_killed)
        with pytest.raises(Interrupted):
            patient("cut-evaluation", patience=2)
    patient("cut-finish", patience=2)  # killed before its results are written
    cuts = sorted(tmp_path.glob("cut-*"))
    assert len(cuts) > 4
    for folder in cuts:
        _, resumed, state = patient(folder.name, patience=2, resume="auto")
        assert same(whole, resumed) and state["step"] == expected["step"]
        assert state["evaluations"] == expected["evaluations"] and state["best_step"] == expected["best_step"]


@pytest.mark.parametrize("name", FORMER_DEFAULTS)
def test_a_run_of_a_version_without_a_flag_goes_on_as_it_did(name, tmp_path):
    train(tmp_path / "a", max_steps=1, **{name: FORMER_DEFAULTS[name]})
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop(name) == FORMER_DEFAULTS[name]
    path.write_text(json.dumps(config))
    train(tmp_path / "a", max_steps=1, resume="auto", **{name: FORMER_DEFAULTS[name]})
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name}={FORMER_DEFAULTS[name]}, not another"):
        train(tmp_path / "a", max_steps=1, resume="auto", **{name: "another"})


# --- weight decay ---


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize("head_learning_rate", [None, 3e-3])
def test_norms_and_biases_have_no_weight_decay(head_learning_rate, optimizer, tmp_path):
    """One step of AdamW by hand, in float64, and one of Adam, which adds the decay to the gradient."""
    flags = {"weight_decay": 0.1, "warmup_steps": 0, "head_learning_rate": head_learning_rate, "optimizer": optimizer}
    run = Run(CONFIG | flags | {"output_dir": str(tmp_path / "a")}, make_sequences(), "unused")
    model, rng = tiny_llm_rec(train_strategy="full"), np.random.default_rng(0)
    loop = Loop(run, model, training_examples(make_sequences(), "last", 8))
    loop.set_stage(0)
    seen = set()
    for name, parameter in loop.trained.items():
        parameter.grad = torch.from_numpy(rng.normal(size=parameter.shape)).float()
        decay = 0.0 if "norm" in name or name.endswith(".bias") else 0.1
        is_head = name.startswith(("input_proj.", "score."))
        rate = head_learning_rate if is_head and head_learning_rate else CONFIG["learning_rate"]
        seen.add((decay, rate))
        weight, gradient = parameter.detach().numpy().astype(float), parameter.grad.numpy().astype(float)
        if optimizer == "adam":
            gradient, decay = gradient + decay * weight, 0.0
        parameter.expected = weight * (1 - rate * decay) - rate * gradient / (np.abs(gradient) + 1e-8)
    loop.optimizer.step()
    assert len(seen) == (4 if head_learning_rate else 2)
    for name, parameter in loop.trained.items():
        np.testing.assert_allclose(parameter.detach().numpy(), parameter.expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("warmup", "told"), [(2, True), (1, False)])
def test_a_warm_up_as_long_as_the_training_is_told(warmup, told, tmp_path, capsys):
    train(tmp_path / "a", max_steps=2, warmup_steps=warmup)
    assert (f"--warmup_steps {warmup} of the 2 steps of train: " in capsys.readouterr().out) == told


def test_schedule_is_warm_up_and_cosine(tmp_path):
    _, _, state = train(tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    schedule = get_scheduler("cosine", optimizer, 3, state["step"])
    expected = []
    for _ in range(state["step"]):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected) and max(rates) == pytest.approx(1e-2)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(kind):
    """To the last bit, so that a run of before ends in the same digits."""
    for warmup, total in itertools.product([0, 1, 3, 100], [1, 2, 87, 716]):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        name = "constant_with_warmup" if kind == "constant" else kind
        expected = get_scheduler(name, optimizer, warmup, total).lr_lambdas[0]
        for step in range(total):
            assert rate_factor(kind, warmup, total, step) == expected(step), (warmup, total, step)


def test_step_1_starts_without_transformers():
    """Which takes longer to import than all else that it needs."""
    code = "import sys, train_sr_trad; print({'transformers', 'peft'} & set(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert got.stdout == "set()\n", got.stdout + got.stderr


@pytest.mark.parametrize("head_learning_rate", [None, 1e-4])
def test_the_heads_may_have_a_learning_rate_of_their_own(head_learning_rate, tmp_path, monkeypatch):
    """Both rates warm up and decay; under Adam a step's largest move is about the rate, whatever the gradient."""
    flags = {"max_steps": 8, "warmup_steps": 2, "eval_steps": 8, "head_learning_rate": head_learning_rate}
    data = make_sequences(users=80)
    run = Run(CONFIG | flags | {"output_dir": str(tmp_path / "a")}, data, "unused")
    weights = {"lambda_cos": 0, "lambda_norm": 0, "lambda_ms": 1, "norm_form": "l2", "block_reduction": "mean"}
    model = SLMRec(tiny_llm_rec(), num_blocks=2, **weights)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *rest):
        before = {name: p.detach().clone() for name, p in trained.items()}
        step(self, *rest)
        seen.append({name: (p - before[name]).abs().max().item() for name, p in trained.items()})

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(run, model, training_examples(data, "last", 8))
    factors = [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6))]
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "lr" in row]
    own = head_learning_rate or CONFIG["learning_rate"]
    assert [row["lr"] for row in rows] == pytest.approx([CONFIG["learning_rate"] * f for f in factors])
    assert [row.get("head_lr", row["lr"]) for row in rows] == pytest.approx([own * f for f in factors])
    for name in trained:
        is_head = name.startswith(("student.input_proj.", "student.score.", "ms_heads."))
        rate = own if is_head else CONFIG["learning_rate"]
        assert seen[0][name] == 0
        for moved, factor in zip(seen[1:], factors[1:], strict=True):
            assert 0.2 * rate * factor < moved[name] < 3 * rate * factor, name


@pytest.mark.parametrize(("at", "saved"), [(2, "none yet"), (7, "step-00000005")])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(at, saved, tmp_path):
    with pytest.raises(RunError) as stop:
        train(tmp_path / "a", {"spoil_at": at})
    message = str(stop.value)
    assert f"step {at}:" in message and "term other" in message and saved in message
    if at > 4:
        saved_weights = load_tensors(tmp_path / "a" / "checkpoints" / saved / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in saved_weights.values())


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-8]), Path.unlink])
def test_damaged_weights_of_the_best_step_are_told_before_more_is_trained(damage, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", {"raise_at": 7})
    damage(tmp_path / "a" / "checkpoints" / "best" / "model.safetensors")
    with pytest.raises((UserError, OSError), match="best"):
        train(tmp_path / "a", {"raise_at": 1}, resume="auto")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-8]), Path.unlink])
def test_a_finished_run_that_lost_its_weights_is_not_left_as_finished(damage, tmp_path):
    finish(*train(tmp_path / "a"))
    damage(tmp_path / "a" / "model.safetensors")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    config = CONFIG | {"output_dir": str(tmp_path / "a")}
    with pytest.raises(UserError, match=r"model\.safetensors is .*--resume never"):
        Run(config | {"resume": "auto"}, make_sequences(users=80), "unused")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json cannot be read .*--resume never"):
        Run(config | {"resume": "auto"}, make_sequences(users=80), "unused")
    assert not Run(config, make_sequences(users=80), "unused").finished


def test_a_run_keeps_the_catalogue_that_it_was_trained_on(tmp_path):
    data = replace(make_sequences(users=80), folder=tmp_path / "data")
    data.folder.mkdir()
    (data.folder / "dataset.json").write_text("{}")
    ids = [str(item) for item in range(data.num_items)]
    (data.folder / "items.tsv").write_text("\n".join(["item_id\ttitle", *(f"{name}\told" for name in ids), ""]))
    trained = train(tmp_path / "a", data=data)
    (data.folder / "items.tsv").write_text("item_id\ttitle\n0\tnew\n")
    finish(*trained)
    kept = Catalogue.load(tmp_path / "a")
    assert kept.ids == ids and set(kept.titles) == {"old"}


def test_every_term_is_logged_by_name_with_its_share_of_the_gradient(tmp_path):
    train(tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["ce"] + row["other"]) for row in steps)
    shares = [row["gradient_share"] for row in rows if "gradient_share" in row]
    assert shares and all(s["ce"] == pytest.approx(2 / 3, abs=1e-4) for s in shares)


def test_gradient_shares_equal_the_norms():
    a, b = torch.nn.Parameter(torch.tensor([3.0])), torch.nn.Parameter(torch.tensor([1.0]))
    terms = {"one": 3 * a.sum() + 4 * b.sum(), "two": 15 * a.sum()}
    assert gradient_shares(terms, {"a": a, "b": b}) == pytest.approx({"one": 0.25, "two": 0.75})


def test_a_finished_run_is_left_alone_and_another_configuration_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.report.git_commit", lambda: "a" * 40)
    finish(*train(tmp_path / "a"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    held = {
        "config.json",
        "metrics.json",
        "model.safetensors",
        "log.jsonl",
        "curve.png",
        "README.md",
        "items.jsonl",
        "ranks.safetensors",
        LOCK,
    }
    assert held == set(before)
    data = make_sequences(users=80)
    config = CONFIG | {"output_dir": str(tmp_path / "a"), "resume": "auto"}
    for now, words in (
        ("a", "left as it is\n"),
        ("b", f"the code has changed, it is at {'b' * 40} now: --resume never"),
    ):
        monkeypatch.setattr("utils.run.git_commit", lambda now=now: now * 40)
        capsys.readouterr()
        assert Run(config, data, "unused").finished
        told = capsys.readouterr().out
        assert f"finished, at commit {'a' * 40}, and left as it is" in told and words in told
    with pytest.raises(UserError, match=r"learning_rate=0.01, not 0.5"):
        Run(config | {"learning_rate": 0.5}, data, "unused")
    with pytest.raises(UserError, match="dataset_fingerprint"):
        Run(config, make_sequences(users=80, seed=1).__class__(**(vars(data) | {"fingerprint": "x"})), "unused")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert not Run(config | {"resume": "never"}, data, "unused").finished


def test_a_kill_in_the_last_clean_up_leaves_no_checkpoints_for_ever(tmp_path):
    finish(*train(tmp_path / "a"))
    (tmp_path / "a" / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert Run(CONFIG | {"output_dir": str(tmp_path / "a"), "resume": "auto"}, make_sequences(users=80), "").finished
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_files_of_others_in_a_run_folder_stay(tmp_path):
    finish(*train(tmp_path / "a"))
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    (tmp_path / "a" / ".notes.part").write_text("precious")
    finish(*train(tmp_path / "a", seed=8))
    assert (tmp_path / "a" / "thesis.txt").read_text() == (tmp_path / "a" / ".notes.part").read_text() == "precious"


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    """In the middle of the first one's training, before and after its own checks."""
    data, refused = make_sequences(users=80), []

    class Watched(Model):
        def forward(self, batch):
            if not refused:
                for attempt in (lambda: Run(config, data, ""), early.start):
                    with pytest.raises(UserError, match="another process is training in"):
                        attempt()
                    refused.append(contents(tmp_path))
            return super().forward(batch)

    config = CONFIG | {"output_dir": str(tmp_path / "a"), "seed": 9}
    early = Run(config, data, "")  # looked at the folder before the first one took it
    run = Run(CONFIG | {"output_dir": str(tmp_path / "a")}, data, "")
    before_the_first_step = contents(tmp_path)
    state = fit(run, Watched(), training_examples(data, "all", 8))
    assert not before_the_first_step and refused[0] == refused[1]
    with pytest.raises(UserError, match="another process is training in"):
        early.start()  # the first has not written its results yet
    finish(run, Model(), state)
    assert not Run(config, data, "").finished  # free again
    auto = Run(CONFIG | {"output_dir": str(tmp_path / "b"), "resume": "auto"}, data, "")
    finish(*train(tmp_path / "b"))
    with pytest.raises(UserError, match="has finished"):  # a finished run is not trained over
        auto.start()


def test_sizes_that_only_cost_memory_may_change_on_resume(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", {"raise_at": 9})
    run, _, state = train(tmp_path / "a", resume="auto", micro_batch_size=3, eval_batch_size=5)
    assert state["starts"][-1]["step"] == 8 and run.config["micro_batch_size"] == 3
    with pytest.raises(UserError, match="batch_size=16, not 8"):
        Run(CONFIG | {"output_dir": str(tmp_path / "a"), "resume": "auto", "batch_size": 8}, run.data, "")


def test_a_commit_is_dirty_where_tracked_code_differs_and_not_where_records_do(tmp_path, monkeypatch):
    def git(*arguments):
        named = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *named, *arguments], check=True, capture_output=True, text=True
        )

    monkeypatch.setattr("utils.report.ROOT", tmp_path)
    assert git_commit() == "unknown"
    for name in ("a.py", "results/runs.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "Begin")
    commit = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "results" / "runs.json").write_text("2")
    (tmp_path / "new.py").write_text("2")
    assert git_commit() == commit
    (tmp_path / "a.py").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_every_start_of_a_run_is_recorded(tmp_path, monkeypatch):
    commits = iter("abc")
    monkeypatch.setattr("utils.report.git_commit", lambda: next(commits))
    for at in (6, 5):
        with pytest.raises(Interrupted):
            train(tmp_path / "a", {"raise_at": at}, resume="auto")
    finish(*train(tmp_path / "a", resume="auto"))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert [(start["step"], start["git_commit"]) for start in metrics["starts"]] == [(0, "a"), (5, "b"), (8, "c")]
    assert metrics["environment"] == {k: v for k, v in metrics["starts"][-1].items() if k != "step"}
    assert all(start["command"] and start["packages"]["torch"] for start in metrics["starts"])


def test_records_say_how_many_negatives_users_really_had(tmp_path):
    """40 items, of which users touched 3 to 12; one touched all."""
    data = make_sequences(users=80)
    items, offsets = np.concatenate([data.items, np.arange(1, 41)]), np.append(data.offsets, len(data.items) + 40)
    data = type(data)("synthetic", items.astype(np.int32), offsets, 40, np.arange(81), data.fingerprint)
    counts = [40 - len(set(items[offsets[u] : offsets[u + 1]].tolist())) for u in range(81)]
    assert (np.count_nonzero(draw_negatives(data, "test"), axis=1) == counts).all()
    found = protocol(data, 8)
    assert found["negatives"] == {"fewest": 0, "most": max(counts), "mean": pytest.approx(sum(counts) / 81)}
    assert found["users_without_negatives"] == 1 and f"0 to {max(counts)} (not 999) negatives" in found["sampled"]
    enough = protocol(make_sequences(users=20, num_items=2000), 8, num=900)
    assert "1 positive and 900 negatives" in enough["sampled"] and enough["users_without_negatives"] == 0


def test_the_closing_table_leaves_out_what_does_not_belong(tmp_path):
    finish(*train(tmp_path / "good"))
    alone, fingerprint = comparison(finished_runs(tmp_path, "0" * 64)[0]), "0" * 64
    (tmp_path / "stranger").mkdir()
    for name in ("config.json", "metrics.json"):
        (tmp_path / "stranger" / name).write_text("{}")
    damages = {
        "older": ("config.json", {"dataset_fingerprint": "f" * 64}),
        "lacking": ("metrics.json", {"test": {}}),
        "odd": ("metrics.json", {"seconds": "many"}),
        "replaced": ("config.json", {"run_id": "another"}),
        "cut": ("metrics.json", None),
        "torn": ("config.json", None),
        "deep": ("metrics.json", "[" * 100_000),
    }
    for name, (file, changes) in damages.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        path = tmp_path / name / file
        text = path.read_text()
        changed = json.dumps(json.loads(text) | changes) if isinstance(changes, dict) else changes
        path.write_text(changed or text[:50])
    table = closing_table(tmp_path, fingerprint).splitlines()
    assert "\n".join(table[len(damages) :]) == alone and "SASRec (good)" in alone
    for line, name in zip(table, sorted(damages), strict=False):
        assert line.startswith(f"left out of the table, {tmp_path / name}: "), line
    words = {name: line for line, name in zip(table, sorted(damages), strict=False)}
    assert (
        "another dataset" in words["older"]
        and "not finished" in words["replaced"]
        and "seconds is 'many'" in words["odd"]
    )


def test_a_copied_run_has_a_row_of_its_own(tmp_path):
    finish(*train(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    table = closing_table(tmp_path, "0" * 64)
    assert "SASRec (run)" in table and "SASRec (backup)" in table


def test_an_output_folder_may_be_a_link_to_one_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to("far")
    finish(*train(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "metrics.json").is_file()


def test_peak_memory_without_the_module_that_windows_lacks():
    code = "import sys, psutil, transformers; sys.modules['resource'] = None; import utils.report"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no run"):
        train(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no run of this step"):
        train(tmp_path / "model")
    for place in ("thesis.tex", "thesis.tex/run"):
        with pytest.raises(UserError, match=r"thesis\.tex is a file"):
            train(tmp_path / place)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_no_training_example_is_refused_before_anything_is_written(tmp_path):
    data = make_sequences(users=5, low=3, high=3)
    run = Run(CONFIG | {"output_dir": str(tmp_path / "a")}, data, "unused")
    with pytest.raises(UserError, match="no training example"):
        fit(run, Model(), training_examples(data, "last", 8))
    assert not (tmp_path / "a").exists()


def test_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(tmp_path / "a", report_to="wandb")


def test_a_tracker_that_cannot_start_fails_before_anything_is_removed(tmp_path, monkeypatch):
    finish(*train(tmp_path / "a"))
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("no API key")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("utils.run.Accelerator.init_trackers", fail)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *args: ["wandb"])
    with pytest.raises(UserError, match="--report_to wandb cannot start: no API key"):
        train(tmp_path / "a", report_to="wandb")
    assert contents(tmp_path) == before


def test_bfloat16_trains_over_a_catalogue_in_chunks(tmp_path, monkeypatch):
    """The backward pass of the chunks computes in float32, whatever the precision of the forward pass."""
    found = {}
    for name, size in (("whole", 2**20), ("chunks", 64)):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", size)
        train(tmp_path / name, {"dropout": 0.0}, dtype="bfloat16", max_steps=2)
        row = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        found[name] = row["ce"], row["grad_norm"]
    assert found["chunks"] == pytest.approx(found["whole"], rel=1e-4)


def test_bfloat16_trains(tmp_path):
    _, model, state = train(tmp_path / "a", dtype="bfloat16", num_epochs=1.0)
    assert state["step"] > 2 and all(p.dtype == torch.float32 for p in model.parameters())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"1,099,511,627,776 MiB are to be written .* MiB left"):
        check_space(tmp_path, 2**60)


def test_a_run_made_before_a_flag_existed_is_continued(tmp_path):
    finish(*train(tmp_path / "a", num_epochs=1.0))
    data = make_sequences(users=80)
    changes = {"output_dir": str(tmp_path / "a"), "num_epochs": 1.0, "resume": "auto"}
    assert Run(CONFIG | changes | {"a_new_flag": 0, "another": None}, data, "unused").finished
    with pytest.raises(UserError, match=r"a_new_flag=None, not 0\.1"):
        Run(CONFIG | changes | {"a_new_flag": 0.1}, data, "unused")
    with pytest.raises(UserError, match=r"dropout|num_epochs"):
        Run(CONFIG | changes | {"num_epochs": 2.0}, data, "unused")
    written = tmp_path / "a" / "config.json"
    config = json.loads(written.read_text())
    del config["select_by"], config["patience"]
    written.write_text(json.dumps(config))
    assert Run(CONFIG | changes, data, "unused").finished
    with pytest.raises(UserError, match="select_by=sampled/NDCG@10, not full/MRR"):
        Run(CONFIG | changes | {"select_by": "full/MRR"}, data, "unused")
    with pytest.raises(UserError, match="patience=None, not 3"):
        Run(CONFIG | changes | {"patience": 3}, data, "unused")


@pytest.mark.parametrize("recorded", [None, "a" * 64])
def test_a_run_on_another_base_is_not_continued(recorded, tmp_path):
    """Nor one that recorded none: its prompt was another one."""
    with pytest.raises(Interrupted):
        train(tmp_path / "a", {"raise_at": 9})
    written = tmp_path / "a" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"base_fingerprint": recorded}))
    run = Run(CONFIG | {"output_dir": str(tmp_path / "a"), "resume": "auto"}, make_sequences(users=80), "unused")
    with pytest.raises(UserError, match=f"base_fingerprint={recorded}, not b.*prompt"):
        run.record(base_fingerprint="b" * 64)
