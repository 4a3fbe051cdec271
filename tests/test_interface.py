"""A recommender that is written here, in a few lines, goes through every step without a change anywhere else."""

import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from test_kill import outcome, sources, step  # noqa: F401
from torch import nn

import extract_emb
import finetune
import train_sr_trad
from models.interface import Recommender, flag
from models.losses import catalogue_cross_entropy
from models.sr import MODELS
from models.sr.sasrec_released import SASRecReleased
from utils import cli
from utils.errors import UserError
from utils.files import load_tensors


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


RELEASED = {"item_dim": 6, "hidden_dim": 4, "learning_rate": 1e-3}  # its table moves less than its norms tell


@pytest.mark.parametrize(
    ("model", "kind", "values"),
    [("gru", GRU, {"width": 6, "learning_rate": 3}), ("sasrec_released", SASRecReleased, RELEASED)],
)
def test_a_model_goes_through_every_step(model, kind, values, sources, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(MODELS, model, kind)
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
    trained = load_tensors(tmp_path / "whole" / "model.safetensors")["items.weight"]
    table = load_tensors(tmp_path / "table" / "item_embeddings.safetensors")["item_table"]
    assert torch.equal(table, trained) and table.shape == (41, 6)

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
    assert outcome(tmp_path / "teacher")[0]["test"]["full"]["HR@10"] >= 0


@pytest.mark.parametrize("model", ["sasrec", "sasrec_released"])
def test_a_table_that_is_still_as_it_was_drawn_is_refused(model, sources, tmp_path):  # noqa: F811
    run, table = tmp_path / "run", tmp_path / "table"
    step(train_sr_trad, "sr", sources, "--model", model, "--learning_rate", "1e-9", "--output_dir", run)
    argv = ["--dataset", str(sources / "data"), "--sr_dir", str(run), "--output_dir", str(table)]
    with pytest.raises(UserError, match="the item table is untrained"):
        extract_emb.main(**cli.resolve(extract_emb.main, "extract", argv, models=MODELS))
    assert not table.exists()


def test_the_model_of_the_test_is_short():
    assert len(inspect.getsource(GRU).splitlines()) < 40
