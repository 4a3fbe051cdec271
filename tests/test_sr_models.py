"""Every traditional model: what all of them must do, and each against its paper's equations in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_sequences

import train_sr_trad
from models.interface import Recommender
from models.sr import MODELS
from models.sr.transitions import DECAY, REACH, Transitions
from utils.data import Sequences, training_examples
from utils.errors import UserError

SMALL = {"max_seq_length": 12, "item_dim": 16, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0}
SMALL |= {"mask_seeds": 1, "mask_depth": 1, "last_prob": 0.5}
BOTH_WAYS = {"bert4rec", "lightsans"}  # the state of an item depends on later ones too
HISTORIES = torch.tensor([[0, 0, 0, 0, 4, 9], [3, 1, 4, 1, 5, 9], [0, 2, 6, 5, 3, 5], [0, 0, 0, 0, 0, 7]])
USERS = torch.tensor([0, 3, 1, 2])


def small(name: str, data: Sequences | None = None, noise: float = 0.0, **flags) -> Recommender:
    """The model with few weights; noise: added to all of them, so that none is at a start that hides it."""
    torch.manual_seed(0)
    kind, known = MODELS[name], (data or make_sequences()).training_part()
    own = {field.name for field in dataclasses.fields(kind.Config)}
    model = kind(kind.Config(**{flag: value for flag, value in (SMALL | flags).items() if flag in own}), known).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
        for table in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
            if table.padding_idx is not None:
                table.weight[table.padding_idx] = 0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_dozen_users_can_be_learnt_by_heart(name):
    data = make_sequences(users=12, low=6)
    model, rng = small(name, data), np.random.default_rng(0)
    examples, optimizer = training_examples(data, "all", 12), torch.optim.Adam(model.parameters(), lr=0.01)
    whole = examples.batch(np.arange(len(examples)))
    for _ in range(250):
        loss = sum(model.train()(model.batch(examples, np.arange(len(examples)), rng)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = model.eval().scores(whole["histories"], whole["users"])
    assert (scores[:, 1:].argmax(1) + 1).tolist() == whole["targets"][:, -1].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(name):
    model = small(name, noise=0.1)
    together = model.scores(HISTORIES, USERS)
    for history, user, expected in zip(HISTORIES, USERS, together, strict=True):
        own = history[history != 0][None]
        for padding in (0, 2, 12 - own.shape[1]):
            found = model.scores(torch.nn.functional.pad(own, (padding, 0)), user[None])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BOTH_WAYS])
def test_what_comes_later_changes_no_loss(name):
    """Of one target after position t: items after t have no part in it, those up to t have."""
    data = make_sequences(users=20, low=8)
    model, examples = small(name, data, noise=0.3), training_examples(data, "all", 12)
    batch = model.batch(examples, np.arange(20), np.random.default_rng(0))
    T = batch["histories"].shape[1]
    for t in (T - 5, T - 2):
        targets = torch.where(torch.arange(T) == t, batch["targets"], 0)
        found = {}
        for changed in (None, t + 1, t):
            histories = batch["histories"].clone()
            if changed is not None:
                histories[:, changed] = histories[:, changed] % 40 + 1
            torch.manual_seed(0)
            found[changed] = next(iter(model(batch | {"histories": histories, "targets": targets}).values())).item()
        assert found[t + 1] == pytest.approx(found[None], rel=1e-6) and found[t] != pytest.approx(found[None], rel=1e-4)


@pytest.mark.parametrize("name", ["caser", "gru4rec", "hgn"])
@pytest.mark.parametrize("loss", ["bce", "bpr", "gbce", "sampled_softmax"])
def test_every_objective_reaches_every_weight(name, loss):
    data = make_sequences(users=20, low=8)
    model, examples = small(name, data, noise=0.1, loss=loss, num_negatives=20), training_examples(data, "all", 12)
    (term,) = model(examples.batch(np.arange(20))).values()
    term.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("name", ["caser", "hgn"])
def test_an_unknown_user_is_the_mean_of_all_and_a_window_fits_the_history(name):
    model = small(name, noise=0.3)
    known = torch.stack([model.user_vectors(HISTORIES, torch.full((4,), user)) for user in range(60)])
    assert known.std(0).amax(1).min() > 0.01, "they tell users apart"
    with torch.no_grad():
        model.users.weight[:] = model.users.weight.mean(0)
    torch.testing.assert_close(model.user_vectors(HISTORIES), model.user_vectors(HISTORIES, USERS))
    with pytest.raises(UserError, match="--window 13 is longer than --max_seq_length 12"):
        small(name, window=13)


@pytest.mark.parametrize("name", ["caser", "hgn"])
def test_a_user_without_a_training_example_is_the_mean_of_those_who_have_one(name):
    data = make_sequences(users=40, low=3, high=5)
    model = small(name, data)
    trained = np.array([count > 3 for count in np.diff(data.offsets)])  # the newest two are of validation and test
    assert trained.any() and not trained.all()
    loss = sum(model(training_examples(data, "all", 12).batch(np.flatnonzero(trained[trained]))).values())
    loss.backward()
    reached = (model.users.weight.grad != 0).any(1).numpy()
    assert (reached == trained).all() and ((model.users.weight == 0).all(1).numpy() == ~trained).all()
    mean = torch.from_numpy(model.users.weight.detach().numpy()[trained].mean(0))
    found = [model.user_vectors(HISTORIES, torch.full((4,), int(user))) for user in np.flatnonzero(~trained)]
    with torch.no_grad():
        model.users.weight[0] = mean
    for vectors in [*found, model.user_vectors(HISTORIES, torch.zeros(4, dtype=torch.long))]:
        torch.testing.assert_close(vectors, found[0])


# --- the papers' equations, loop by loop ---


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gru4rec(w: dict[str, np.ndarray], history: list[int], user: int, L: int) -> np.ndarray:
    """Hidasi et al., equations 1 to 4, with PyTorch's place of the reset gate."""
    states = [w["items.weight"][item] for item in history]
    for layer in range(2):
        h = np.zeros(w["gru.weight_hh_l0"].shape[1])
        for t, x in enumerate(states):
            reads, keeps = (
                np.split(w[f"gru.weight_{way}_l{layer}"] @ of + w[f"gru.bias_{way}_l{layer}"], 3)
                for way, of in (("ih", x), ("hh", h))
            )
            reset, update = sigma(reads[0] + keeps[0]), sigma(reads[1] + keeps[1])
            states[t] = h = update * h + (1 - update) * np.tanh(reads[2] + reset * keeps[2])
    return w["items.weight"] @ (w["out.weight"] @ h + w["out.bias"])


