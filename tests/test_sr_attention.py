"""The models that attend, against their papers' equations in NumPy, loop by loop, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_sequences
from test_sr_models import HISTORIES, small

from models.sr.duorec import info_nce
from models.sr.maerec import transitions
from utils.data import no_attributes, training_examples
from utils.errors import UserError

D, HEADS, MASK = 6, 2, 41
OWN = [[item for item in row if item] for row in HISTORIES.tolist()]
Weights = dict[str, np.ndarray]


def weights_of(model) -> Weights:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def sigma(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def gelu(x):
    return x * np.vectorize(lambda v: torch.special.ndtr(torch.tensor(v)).item())(x)


def linear(w: Weights, name: str, x):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(w: Weights, name: str, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def over_heads(attend):
    """attend (queries, keys, values) of each head, (T, d / heads) each, side by side."""
    return lambda qkv, n=0: np.concatenate(
        [attend(h, *(part[:, h * D // HEADS : (h + 1) * D // HEADS] for part in qkv)) for h in range(HEADS)], 1
    )


def seeing(causal: bool):
    @over_heads
    def attend(head, q, k, v):
        rows = [slice(0, t + 1 if causal else None) for t in range(len(q))]
        return np.stack([softmax(k[r] @ x / np.sqrt(D // HEADS)) @ v[r] for x, r in zip(q, rows, strict=True)])

    return attend


def encode(w: Weights, vectors, attend, position: bool = True, norm_first: bool = False):
    """The encoder's states of vectors (T, d), which stand at the newest positions; norm_first: SASRec's, not BERT's."""

    def before(name, v):
        return norm(w, name, v) if norm_first else v

    def after(name, v):
        return v if norm_first else norm(w, name, v)

    x = [v + p for v, p in zip(vectors, w["positions.weight"][-len(vectors) :] * position, strict=True)]
    x = [after("norm", v) for v in x]
    for n in range(sum(name.endswith(".qkv.weight") for name in w)):
        qkv = [linear(w, f"blocks.{n}.qkv", before(f"blocks.{n}.norm1", v)) for v in x]
        for t, found in enumerate(attend(np.split(np.stack(qkv), 3, 1), n)):
            y = after(f"blocks.{n}.norm1", x[t] + linear(w, f"blocks.{n}.out", found))
            inner = gelu(linear(w, f"blocks.{n}.feed.0", before(f"blocks.{n}.norm2", y)))
            x[t] = after(f"blocks.{n}.norm2", y + linear(w, f"blocks.{n}.feed.3", inner))
    return np.stack([before("norm", v) for v in x])


def read(w: Weights, ids):
    return np.stack([w["mask"] if item == MASK else w["items.weight"][item] for item in ids])


def sasrec(w: Weights, history):
    return w["items.weight"] @ encode(w, read(w, history), seeing(True), norm_first=True)[-1]


def bert(w: Weights, history):
    return w["items.weight"] @ encode(w, read(w, history), seeing(True))[-1]


def mapped(w: Weights, state):
    """What BERT4Rec makes of a state, without --output_map false."""
    return norm(w, "out.2", gelu(linear(w, "out.0", state))) if "out.0.weight" in w else state


def bert4rec(w: Weights, history):
    return w["items.weight"] @ mapped(w, encode(w, read(w, [*history, MASK]), seeing(False))[-1])


def lightsans(w: Weights, history):
    def attend(qkv, n):
        positions = [norm(w, f"blocks.{n}.position_norm", p) for p in w["positions.weight"][-len(history) :]]
        of_positions = np.split(np.stack([linear(w, f"blocks.{n}.position", p) for p in positions]), 2, 1)
        q, *kv = qkv
        interests = []
        for theta, y in zip(w[f"blocks.{n}.theta"], kv, strict=True):
            interests.append(np.stack([softmax(y @ row) @ y for row in theta]))  # (k, d)
        items, places = seeing(False)([q, *interests]), seeing(False)([*of_positions, kv[1]])
        return items + places

    return w["items.weight"] @ encode(w, read(w, history), attend, position=False)[-1]


