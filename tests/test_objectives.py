"""The objectives of the traditional models: each loss against NumPy in float64, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import make_sequences, sasrec
from test_sr_models import small

import train_sr_trad
from models.losses import gbce_beta, uniform_negatives
from models.sr import MODELS, objectives
from models.sr.objectives import groups_by_length
from models.sr.storage import new_recommender
from utils import cli
from utils.data import training_examples
from utils.errors import UserError


def log_sigma(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def by_numpy(loss: str, vectors, items, targets, negatives, q, t: float) -> float:
    """The loss of each target by itself, from its negatives (S,), in float64."""
    found = []
    for vector, target, own in zip(vectors, targets, negatives, strict=True):
        positive, negative = vector @ items[target], items[own] @ vector
        if loss == "ce":
            found.append(np.log(np.exp(items[1:] @ vector).sum()) - positive)
        elif loss == "sampled_softmax":
            weights = np.where(own == target, 0, np.exp(negative) / (len(own) * q[own]))
            found.append(np.log(np.exp(positive) + weights.sum()) - positive)
        elif loss == "bpr":
            found.append(-log_sigma(positive - negative).mean())
        else:
            alpha = len(own) / (len(items) - 2)
            beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha) if loss == "gbce" else 1
            found.append(-(beta * log_sigma(positive) + np.log(1 - 1 / (1 + np.exp(-negative))).sum()) / (len(own) + 1))
    return np.mean(found)


@pytest.mark.parametrize(
    ("loss", "number", "t", "term"),
    [
        (None, 0, None, "ce"),
        ("ce", 0, None, "ce"),
        (None, 50, None, "sampled_ce"),
        ("sampled_softmax", 7, None, "sampled_ce"),
        *[(loss, number, None, loss) for loss in ("bce", "bpr", "gbce") for number in (1, 9)],
        ("gbce", 9, 0.0, "gbce"),
        ("gbce", 9, 1.0, "gbce"),
    ],
)
def test_a_loss_equals_numpy_in_float64(loss, number, t, term):
    data = make_sequences()
    model = sasrec(data, item_dim=8, loss=loss, num_negatives=number, calibration=t)
    with torch.no_grad():
        model.items.weight[1:].normal_()
    vectors, targets = torch.randn(30, 8), torch.randint(1, 41, (30,))
    torch.manual_seed(3)
    found = model.objective(vectors, targets)
    torch.manual_seed(3)
    q = (np.bincount(data.training_part().items, minlength=41) + 1.0) ** 0.75
    q[0] = 0
    q /= q.sum()
    if term == "sampled_ce":
        negatives = torch.from_numpy(q).float().multinomial(number, replacement=True).expand(30, number)
    else:
        negatives = uniform_negatives(targets, number, 40)
    arrays = (x.detach().numpy() for x in (vectors.double(), model.items.weight.double(), targets, negatives))
    expected = by_numpy(term if term != "sampled_ce" else "sampled_softmax", *arrays, q, 0.75 if t is None else t)
    assert found.keys() == {term} and found[term].item() == pytest.approx(expected, rel=1e-5)
    (slope,) = torch.autograd.grad(found[term], model.items.weight)
    assert not slope[0].any() and slope[targets].abs().sum(1).min() > 0


def test_calibration_lies_between_bce_and_calibrated_scores():
    assert [gbce_beta(0.1, t) for t in (0, 0.75, 1)] == pytest.approx([1, 0.325, 0.1])


def test_negatives_are_uniform_over_all_items_but_the_target():
    torch.manual_seed(0)
    targets = torch.tensor([1, 3, 5])
    for target, drawn in zip(targets.tolist(), uniform_negatives(targets, 40_000, 5), strict=True):
        counts = torch.bincount(drawn, minlength=6)
        assert len(counts) == 6 and counts[0] == counts[target] == 0
        assert all(abs(counts[item] - 10_000) < 400 for item in {1, 2, 3, 4, 5} - {target})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *[(f"--loss {loss}", f"--loss {loss} needs negatives") for loss in ("bce", "bpr", "gbce", "sampled_softmax")],
        ("--loss ce --num_negatives 5", "--loss ce is over all items"),
        ("--calibration 0.5", "--calibration belongs to --loss gbce"),
        ("--loss bce --num_negatives 5 --calibration 0", "--calibration belongs to --loss gbce"),
        ("--loss gbce --num_negatives 5 --calibration 1.5", "--calibration 1.5: expected a number between 0 and 1"),
        ("--loss hinge", "--loss hinge: expected one of ce, bce, bpr, sampled_softmax, gbce"),
        ("--loss bce --num_negatives 40", "a target has 39 other items"),
    ],
)
def test_senseless_combinations_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        values = cli.resolve(train_sr_trad.main, "sr", ["--dataset", "none", *flags.split()], models=MODELS)
        MODELS["sasrec"](values["model_config"], make_sequences().training_part())


def test_a_run_made_before_there_was_a_choice_is_read():
    old = {"model": "sasrec", "max_seq_length": 9, "item_dim": 8, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
    known = make_sequences().training_part()
    assert new_recommender(old | {"num_negatives": 7}, known).loss == "sampled_softmax"
    assert new_recommender(old, known).loss == "ce"
    with pytest.raises(UserError, match="the run has no num_heads"):
        new_recommender({name: value for name, value in old.items() if name != "num_heads"}, known)


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_every_row_once_and_little_padding(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(rng.uniform(0.02, 0.5), rng.integers(1, 300)).clip(0, 50)
    groups = list(groups_by_length(torch.from_numpy(lengths)))
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert (np.diff(lengths[[row for rows in groups for row in rows]]) >= 0).all()
    for rows in groups:
        assert 1 <= len(rows) <= 64 and len(rows) * lengths[rows].max() <= 1.5 * lengths[rows].sum()
    alike = list(groups_by_length(torch.full((200,), 7)))
    assert [len(rows) for rows in alike] == [64, 64, 64, 8], "nothing is halved in vain"


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "lightsans"])
def test_groups_change_neither_loss_nor_gradients(name, monkeypatch):
    data = make_sequences(users=50, high=40)
    examples = training_examples(data, "all", 40)
    found, sizes = [], []
    for padded in (1.5, 1.0, 2**62):
        monkeypatch.setattr(objectives, "PADDED", padded)
        model = small(name, data, noise=0.1, max_seq_length=40)
        groups, states = [], model.states
        model.states = lambda histories, groups=groups, states=states: groups.append(histories) or states(histories)
        loss = sum(model(examples.batch(np.arange(len(examples)))).values())
        loss.backward()
        sizes.append(len(groups))
        found.append([loss.item(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert sizes[1] > sizes[0] > sizes[2] == 1
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-4, atol=1e-6)