def caser(w: dict[str, np.ndarray], history: list[int], user: int, L: int) -> np.ndarray:
    E, found = w["items.weight"][([0] * L + history)[-L:]], []
    for height in range(1, L + 1):
        filters, bias = w[f"horizontal.{height - 1}.weight"], w[f"horizontal.{height - 1}.bias"]
        for F, b in zip(filters, bias, strict=True):  # (d, height)
            found.append(max(max(0, (E[i : i + height] * F.T).sum() + b) for i in range(L - height + 1)))
    for F, b in zip(w["vertical.weight"], w["vertical.bias"], strict=True):
        found += list(sum(F[row] * E[row] for row in range(L)) + b)
    z = np.maximum(0, w["out.weight"] @ np.array(found) + w["out.bias"])
    return w["output.weight"] @ np.concatenate([z, w["users.weight"][user]]) + w["bias"]


def hgn(w: dict[str, np.ndarray], history: list[int], user: int, L: int) -> np.ndarray:
    u, total, gates, products = w["users.weight"][user], 0, 0, 0
    for place, item in enumerate(history[-L:], L - len(history[-L:])):
        s = w["items.weight"][item]
        gated = s * sigma(w["feature_item.weight"] @ s + w["feature_item.bias"] + w["feature_user.weight"] @ u)
        gate = sigma(w["instance_item.weight"][0] @ gated + w["instance_user.weight"][place] @ u)
        total, gates, products = total + gate * gated, gates + gate, products + w["output.weight"] @ s
    return w["output.weight"] @ u + w["output.weight"] @ (total / gates) + products + w["bias"]


@pytest.mark.parametrize(("name", "equations"), [("gru4rec", gru4rec), ("caser", caser), ("hgn", hgn)])
def test_scores_are_those_of_the_papers_equations(name, equations):
    model = small(name, noise=0.5, item_dim=6, hidden_dim=5, window=4, num_horizontal=2, num_vertical=3)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    found = model.scores(HISTORIES, USERS).detach().numpy()
    for history, user, scores in zip(HISTORIES.tolist(), USERS.tolist(), found, strict=True):
        expected = equations(weights, [item for item in history if item], user, 4)
        np.testing.assert_allclose(scores[1:], expected[1:], rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_every_position_is_read_as_at_evaluation():
    """The losses of training, target by target, are those of the scores of each history that ends there."""
    data = make_sequences(users=15)
    examples = training_examples(data, "all", 12)
    single = examples.single_targets(data.offsets, 12)
    for name in ("gru4rec", "caser", "hgn"):
        model = small(name, data, noise=0.3)
        one = single.batch(np.arange(len(single)))
        scores = model.scores(one["histories"], one["users"])[:, 1:]
        expected = torch.nn.functional.cross_entropy(scores, one["targets"][:, -1] - 1)
        assert model(examples.batch(np.arange(len(examples))))["ce"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_transition_graph_counts_what_follows():
    data = make_sequences(users=30, num_items=9, high=9)
    part, follows = data.training_part(), np.zeros((10, 10))
    for user in data.users:
        items = data.items[data.offsets[user] : data.offsets[user + 1] - 2]
        for i, before in enumerate(items):
            for j in range(i + 1, min(i + REACH + 1, len(items))):
                follows[before, items[j]] += DECAY ** (j - i - 1)
    shares = follows / np.maximum(follows.sum(1, keepdims=True), 1e-30)
    expected = [sum(DECAY**age * shares[i] for age, i in enumerate(h[::-1]) if i) for h in HISTORIES.tolist()]
    model = Transitions(None, part)
    np.testing.assert_allclose(model.scores(HISTORIES), expected, atol=3e-6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(
            model.scores(HISTORIES, items=torch.tensor([3, 7])), np.array(expected)[:, [3, 7]], atol=3e-6
        )
    none = model.scores(torch.zeros(1, 3, dtype=torch.long))[0]
    assert none.argsort(descending=True)[0] == part.counts().argmax(), "what follows nothing is ranked by popularity"


@pytest.mark.parametrize(("reached", "popular", "told"), [(0.1, 0.2, True), (0.2, 0.2, True), (0.3, 0.2, False)])
def test_a_model_that_is_no_better_than_popularity_is_told_what_to_try(reached, popular, told):
    def of(value):
        return {"valid": {"sampled": {"MRR": 1 - value}, "full": {"MRR": value}}}

    text = train_sr_trad.advice(of(reached) | {"baselines": {"Popularity": of(popular)}}, "full/MRR")
    assert bool(text) == told
    if told:
        assert f"valid full MRR {reached:.4f} against {popular:.4f}; train longer (--num_epochs)" in text
    assert not train_sr_trad.advice(of(reached), "full/MRR")