def graph(distance: int) -> np.ndarray:
    data, A = make_sequences(), np.zeros((41, 41))
    for user in data.users:
        items = data.items[data.offsets[user] : data.offsets[user + 1] - 2]
        for i in range(len(items)):
            for j in range(i + 1, min(i + distance + 1, len(items))):
                A[items[i], items[j]] = A[items[j], items[i]] = 1
    return A


def propagate(E: np.ndarray, A: np.ndarray, layers: int = 2) -> list[np.ndarray]:
    found = [E]
    for _ in range(layers):
        new = np.zeros_like(E)
        for u in range(len(E)):
            for v in range(len(E)):
                new[u] += (A[u, v] + (u == v)) / np.sqrt((A[u].sum() + 1) * (A[v].sum() + 1)) * found[-1][v]
        found.append(new)
    return found


def maerec(w: Weights, history):
    table = sum(propagate(w["items.weight"], graph(2)))
    return table @ encode(w, table[history], seeing(True))[-1]


@pytest.mark.parametrize("scale_items", [False, True])
@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "lightsans", "duorec", "s3rec", "maerec"])
def test_scores_are_those_of_the_papers_equations(name, scale_items, monkeypatch):
    model = small(name, noise=0.5, item_dim=D, num_interests=3, graph_distance=2, scale_items=scale_items)
    equations = {"duorec": bert, "s3rec": bert}.get(name) or globals()[name]
    if scale_items:  # as Kang and McAuley's code does
        plain = encode
        monkeypatch.setitem(globals(), "encode", lambda w, vectors, *a, **k: plain(w, D**0.5 * vectors, *a, **k))
    for history, found in zip(OWN, model.scores(HISTORIES).detach().numpy(), strict=True):
        expected = equations(weights_of(model), history)
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-4, atol=1e-4 * abs(expected).max())


def original(w: Weights, history, scale: float, L: int = 12):
    """All L positions are computed; what is padded is 0 before each block."""

    def normed(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-8) * w[f"{name}.weight"] + w[f"{name}.bias"]

    real = [False] * (L - len(history)) + [True] * len(history)
    x = [np.zeros(D)] * (L - len(history))
    x += [scale * v + p for v, p in zip(read(w, history), w["positions.weight"][-len(history) :], strict=True)]
    for n in range(2):
        queries = np.stack([linear(w, f"blocks.{n}.query", normed(f"blocks.{n}.norm1", v)) for v in x])
        pairs = np.stack([linear(w, f"blocks.{n}.key_value", v) for v in x])
        attended = seeing(True)([queries, *np.split(pairs, 2, 1)])
        y = [normed(f"blocks.{n}.norm2", v + linear(w, f"blocks.{n}.out", a)) for v, a in zip(x, attended, strict=True)]
        inner = [np.maximum(0, linear(w, f"blocks.{n}.feed.0", v)) for v in y]
        x = [r * (v + linear(w, f"blocks.{n}.feed.3", i)) for r, v, i in zip(real, y, inner, strict=True)]
    return w["items.weight"] @ normed("norm", x[-1])


@pytest.mark.parametrize("scale_items", [False, True])
def test_the_original_sasrec_attends_to_padding(scale_items):
    model = small("sasrec_original", noise=0.5, item_dim=D, num_layers=2, scale_items=scale_items)
    for history in [*OWN, list(range(1, 13))]:
        expected = original(weights_of(model), history, D**0.5 if scale_items else 1)
        found = model.scores(torch.tensor([history])).detach().numpy()[0]
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "lightsans", "duorec", "s3rec", "maerec"])
def test_dropout_inside_the_feed_forward_is_where_their_authors_have_it(name):
    block = small(name, dropout=0.25).blocks[0]
    assert block.dropout.p == 0.25 and block.feed[2].p == (0.25 if name in ("sasrec", "bert4rec") else 0)


def drawn(name: str, rounds: int = 1, data=None, train_targets: str = "all", stage: str = "train", **flags):
    """The model, the examples, and batches of all of them."""
    data = data or make_sequences(users=40, high=15)
    model, examples = small(name, data, noise=0.3, **flags), training_examples(data, train_targets, 12)
    model.stage = stage
    every, rng = np.arange(len(examples)), np.random.default_rng(0)
    return model, examples, [model.batch(examples, every, rng) for _ in range(rounds)]


