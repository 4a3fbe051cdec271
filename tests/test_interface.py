"""A recommender that is written here, in a few lines, goes through every step without a change anywhere else."""

import dataclasses
import inspect
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from kills import outcome, step
from test_kill import sources  # noqa: F401
from torch import nn

import evaluate
import extract_emb
import finetune
import train_sr_trad
from models.interface import Recommender, flag
from models.losses import catalogue_cross_entropy
from models.sr import MODELS
from recommend import load
from utils import cli
from utils.checked import load_tensors
from utils.errors import UserError


class GRU(Recommender):
    """A GRU over the history, with the item table of the input as that of the output."""

    @dataclass(frozen=True)
    class Config(Recommender.Config):
        width: int = flag(8, "width of the item table and of the state", ">= 1")

    def __init__(self, config, data):
        super().__init__(config, data)
        self.items = nn.Embedding(data.num_items + 1, config.width, padding_idx=0)
        self.gru = nn.GRU(config.width, config.width, batch_first=True)

    def states(self, histories):
        return self.gru(self.items(histories))[0]  # (B, T, d)

    def forward(self, batch):
        target_mask = batch["targets"] != 0
        vectors = self.states(batch["histories"])[target_mask]
        return {"ce": catalogue_cross_entropy(vectors, self.items.weight, batch["targets"][target_mask])}

    def user_vectors(self, histories, users=None):
        return self.states(histories)[:, -1]

    def item_vectors(self):
        return self.items.weight


# few and fast enough: of what a model has of these
SMALL = {"item_dim": 6, "hidden_dim": 4, "num_heads": 2, "num_layers": 1, "window": 3, "learning_rate": 0.01}


@pytest.mark.parametrize(("model", "kind"), [("gru", GRU), *MODELS.items()])
def test_a_model_goes_through_every_step(model, kind, sources, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(MODELS, model, kind)
    own = {field.name for field in dataclasses.fields(kind.Config)} | {"learning_rate"}
    values = {"width": 6, "learning_rate": 3} if kind is GRU else {n: v for n, v in SMALL.items() if n in own}
    flags = [f"--{name}={value}" for name, value in {"model": model, "warmup_steps": 1, **values}.items()]

    def train(name, *more):
        step(train_sr_trad, "sr", sources, *flags, *more, "--output_dir", tmp_path / name)
        return outcome(tmp_path / name)

    whole = train("whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert values.items() <= config.items() and config["model"] == model and config["title"] == kind.__name__
    forward, calls = kind.forward, []

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(kind, "forward", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    monkeypatch.setattr(kind, "forward", forward)
    assert train("cut", "--resume", "auto") == whole

    common = ["--dataset", str(sources / "data")]
    argv = [*common, "--model", model, "--sr_dir", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "table")]
    extract_emb.main(**cli.resolve(extract_emb.main, "extract", argv, models=MODELS))
    table = load_tensors(tmp_path / "table" / "item_embeddings.safetensors")["item_table"]
    trained = load(tmp_path / "whole").model
    assert torch.equal(table, trained.item_table()) and table.shape == (41, 6)

    capsys.readouterr()
    cli.run(evaluate.main, None, ["--run", str(tmp_path / "whole"), *common])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| test, full"))
    cells = [float(cell) for cell in line.split("|")[2:-1]]
    assert cells == pytest.approx(list(whole[0]["test"]["full"].values()), abs=6e-5)

    base = ["--base_model", sources / "base", "--num_layers", 1, "--lora_r", 2]
    step(
        finetune,
        "teacher",
        sources,
        *base,
        "--item_embeddings",
        tmp_path / "table",
        "--output_dir",
        tmp_path / "teacher",
    )
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["item_dim"] == 6


@pytest.mark.parametrize("model", ["sasrec", "sasrec_released"])
def test_a_table_that_is_still_as_it_was_drawn_is_refused(model, sources, tmp_path):  # noqa: F811
    run, table = tmp_path / "run", tmp_path / "table"
    step(train_sr_trad, "sr", sources, "--model", model, "--learning_rate", "1e-9", "--output_dir", run)
    argv = ["--dataset", str(sources / "data"), "--sr_dir", str(run), "--output_dir", str(table)]
    with pytest.raises(UserError, match="the item table is untrained"):
        extract_emb.main(**cli.resolve(extract_emb.main, "extract", argv, models=MODELS))
    argv += ["--model", "gru4rec"]
    with pytest.raises(UserError, match=f"--model gru4rec: {run} is a run of {model}; leave --model out"):
        extract_emb.main(**cli.resolve(extract_emb.main, "extract", argv, models=MODELS))
    assert not table.exists()


def test_rows_that_are_still_as_they_were_drawn_are_counted(capsys):
    drawn = torch.randn(5, 3)
    extract_emb.check_trained(drawn + 1, drawn)
    assert capsys.readouterr().out == ""
    table = drawn.clone()
    table[[1, 3]] += 1
    extract_emb.check_trained(table, drawn)
    assert "2 of 4 items were not trained" in capsys.readouterr().out


def test_the_model_of_the_test_is_short():
    assert len(inspect.getsource(GRU).splitlines()) < 40


def test_a_run_knows_which_attributes_it_learned_from(sources, tmp_path, capsys):  # noqa: F811
    place = tmp_path / "sources"
    shutil.copytree(sources, place)
    with_some = json.loads((place / "data/dataset.json").read_text())
    without = {name: value for name, value in with_some.items() if not name.startswith("attributes")}
    (place / "data/dataset.json").write_text(json.dumps(without))
    flags = ["--model", "s3rec", "--item_dim", 6, "--num_heads", 2, "--pretrain_epochs", 1, "--warmup_steps", 1]
    flags += ["--resume", "auto", "--output_dir", tmp_path / "run"]
    step(train_sr_trad, "sr", place, *flags)
    assert "has no attributes (--attributes of datasets/process.py): s3rec goes without" in capsys.readouterr().out
    terms = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any("segment" in row for row in terms) and not any("masked_attribute" in row for row in terms)
    assert json.loads((tmp_path / "run/config.json").read_text())["attributes_fingerprint"] is None
    assert len(load(tmp_path / "run").recommend([["id4", "id5"]], 3)[0].items) == 3
    (place / "data/dataset.json").write_text(json.dumps(with_some))
    with pytest.raises(UserError, match="holds a run with attributes_fingerprint=None, not"):
        step(train_sr_trad, "sr", place, *flags)
