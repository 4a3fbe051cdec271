"""The released SASRec against its equations in NumPy, its faults included."""

import numpy as np
import pytest
import torch
from conftest import make_sequences
from torch import nn

import train_sr_trad
from models.sr import MODELS
from models.sr.sasrec_released import SASRecReleased
from utils import cli
from utils.data import training_examples
from utils.experiments import Experiment

HISTORIES = torch.tensor([[0, 0, 0, 7, 2], [0, 9, 8, 7, 6], [3, 1, 4, 5, 9]])  # trimmed to five of seven


def released(max_seq_length: int = 7, noise: bool = True, **flags) -> SASRecReleased:
    torch.manual_seed(0)
    config = SASRecReleased.Config(**{"max_seq_length": max_seq_length, "item_dim": 6, "hidden_dim": 4} | flags)
    model = SASRecReleased(config, make_sequences().training_part()).eval()
    with torch.no_grad():
        for parameter in model.parameters() if noise else []:  # norms start at 1 and biases at 0, which hides them
            parameter += 0.3 * torch.randn_like(parameter)
        model.items.weight[0] = 0
    return model


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-8) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def block(x: list[np.ndarray], w: dict) -> list[np.ndarray]:
    """x: the vectors of all positions, oldest first; each attends to itself and to all before it, padding too."""
    h = len(x[0])
    part = {name: (w["attention.in_proj_weight"][at], w["attention.in_proj_bias"][at])
            for name, at in zip("qkv", (slice(0, h), slice(h, 2 * h), slice(2 * h, None)), strict=True)}  # fmt: skip
    keys, values = ([part[name][0] @ v + part[name][1] for v in x] for name in "kv")
    found = []
    for t, vector in enumerate(x):
        query = norm(vector, w, "norm1")
        logits = [(part["q"][0] @ query + part["q"][1]) @ key / np.sqrt(h) for key in keys[: t + 1]]
        share = np.exp(logits) / np.exp(logits).sum()
        attended = sum(s * value for s, value in zip(share, values[: t + 1], strict=True))
        y = norm(query + linear(attended, w, "attention.out_proj"), w, "norm2")
        found.append(y + linear(np.maximum(linear(y, w, "feed.0"), 0), w, "feed.3"))
    return found


def state(model: SASRecReleased, ids: list[int]) -> np.ndarray:
    """The user vector after the last of these items, which begin at the first position; 0 is a padding."""
    w = weights(model)
    x = [linear(w["items.weight"][item] if item else w["padding"], w, "input_proj") for item in ids]
    x = [v * np.sqrt(6) + position for v, position in zip(x, w["positions.weight"], strict=False)]
    for layer in model.blocks:
        x = block(x, weights(layer))
    return linear(norm(x[-1], w, "norm"), w, "output_proj")


def own(row: torch.Tensor) -> list[int]:
    return row[row != 0].tolist()


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert np.linalg.norm(found.detach().numpy() - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_block_equals_its_equations():
    layer, x = released().blocks[0], torch.randn(2, 5, 4)
    found = layer(x, torch.ones(5, 5, dtype=torch.bool).triu(1))
    assert_close(found, np.stack([block(list(row), weights(layer)) for row in x.double().numpy()]))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_user_vectors_equal_their_equations(num_layers):
    model = released(num_layers=num_layers)
    expected = np.stack([state(model, [0, 0, *row.tolist()]) for row in HISTORIES])
    assert_close(model.user_vectors(HISTORIES), expected)
    assert np.linalg.norm(expected - expected.mean(0)) > 0.1 * np.linalg.norm(expected), "they tell users apart"


def test_vectors_do_not_depend_on_how_a_batch_was_trimmed():
    model = released()
    together = model.user_vectors(HISTORIES)
    for row, vector in zip(HISTORIES, together, strict=True):
        torch.testing.assert_close(model.user_vectors(torch.tensor([own(row)]))[0], vector)
    torch.testing.assert_close(model.user_vectors(nn.functional.pad(HISTORIES, (2, 0))), together)


def test_padding_is_attended_to():
    """Fault 5: of two models that differ in the number of paddings alone, both read it."""
    shorter, longer, full = released(), released(8), torch.arange(1, 8)[None]
    positions = torch.cat([longer.positions.weight[:1], shorter.positions.weight])  # counted back from the newest item
    longer.load_state_dict(shorter.state_dict() | {"positions.weight": positions})
    before, of_full = shorter.user_vectors(HISTORIES), shorter.user_vectors(full)
    assert ((longer.user_vectors(HISTORIES) - before).norm(dim=1) > 1e-3 * before.norm(dim=1)).all()
    with torch.no_grad():
        shorter.padding += 1
    assert ((shorter.user_vectors(HISTORIES) - before).norm(dim=1) > 1e-3 * before.norm(dim=1)).all()
    assert torch.equal(shorter.user_vectors(full), of_full), "a full history has none"


@pytest.mark.parametrize("train_targets", ["last", "all"])
def test_the_loss_is_the_cross_entropy_over_all_items_and_reaches_every_weight(train_targets):
    model, data = released(12), make_sequences(users=6, low=5)
    batch = training_examples(data, train_targets, 12).batch(np.arange(6))
    terms = model(batch)
    expected, table = [], weights(model)["items.weight"]
    for history, targets in zip(batch["histories"], batch["targets"], strict=True):
        for t in targets.nonzero()[:, 0].tolist():
            read = [0] * (12 - len(history)) + history[: t + 1].tolist()  # where it stands, not moved to the end
            logits = table[1:] @ state(model, read)
            expected.append(np.log(np.exp(logits).sum()) - logits[targets[t] - 1])
    assert train_targets == "all" or len(expected) == 6
    assert terms.keys() == {"ce"} and terms["ce"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    terms["ce"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7]
    assert not model.items.weight.grad[0].any(), "padding has a vector of its own and is no class"


def test_it_starts_as_the_release_does():
    model = released(30, noise=False, item_dim=128, hidden_dim=32)
    for table in (model.items.weight[1:], model.positions.weight, model.padding):
        assert abs(table.mean()) < 0.3 and 0.85 < table.std() < 1.15
    for layer in (model.blocks[0].feed[0], model.blocks[1].feed[3]):  # as convolutions of width 1 start
        assert 0.9 / 32**0.5 < layer.weight.abs().max() <= 1 / 32**0.5
    assert model.input_proj.weight.abs().max() <= 1 / 128**0.5 and not model.item_vectors()[0].any()


def test_flags_and_the_protocol_hold_the_released_values():
    argv = Experiment("beauty", "released", "SASRec", 1).command(lambda: 30)[1:]
    values = cli.resolve(train_sr_trad.main, "sr", argv, models=MODELS)
    assert values["model_config"] == SASRecReleased.Config(30, 128, 32, 2, 0.5)
    wanted = {"train_targets": "last", "batch_size": 1024, "num_epochs": 50, "learning_rate": 1e-4, "weight_decay": 0}
    wanted |= {"lr_scheduler": "constant", "warmup_steps": 0, "select_by": "sampled/MRR", "max_steps": -1}
    assert wanted.items() <= values.items() and values["max_grad_norm"] >= 1e6