# --- BERT4Rec ---


@pytest.mark.parametrize(
    ("train_targets", "last_prob"), [("all", 0.0), ("all", 0.3), ("last", 0.0), ("2", 0.0), ("2", 0.3)]
)
def test_masks_hide_what_is_asked_for(train_targets, last_prob):
    """Each place as often as its sequence's length says: of n places k are hidden with p, or one if that hides none."""
    rounds, p = 400, 0.3
    _, examples, batches = drawn("bert4rec", rounds, None, train_targets, mask_prob=p, last_prob=last_prob)
    before = examples.batch(np.arange(len(examples)))
    whole = torch.cat([before["histories"], before["targets"][:, -1:]], 1)
    places, expected = torch.zeros(whole.shape, dtype=torch.bool), torch.zeros(whole.shape)
    for row, (ids, targets) in enumerate(zip(whole.tolist(), before["targets"].tolist(), strict=True)):
        asked = [at + 1 for at, target in enumerate(targets) if target]
        first = next(at for at, item in enumerate(ids) if item)
        asked += [first] if asked[0] == first + 1 else []  # the first item of all, where its successor is asked for
        places[row, asked] = True
        expected[row, asked] = (1 - last_prob) * (p + (1 - p) ** len(asked) / len(asked))
        expected[row, -1] += last_prob
    found = torch.zeros(whole.shape)
    for batch in batches:
        hidden = batch["histories"] == MASK
        assert torch.equal(batch["targets"] != 0, hidden) and hidden.any(1).all() and not (hidden & ~places).any()
        assert torch.equal(torch.where(hidden, batch["targets"], batch["histories"]), whole)
        found += hidden / rounds
    assert (found - expected).abs().max() < 5 * 0.5 / rounds**0.5
    assert (found - expected)[places].mean().abs() < 0.01


@pytest.mark.parametrize("output_map", [True, False])
def test_the_loss_of_a_mask_is_that_of_what_both_sides_say(output_map):
    model, _, (batch,) = drawn("bert4rec", item_dim=D, output_map=output_map)
    w, expected = weights_of(model), []
    for ids, targets in zip(batch["histories"].tolist(), batch["targets"].tolist(), strict=True):
        first = next(t for t, item in enumerate(ids) if item)
        for state, target in zip(encode(w, read(w, ids[first:]), seeing(False)), targets[first:], strict=True):
            if target:
                expected.append(-np.log(softmax(w["items.weight"][1:] @ mapped(w, state))[target - 1]))
    assert model(batch)["ce"].item() == pytest.approx(np.mean(expected), rel=1e-5)


# --- LightSANs ---


def test_each_target_has_the_history_before_it():
    data = make_sequences(users=20, high=15)
    _, examples, (batch,) = drawn("lightsans", data=data)
    one = examples.single_targets(data.offsets, 12)
    expected = one.batch(np.arange(len(one)))
    found, wanted = (
        {(*h[h != 0].tolist(), t.item()) for h, t in zip(of["histories"], of["targets"][:, -1], strict=True)}
        for of in (batch, expected)
    )
    assert found == wanted and (batch["targets"][:, :-1] == 0).all() and len(batch["histories"]) == len(one)


def test_the_newest_state_needs_one_query_of_the_last_block():
    """The same vectors and gradients as where the last block computes every position."""
    model, found = small("lightsans", noise=0.3, num_layers=2), []
    for newest in (True, False):
        model.blocks[-1].newest = newest
        model.zero_grad()
        vectors = model.user_vectors(HISTORIES)
        (vectors**3).sum().backward()
        found.append([vectors.detach(), *(weight.grad for weight in model.parameters())])
    for one, every in zip(*found, strict=True):
        torch.testing.assert_close(one, every, rtol=1e-4, atol=1e-5)


# --- DuoRec ---


