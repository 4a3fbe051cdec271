"""Candidates, ranks and metrics against naive loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences, sasrec, tiny_llm_rec

from models.interface import Recommender
from models.sr.popularity import Popularity
from utils import candidates, metrics
from utils.candidates import Negatives, draw_negatives, parts
from utils.checked import read_json
from utils.data import training_examples
from utils.errors import RunError, UserError
from utils.files import save_tensors, write_json
from utils.metrics import METRICS, RANKS_FILE, evaluate, metrics_from_ranks, paired_bootstrap, rank_users, save_ranks
from utils.report import compare_ranks


class Table(Recommender):
    """Scores that are a fixed function of user and item; the user is told by the newest item of the history."""

    def __init__(self, scores: np.ndarray):
        super().__init__(None, None)
        self.table = torch.from_numpy(scores).float()  # (V + 1, V + 1)

    def user_vectors(self, histories, users=None):
        return torch.nn.functional.one_hot(histories[:, -1], len(self.table)).float()

    def item_vectors(self):
        return self.table.T


def naive_ranks(data, scores, split, negatives):
    ranks = {"sampled": [], "full": []}
    for n, u in enumerate(data.users):
        sequence = data.items[data.offsets[u] : data.offsets[u + 1]].tolist()
        cut = {"valid": -2, "test": -1}[split]
        history, target = sequence[:cut], sequence[cut]
        row = scores[history[-1]]
        ranks["sampled"].append(sum(row[i] >= row[target] for i in negatives[n].tolist() if i))
        others = set(range(1, data.num_items + 1)) - set(history) - {target}
        ranks["full"].append(sum(row[i] >= row[target] for i in others))
    return ranks


@pytest.mark.parametrize("split", ["valid", "test"])
def test_ranks_and_metrics_equal_a_naive_loop(sequences, split):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 12, (41, 41)).astype(float)  # many ties
    negatives = draw_negatives(sequences, split, num=9)
    naive = naive_ranks(sequences, scores, split, negatives)
    got, _ = rank_users(Table(scores), sequences, split, negatives, max_length=30, batch_size=7)
    assert got["sampled"].tolist() == naive["sampled"] and got["full"].tolist() == naive["full"]
    metrics, _ = evaluate(Table(scores), sequences, split, negatives, max_length=30, batch_size=64)
    for kind, ranks in naive.items():
        for k in (1, 5, 10):
            assert metrics[kind][f"HR@{k}"] == pytest.approx(sum(r < k for r in ranks) / len(ranks))
        for k in (5, 10):
            expected = sum(1 / math.log2(r + 2) for r in ranks if r < k) / len(ranks)
            assert metrics[kind][f"NDCG@{k}"] == pytest.approx(expected)
        assert metrics[kind]["MRR"] == pytest.approx(sum(1 / (r + 1) for r in ranks) / len(ranks))


def test_a_constant_scorer_hits_nothing(sequences):
    """Fault 8: in the released code equal scores for all give HR@1 = 1."""
    negatives = draw_negatives(sequences, "test", num=19)
    metrics, _ = evaluate(Table(np.ones((41, 41))), sequences, "test", negatives, max_length=30, batch_size=8)
    assert metrics["sampled"]["HR@1"] == metrics["full"]["HR@1"] == 0
    assert metrics["sampled"]["HR@10"] == metrics["full"]["HR@10"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(sequences, bad):
    scores = np.ones((41, 41))
    scores[:, 17] = bad
    negatives = draw_negatives(sequences, "test", num=9)
    with pytest.raises(RunError, match="not finite"):
        rank_users(Table(scores), sequences, "test", negatives, max_length=30, batch_size=8)


def test_candidates_are_distinct_unseen_and_everybody_gets_the_same(sequences):
    """Fault 4: redrawn at every access, unseeded."""
    negatives = draw_negatives(sequences, "test", num=20)
    assert (negatives == draw_negatives(sequences, "test", num=20)).all()
    assert (negatives != draw_negatives(sequences, "valid", num=20)).any()
    assert (negatives != draw_negatives(sequences, "test", num=20, seed=1)).any()
    for n, u in enumerate(sequences.users):
        seen = set(sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]].tolist())
        row = negatives[n].tolist()
        assert len(set(row)) == 20 and not seen & set(row) and min(row) >= 1 and max(row) <= 40
    torch.manual_seed(3)
    np.random.seed(3)
    assert (negatives == draw_negatives(sequences, "test", num=20)).all()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_candidates_drawn_part_by_part_are_those_drawn_at_once(monkeypatch, split):
    """Three blocks of 16 users and one of 2, of which a part holds one or two."""
    data = make_sequences(users=50, num_items=2**20 - 1, low=3, high=9)
    whole = draw_negatives(data, split, num=6)
    for at_once, sizes in ((1, [16, 16, 16, 2]), (6 * 33, [32, 18]), (2**27, [50])):
        monkeypatch.setattr(candidates, "NEGATIVES_AT_ONCE", at_once)
        lazy, drawn = Negatives(data, split, num=6), []
        for _ in range(2):  # drawn, then kept
            drawn = [lazy[part] for part in parts(data, 6)]
            assert [len(rows) for rows in drawn] == sizes and (np.concatenate(drawn) == whole).all()
            monkeypatch.setattr(candidates, "draw_negatives", None)
        monkeypatch.undo()
        in_memory = [kept for kept in lazy.kept.values() if not isinstance(kept, int)]
        assert len(in_memory) == (len(sizes) == 1)  # what is drawn in parts waits in a file


def test_candidates_without_room_in_a_file_are_drawn_again(monkeypatch):
    data = make_sequences(users=50, num_items=2**20 - 1, low=3, high=9)
    monkeypatch.setattr(candidates, "NEGATIVES_AT_ONCE", 1)
    monkeypatch.setattr(candidates.tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    lazy, whole = Negatives(data, "test", num=600), draw_negatives(data, "test", num=600)
    for _ in range(2):
        assert (np.concatenate([lazy[part] for part in parts(data, 600)]) == whole).all()


def test_a_part_that_is_no_whole_blocks_is_refused():
    """Its candidates would be others."""
    data = make_sequences(users=50, num_items=2**20 - 1, low=3, high=9)
    for part in (slice(3, 16), slice(16, 40), slice(0, 20)):
        with pytest.raises(ValueError, match="no whole blocks of 16"):
            Negatives(data, "test", num=6)[part]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("users", [5, 100, 1000])
def test_parts_are_alike_in_size_for_any_number_of_processes(processes, users, monkeypatch):
    monkeypatch.setattr(candidates, "block_size", lambda num_items: 10)
    monkeypatch.setattr(candidates, "NEGATIVES_AT_ONCE", 6 * 200)
    found = parts(make_sequences(users=users), 6, processes)
    assert [at for part in found for at in range(users)[part]] == list(range(users))
    sizes = [part.stop - part.start for part in found]
    assert max(sizes) <= 200 and all(size == sizes[0] for size in sizes[:-1]) and sizes[0] >= sizes[-1]
    if len(found) >= processes:
        shares = [sum(sizes[rank::processes]) for rank in range(processes)]
        assert max(shares) <= users / processes + 10 * len(found)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("at_once", "block"), [(1, 9), (2**27, 9), (2**27, 50)])
def test_users_shared_among_processes_are_ranked_once_each(monkeypatch, world, at_once, block):
    """The sum over the processes is what one ranks alone, also where some have no user of a part."""
    monkeypatch.setattr(candidates, "block_size", lambda num_items: block)
    monkeypatch.setattr(candidates, "NEGATIVES_AT_ONCE", at_once)
    data = make_sequences(users=41, num_items=40)
    model, how = Table(np.random.default_rng(0).random((41, 41))), {"max_length": 30, "batch_size": 8}
    alone, _ = rank_users(model, data, "test", draw_negatives(data, "test", num=19), **how)
    shares, drawn = [], []
    for rank in range(world):
        negatives = Negatives(data, "test", 19)
        shares.append(rank_users(model, data, "test", negatives, **how, share=(rank, world))[0])
        drawn.append(sum(high - low for low, high in negatives.kept))
    for kind, ranks in alone.items():
        assert (sum(share[kind] for share in shares) == ranks).all()
        assert sum(np.count_nonzero(share[kind]) for share in shares) == np.count_nonzero(ranks) > 20
    if len(parts(data, 19, world)) >= world:
        assert sum(drawn) == 41  # each draws for its own users alone


def test_candidates_are_uniform_over_unseen_items():
    data = make_sequences(users=4000, num_items=30, low=5, high=5)
    data.items[:] = np.tile([3, 7, 11, 19, 30], 4000)  # everybody saw the same five
    unseen = np.delete(np.arange(30), [2, 6, 10, 18, 29])
    everywhere, first = [], []
    for seed in range(20):
        negatives = draw_negatives(data, "test", num=6, seed=seed)
        counts = np.bincount(negatives.ravel(), minlength=31)[1:]
        assert counts.sum() == counts[unseen].sum() == 24000
        everywhere.append(((counts[unseen] - 960) ** 2).sum() / (960 * (1 - 6 / 25)) * 24 / 25)
        first.append(((np.bincount(negatives[:, 0], minlength=31)[1:][unseen] - 160) ** 2).sum() / 160)
    # chi-squared with 24 degrees of freedom: mean 24, of which a mean of 20 strays by 1.55
    assert abs(np.mean(everywhere) - 24) < 5 and abs(np.mean(first) - 24) < 5


def test_users_with_few_unseen_items_get_all_of_them():
    data = make_sequences(users=10, num_items=14, low=6, high=10)
    negatives = draw_negatives(data, "test", num=999)
    for n, u in enumerate(data.users):
        seen = set(data.items[data.offsets[u] : data.offsets[u + 1]].tolist())
        row = negatives[n][negatives[n] != 0].tolist()
        assert sorted(row) == sorted(set(range(1, 15)) - seen)


def counted(data) -> Popularity:
    return Popularity(None, data.training_part())


@pytest.mark.parametrize("make", [sasrec, lambda data: tiny_llm_rec(), counted])
def test_batch_size_changes_no_rank(sequences, make):
    """Fault 6: and every recommender answers the same interface."""
    model = make(sequences).eval()
    negatives = draw_negatives(sequences, "test", num=19)
    results = [rank_users(model, sequences, "test", negatives, max_length=30, batch_size=b)[0] for b in (1, 7, 64)]
    for other in results[1:]:
        assert (other["sampled"] == results[0]["sampled"]).all() and (other["full"] == results[0]["full"]).all()


def test_ranks_by_blocks_of_users_are_those_of_all_at_once(monkeypatch):
    data = make_sequences(users=300)
    model, negatives = sasrec(data).eval(), draw_negatives(data, "test", num=19)
    how = {"max_length": 30, "batch_size": 300}
    whole, _ = rank_users(model, data, "test", negatives, **how)
    sizes, rank_block = [], metrics.rank_block
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(metrics, "rank_block", lambda *a: sizes.append(len(a[0])) or rank_block(*a))
    blocks, _ = rank_users(model, data, "test", negatives, **how)
    assert sizes == [16] * 18 + [12]
    assert (whole["full"] == blocks["full"]).all() and (whole["sampled"] == blocks["sampled"]).all()


def test_sasrec_learns_with_a_sampled_softmax():
    data = make_sequences(users=64, num_items=40)
    counts = torch.from_numpy(data.training_part().counts())
    model = sasrec(data, max_seq_length=12, num_layers=1, dropout=0.0, num_negatives=30)
    q = model.log_q.exp()
    expected = (counts[1:].double() + 1) ** 0.75
    assert q[0] == 0 and torch.allclose(q[1:].double(), expected / expected.sum(), rtol=1e-5)
    examples = training_examples(data, "all", 12)
    batch = examples.batch(np.arange(len(examples)))
    target_mask = batch["targets"] != 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def whole() -> float:
        with torch.no_grad():
            logits = model.states(batch["histories"])[target_mask] @ model.items.weight[1:].T
            return torch.nn.functional.cross_entropy(logits, batch["targets"][target_mask] - 1).item()

    before = whole()
    for _ in range(60):
        terms = model(batch)
        assert set(terms) == {"sampled_ce"}
        optimizer.zero_grad()
        terms["sampled_ce"].backward()
        optimizer.step()
    assert whole() < 0.6 * before, "the whole cross-entropy falls, which the sampled one estimates"
    assert "log_q" not in model.state_dict()


def test_metrics_are_means_over_users_not_over_batches():
    ranks = np.array([0] * 10 + [500])
    assert metrics_from_ranks(ranks)["HR@1"] == pytest.approx(10 / 11)


def test_sasrec_padding_is_attended_by_nobody(sequences):
    """Fault 5: the released mask compares embeddings with 0, so padding takes part."""
    model = sasrec(sequences).eval()
    short = torch.tensor([[5, 8, 13]])
    padded = torch.nn.functional.pad(short, (27, 0))
    assert torch.allclose(model.user_vectors(short), model.user_vectors(padded), atol=1e-6)
    before = model.user_vectors(padded)
    with torch.no_grad():
        model.items.weight[0] = 100.0
    assert torch.allclose(model.user_vectors(padded), before, atol=1e-6)


def test_sasrec_trains_the_same_in_groups_of_like_lengths(sequences, monkeypatch):
    examples = training_examples(sequences, "all", 30)
    batch = examples.batch(np.random.default_rng(0).permutation(len(examples))[:40])
    target_mask, widths = batch["targets"] != 0, []
    model = sasrec(sequences).eval()
    scores = model.states(batch["histories"])[target_mask] @ model.items.weight[1:].T
    plain = torch.nn.functional.cross_entropy(scores, batch["targets"][target_mask] - 1)
    model.blocks[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:2]))
    monkeypatch.setattr("models.sr.objectives.GROUP", 16)
    monkeypatch.setattr("models.sr.objectives.PADDED", 3)
    grouped = model(batch)["ce"]
    assert [users for users, _ in widths] == [16, 16, 8] and widths[0][1] < widths[2][1]
    assert grouped.item() == pytest.approx(plain.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (grouped, plain)]
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_sasrec_never_looks_ahead(sequences):
    model = sasrec(sequences).eval()
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    assert torch.allclose(model.states(a)[:, :3], model.states(b)[:, :3], atol=1e-6)
    assert not torch.allclose(model.states(a)[:, 3], model.states(b)[:, 3], atol=1e-3)


def test_the_paired_bootstrap_draws_users_with_all_their_seeds():
    """Two seeds whose differences cancel in each user leave nothing to be uncertain of; a constant one neither."""
    rng = np.random.default_rng(0)
    ranks, others = rng.integers(0, 30, 400), rng.integers(0, 30, 400)
    gain = [0.0 if rank >= 10 else 1 / math.log2(rank + 2) for rank in ranks]
    less = [0.0 if rank >= 10 else 1 / math.log2(rank + 2) for rank in others]
    mean, low, high = paired_bootstrap(ranks, others)
    assert mean == pytest.approx(sum(a - b for a, b in zip(gain, less, strict=True)) / 400)
    drawn = [np.mean([gain[u] - less[u] for u in rng.integers(0, 400, 400)]) for _ in range(1000)]
    assert [low, high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), abs=0.006)
    assert low < mean < high and high - low > 0.05
    twice = np.concatenate([ranks, others]), np.concatenate([others, ranks])
    assert paired_bootstrap(*twice, clusters=2) == pytest.approx((0, 0, 0))
    assert paired_bootstrap(np.zeros(50), np.full(50, 99)) == pytest.approx((1, 1, 1))


def naive_values(metric: str, ranks: np.ndarray) -> list[float]:
    name, _, k = metric.partition("@")
    gain = {"HR": lambda r: 1.0, "NDCG": lambda r: 1 / math.log2(r + 2), "MRR": lambda r: 1 / (r + 1)}[name]
    return [gain(rank) if rank < float(k or "inf") else 0.0 for rank in ranks.tolist()]


def folder_with(ranks: dict[str, np.ndarray], folder, **changes) -> Path:
    """What `compare_ranks` reads of a finished run. changes: of config.json and of the protocol."""
    folder.mkdir()
    save_ranks(ranks, folder)
    config = {"run_id": folder.name, "dataset": "tiny", "dataset_fingerprint": "0" * 64} | changes
    protocol = {"users": len(ranks["full"]), "sampled": changes.get("sampled", "seed 1")}
    found = {kind: metrics_from_ranks(of_kind) for kind, of_kind in ranks.items()}
    write_json(config, folder / "config.json")
    write_json({"run_id": folder.name, "protocol": protocol, "test": found}, folder / "metrics.json")
    return folder


def drawn_ranks(seed: int, users: int = 300) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {kind: rng.integers(0, high, users) for kind, high in (("sampled", 20), ("full", 60))}


def test_two_runs_are_compared_by_every_metric(tmp_path):
    """Against one user after the other, and another bootstrap: other draws, other code."""
    ranks = [drawn_ranks(seed) for seed in (1, 2)]
    rows = compare_ranks(*(folder_with(of_run, tmp_path / f"{n}") for n, of_run in enumerate(ranks)))
    assert [(row["metric"], row["kind"]) for row in rows] == [(m, k) for k in ("sampled", "full") for m in METRICS]
    rng = np.random.default_rng(7)
    drawn = [rng.integers(0, 300, 300) for _ in range(1500)]
    for row in rows:
        a, b = (np.array(naive_values(row["metric"], of_run[row["kind"]])) for of_run in ranks)
        assert [row["a"], row["b"]] == pytest.approx([sum(a) / 300, sum(b) / 300])
        assert row["difference"] == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 300)
        means = [(a[users] - b[users]).mean() for users in drawn]
        spread = np.std(means)
        assert row["low"] == pytest.approx(np.quantile(means, 0.025), abs=0.35 * spread)
        assert row["high"] == pytest.approx(np.quantile(means, 0.975), abs=0.35 * spread)
        if row["metric"] == "NDCG@10":
            expected = paired_bootstrap(*(of_run[row["kind"]] for of_run in ranks))
            assert (row["difference"], row["low"], row["high"]) == expected
    itself = compare_ranks(tmp_path / "0", tmp_path / "0")
    assert {row[name] for row in itself for name in ("difference", "low", "high")} == {0.0}


def damage(folder: Path, how: str) -> None:
    path, ranks = folder / RANKS_FILE, {k: v.astype(np.int32) for k, v in drawn_ranks(2).items()}
    whole = {f"test_{kind}": torch.from_numpy(of_kind) for kind, of_kind in ranks.items()}
    found = read_json(folder / "metrics.json", "")
    if how == "no ranks":
        path.unlink()
    elif how == "half a file":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "unfinished":
        write_json(found | {"run_id": "earlier"}, folder / "metrics.json")
    elif how == "odd metrics":
        write_json(found | {"test": ["none"]}, folder / "metrics.json")
    elif how == "odd protocol":
        write_json(found | {"protocol": 3}, folder / "metrics.json")
    else:
        changes = {
            "one kind": lambda: whole.pop("test_full"),
            "a user less": lambda: whole.update(test_full=whole["test_full"][1:]),
            "two columns": lambda: whole.update(test_full=whole["test_full"][:, None]),
            "below 0": lambda: whole["test_full"].neg_(),
            "not a number": lambda: whole.update(test_full=whole["test_full"] * math.nan),
            "bfloat16": lambda: whole.update(test_full=whole["test_full"].bfloat16()),
            "another run's": lambda: whole.update(test_full=torch.from_numpy(drawn_ranks(3)["full"])),
        }
        changes[how]()
        save_tensors(whole, path)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no ranks", "holds no ranks of users"),
        ("half a file", "is damaged"),
        ("unfinished", "holds no finished run"),
        ("one kind", "has no 'test_full'"),
        *((how, "do not belong together") for how in ("a user less", "two columns", "below 0")),
        ("not a number", "test_full holds NaN"),
        *((how, "do not belong together") for how in ("bfloat16", "another run's")),
        ("odd metrics", r"metrics\.json: test is list of 1, expected an object"),
        ("odd protocol", r"metrics\.json: protocol is 3, expected an object"),
    ],
)
def test_folders_that_cannot_be_compared_are_told(how, told, second, tmp_path, recwarn):
    whole, damaged = folder_with(drawn_ranks(1), tmp_path / "a"), folder_with(drawn_ranks(2), tmp_path / "b")
    damage(damaged, how)
    with pytest.raises(UserError, match=told) as error:
        compare_ranks(*([whole, damaged] if second else [damaged, whole]))
    assert "\n" not in str(error.value) and str(damaged) in str(error.value) and not recwarn.list


def test_ranks_of_other_users_or_candidates_are_not_compared(tmp_path):
    one = folder_with(drawn_ranks(1), tmp_path / "one")
    other = folder_with(drawn_ranks(1), tmp_path / "other", dataset="else", dataset_fingerprint="1" * 64)
    with pytest.raises(UserError, match=r"one is of tiny, .*other of else.*ranks of the same users"):
        compare_ranks(one, other)
    again = folder_with(drawn_ranks(1), tmp_path / "again", sampled="seed 2")
    with pytest.raises(UserError, match=r"one ranked seed 1, .*again seed 2: train the older one again"):
        compare_ranks(one, again)
    with pytest.raises(UserError, match="holds no finished run"):
        compare_ranks(one, tmp_path / "none")