@pytest.mark.parametrize("B", [1, 4])
def test_info_nce_is_that_of_a_loop(B):
    views = torch.randn(2, B, 3)
    z, expected = views.double().flatten(0, 1).numpy(), []
    for i in range(2 * B):
        pair = z[i] @ z[(i + B) % (2 * B)] / 0.7
        expected.append(np.log(sum(np.exp(z[i] @ z[j] / 0.7) for j in range(2 * B) if j != i)) - pair)
    assert info_nce(*views, 0.7).item() == pytest.approx(np.mean(expected), rel=1e-5, abs=1e-6)


def test_both_views_lead_to_the_same_target():
    data = make_sequences(users=40, high=15)
    model, _, batches = drawn("duorec", 100, data, item_dim=D)
    lead: dict[int, dict[int, set]] = {}  # of each target and user the histories
    for user in data.users.tolist():
        items = data.items[data.offsets[user] : data.offsets[user + 1] - 2].tolist()
        for t in range(1, len(items)):
            lead.setdefault(items[t], {}).setdefault(user, set()).add(tuple(items[max(0, t - 12) : t]))
    seen: dict[tuple, set] = {}
    for batch in batches:
        for user, *rows in zip(*(batch[name] for name in ("users", "prefixes", "positives")), strict=True):
            view, other = (tuple(ids[ids != 0].tolist()) for ids in rows)
            (target,) = {target for target, by_user in lead.items() if view in by_user.get(user.item(), ())}
            seen.setdefault((target, user.item()), set()).add(other)
    for (target, user), drawn_ones in seen.items():
        others = set().union(*(histories for other, histories in lead[target].items() if other != user))
        assert drawn_ones <= (others or lead[target][user])
    for target in {target for target, _ in seen if len(lead[target]) > 1}:
        found = set().union(*(drawn_ones for (of, _), drawn_ones in seen.items() if of == target))
        assert found == set().union(*lead[target].values()), "every history is drawn, at some time"
    terms, w = model(batches[0]), weights_of(model)
    views = [
        np.stack([encode(w, read(w, row[row != 0].tolist()), seeing(True))[-1] for row in batches[0][name]])
        for name in ("prefixes", "positives")
    ]
    expected = info_nce(*map(torch.from_numpy, views), 1.0).item()
    assert terms.keys() == {"ce", "contrast"} and terms["contrast"].item() == pytest.approx(0.1 * expected, rel=1e-4)


# --- S3-Rec ---


@pytest.mark.parametrize("train_targets", ["all", "last"])
def test_pre_training_draws_every_prefix_whatever_targets_are_asked_for(train_targets):
    _, examples, batches = drawn("s3rec", 200, None, train_targets, stage="pretrain")
    row = int((examples.end - examples.start).argmax())
    longest = min(int(examples.end[row] - examples.start[row]) + 1, 12)
    assert {int((batch["items"][row] != 0).sum()) for batch in batches} == set(range(2, longest + 1))


def test_pre_training_hides_items_and_segments():
    model, _, batches = drawn("s3rec", 300, stage="pretrain")
    share, lengths, starts, foreign = 0, set(), set(), set()
    pairs = {(a, b) for a, b in zip(model.known[:-1].tolist(), model.known[1:].tolist(), strict=True)}
    for batch in batches:
        items, hidden = batch["items"], batch["hidden"]
        assert hidden[:, -1].all() and not (hidden & (items == 0)).any() and items.shape[1] <= 12
        share += hidden[:, :-1].sum().item() / (items[:, :-1] != 0).sum().item()
        for ids, context, segment, other in zip(
            *(batch[n].numpy() for n in ("items", "context", "segment", "elsewhere")), strict=True
        ):
            n, inside = (ids != 0).sum(), segment != np.where(ids != 0, MASK, 0)
            at = inside.nonzero()[0]
            assert (segment[at] == ids[at]).all() and (np.diff(at) == 1).all() and 1 <= len(at) <= max(1, n // 2)
            assert (context == np.where(inside, MASK, ids)).all() and (other[~inside] == segment[~inside]).all()
            assert all((a, b) in pairs for a, b in zip(other[at][:-1].tolist(), other[at][1:].tolist(), strict=True))
            if n == 8:
                lengths.add(len(at))
                starts.add(n - (len(ids) - at[0]))
            foreign |= set(other[at].tolist())
    assert share / 300 == pytest.approx(0.2, abs=0.02) and lengths == {1, 2, 3, 4} and starts == set(range(8))
    assert foreign == set(range(1, 41))


def test_the_losses_of_pre_training_are_those_of_the_equations(monkeypatch):
    monkeypatch.setattr("models.sr.s3rec.uniform_negatives", lambda targets, number, V: targets[:, None] % V + 1)
    weights = {"item": 1.5, "segment": 0.7, "masked_attribute": 0.3, "associated_attribute": 0.2}
    flags = {f"{task}_weight": weight for task, weight in weights.items()}
    model, _, (batch,) = drawn("s3rec", stage="pretrain", item_dim=D, **flags)
    terms, w, items, segments, attributes = model(batch), weights_of(model), [], [], {0: [], 1: []}
    pairs = set(map(tuple, make_sequences().attributes.tolist()))

    def states(ids):
        return encode(w, read(w, ids[ids != 0].tolist()), seeing(False))

    def loss(right, wrong):
        return -np.log(np.exp(sigma(right)) / (np.exp(sigma(right)) + np.exp(sigma(wrong))))

    hidden = torch.where(batch["hidden"], MASK, batch["items"])
    rows = [hidden, *(batch[name] for name in ("items", "hidden", "context", "segment", "elsewhere"))]
    for ids, own, places, context, segment, other in zip(*rows, strict=True):
        for state, item, place in zip(states(ids), own[own != 0].tolist(), places[own != 0].tolist(), strict=True):
            a = linear(w, "maps.item", state)
            items += [loss(a @ w["items.weight"][item], a @ w["items.weight"][item % 40 + 1])] * place
            p = sigma(
                w["attribute_vectors"] @ linear(w, f"maps.{'masked' if place else 'associated'}_attribute", state)
            )
            has = np.array([(item, number) in pairs for number in range(1, 6)])
            attributes[place] += [-np.where(has, np.log(p), np.log(1 - p)).sum()]
        a = linear(w, "maps.segment", states(context)[-1])
        segments.append(loss(a @ states(segment)[-1], a @ states(other)[-1]))
    sums = {"item": sum(items), "segment": sum(segments)}
    sums |= {"masked_attribute": sum(attributes[1]), "associated_attribute": sum(attributes[0])}
    expected = {name: weights[name] * value / len(segments) for name, value in sums.items()}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)
    sum(terms.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_a_dataset_without_attributes_goes_without_their_tasks():
    data = make_sequences()
    model, _, (batch,) = drawn("s3rec", stage="pretrain", data=replace(data, attributes=no_attributes()))
    assert model(batch).keys() == {"item", "segment"}
    with pytest.raises(UserError, match="needs two items"):
        small("s3rec", replace(data, num_items=1, attributes=no_attributes()))
    with_some = small("s3rec", data, noise=0.3)
    model.resize(with_some.state_dict())  # as `recommend.py` does, which has no dataset
    model.load_state_dict(with_some.state_dict())
    model.stage = "train"
    assert torch.equal(model.scores(HISTORIES), with_some.scores(HISTORIES))
    for odd in (torch.rand(3), torch.rand(3, 4)):
        model.resize({"attribute_vectors": odd})
        assert model.attribute_vectors.shape != odd.shape, "such weights are refused by their shape"


# --- MAERec ---


def test_the_graph_and_its_relation_scores_are_those_of_loops():
    model = small("maerec", noise=0.3, item_dim=D, graph_distance=2)
    A, E = graph(2), model.items.weight.detach().double().numpy()
    u, v = transitions(make_sequences().training_part(), 2)
    assert len(u) == A.sum() and A[u, v].all()
    cosine = [
        [E[i] @ E[j] / np.linalg.norm(E[i]) / np.linalg.norm(E[j]) if i and j else 0 for j in range(41)]
        for i in range(41)
    ]
    expected = (A * cosine).sum(1) / np.maximum(A.sum(1), 1)
    np.testing.assert_allclose(model.relation().detach().numpy(), expected, atol=1e-6)


def test_an_item_that_lost_all_its_edges_is_read_as_itself_alone():
    """Its loop is masked too; who had no edge at all, keeps it."""
    model, A = small("maerec", noise=0.3, item_dim=D, graph_distance=1), graph(1)
    u, v = model.edges
    left = (u != 7) & (v != 7) & ~((u + v) % 3 == 0)
    A[u[~left], v[~left]] = 0
    E, alone = model.items.weight.detach().double().numpy(), (A.sum(1) == 0) & (graph(1).sum(1) > 0)
    expected = sum(propagate(E, A))
    expected[alone] = E[alone]
    assert alone[7] and 0 < alone.sum() < 20
    found = sum(model.layers(model.edges[:, left])).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("depth", "prob"), [(1, 0.5), (2, 0.5), (3, 0.999999)])
def test_masked_paths_begin_at_the_seeds(depth, prob):
    model = small("maerec", graph_distance=1, mask_depth=depth, path_prob=prob)
    torch.manual_seed(1)
    masked, seeds = model.mask_paths(torch.tensor([3, 7])).numpy(), {3, 7}
    u, v = model.edges.numpy()
    found, reach = np.zeros(len(u), bool), seeds
    for hop in range(depth):
        all_met = np.isin(u, list(reach)) | np.isin(v, list(reach))
        reach = set(u[all_met]) | set(v[all_met])
        if hop == 0:
            assert masked[all_met].all(), "every edge of a seed"
        found |= all_met
    both = {(a, b) for a, b in model.edges.T[masked].tolist()}
    assert not masked[~found].any() and both == {(b, a) for a, b in both}
    assert (masked.sum() == found.sum()) == (depth == 1 or prob > 0.9)


def test_reconstruction_is_that_of_the_equations():
    model = small("maerec", noise=0.3, item_dim=D)
    layers, edges, w = model.layers(model.edges), model.edges[:, :5], weights_of(model)
    torch.manual_seed(2)
    found = model.reconstruction(layers, edges).item()
    torch.manual_seed(2)
    drawn, E, expected = torch.randint(1, 41, (5, 20)), [E.detach().double().numpy() for E in layers], []

    def s(u, v):
        e = np.concatenate([E[left][u] * E[right][v] for left in range(2) for right in range(2)])
        return sigma(linear(w, "decoder.2", np.maximum(0, linear(w, "decoder.0", e))))[0]

    for (u, v), others in zip(edges.T.tolist(), drawn.tolist(), strict=True):
        expected.append(np.log(np.exp(s(u, v)) + sum(np.exp(s(u, other)) for other in others)) - s(u, v))
    assert found == pytest.approx(np.mean(expected), rel=1e-5) and not model.reconstruction(layers, edges[:, :0])


def test_training_reads_what_the_mask_leaves_and_inference_the_whole_graph():
    model, _, (batch,) = drawn("maerec", item_dim=D, mask_seeds=3)
    whole, read_tables = model.item_vectors(), []
    hook = model.blocks[0].register_forward_pre_hook(lambda *args: read_tables.append(model.table.detach()))
    terms = model(batch)
    assert terms.keys() == {"ce", "recon", "mask"} and not torch.allclose(read_tables[0], whole) and model.table is None
    assert terms["mask"].item() == pytest.approx(-0.1 * model.relation()[1:].mean().item())
    sum(terms.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not model.items.weight.grad[0].any(), "the padding is no item"
    hook.remove()
    model.eval()
    before = model.scores(batch["histories"])
    with model.for_inference():
        torch.testing.assert_close(model.scores(batch["histories"]), before)
        assert torch.equal(model.table, whole)


def test_the_graph_travels_with_the_weights_and_a_damaged_one_is_refused():
    data = make_sequences()
    one, other = small("maerec", noise=0.3), small("maerec", make_sequences(users=8), noise=0.5)
    assert one.edges.shape != other.edges.shape
    other.resize(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.item_table(), one.item_table())
    for edges in (torch.tensor([[1, 0], [2, 3]]), torch.tensor([[1], [data.num_items + 1]]), torch.rand(2, 3) + 1):
        with pytest.raises(UserError, match="damaged: train it again"):
            other.resize({"edges": edges})
