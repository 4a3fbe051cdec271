"""Candidates, ranks and metrics: written once for every recommender.

A recommender is what `models/interface.py` says; this module uses its `score_blocks` and `for_inference`.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from utils.data import Examples, Sequences, sorted_batches, split_examples
from utils.errors import RunError
from utils.files import save_tensors

NUM_NEGATIVES = 999
CANDIDATE_SEED = 20240527  # candidates have a seed of their own: a run's --seed never changes who is ranked
SPLITS = ("valid", "test")
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
# the metric on validation that chooses the weights: candidates and name, of `evaluate`
SelectBy = Literal[*(f"{kind}/{name}" for kind in ("sampled", "full") for name in METRICS)]
DEFAULT_SELECTION = "sampled/NDCG@10"
RANKS_FILE = "ranks.safetensors"  # of every test user, so that two runs can be compared user by user
SCORES_AT_ONCE = 2**20  # entries of a block of scores: users x items never stands in memory


def draw_negatives(data: Sequences, split: str, num: int = NUM_NEGATIVES, seed: int = CANDIDATE_SEED) -> np.ndarray:
    """Draw `num` negatives per kept user, uniform without replacement over the items outside the user's sequence.

    Returns (users, num) int32. Depends on the data, the split and the seed alone, so every model is ranked on the
    same candidates. A user with fewer unseen items gets all of them, and 0 in the places left over.

    Ids are drawn with replacement and kept in order when neither seen nor drawn before, which is the same
    distribution; `first` remembers, per user and item, the position of the first draw (or that it was seen).
    """
    width = data.num_items + 1
    rows_at_once, rows_in_cache = max(1, 2**24 // width), max(1, 2**18 // width)
    out = np.zeros((len(data.users), num), np.int32)
    firsts = np.empty((min(rows_at_once, len(data.users)), width), np.int32)
    for block, low in enumerate(range(0, len(data.users), rows_at_once)):
        users = data.users[low : low + rows_at_once]
        rng = np.random.default_rng([seed, SPLITS.index(split), block])
        seen_row, seen_item = seen_pairs(data, users, data.offsets[users + 1])
        first = firsts[: len(users)]
        first.fill(-1)  # not drawn
        first[seen_row, seen_item] = -2
        wanted = np.minimum((first[:, 1:] == -1).sum(1), num)
        first = first.reshape(-1)  # (users * width,)
        filled = np.zeros(len(users), np.int64)
        rows = np.arange(len(users))
        drawn = 0
        while len(rows):
            all_draws = rng.integers(1, width, (len(rows), num + num // 8 + 8), dtype=np.int32)
            position = drawn + np.arange(all_draws.shape[1], dtype=np.int32)
            for at in range(0, len(rows), rows_in_cache):
                part, draws = rows[at : at + rows_in_cache], all_draws[at : at + rows_in_cache]
                cell = part[:, None] * width + draws  # (part, draws) in `first`
                # Of equal places the one written last stays: backwards (in memory too, NumPy would turn a view round
                # again), it is the first one drawn.
                backwards = cell[:, ::-1].copy()
                known = first[backwards]
                first[backwards] = np.where(known == -1, position[::-1], known)
                fresh = first[cell] == position
                slot = filled[part][:, None] + np.cumsum(fresh, 1) - 1
                row_of, col_of = np.nonzero(fresh & (slot < wanted[part][:, None]))
                out[low + part[row_of], slot[row_of, col_of]] = draws[row_of, col_of]
                filled[part] += np.bincount(row_of, minlength=len(part))
            drawn += all_draws.shape[1]
            rows = rows[filled[rows] < wanted[rows]]
    return out


def seen_pairs(data: Sequences, users: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and item ids of all that `users` touched before position `stop` of the flat array: two (pairs,) arrays."""
    counts = stop - data.offsets[users]
    row = np.repeat(np.arange(len(users)), counts)
    position = np.arange(counts.sum()) + np.repeat(data.offsets[users] - (np.cumsum(counts) - counts), counts)
    return row, data.items[position]


def ranks_from_scores(positive: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """rank = number of other candidates with score >= the positive's, so 0 is best and a tie counts against.

    positive (B, 1), others (B, C) with -inf where there is no candidate. Returns (B,) int64.
    """
    return (others >= positive).sum(1)


def metrics_of_users(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """HR@1/5/10, NDCG@5/10 and MRR of each user; ranks (users,) from 0."""
    gain = 1.0 / np.log2(ranks + 2.0)
    result = {f"HR@{k}": np.where(ranks < k, 1.0, 0.0) for k in (1, 5, 10)}
    result |= {f"NDCG@{k}": np.where(ranks < k, gain, 0.0) for k in (5, 10)}
    return result | {"MRR": 1.0 / (ranks + 1.0)}


def metrics_from_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Means of `metrics_of_users` over the users."""
    return {name: float(values.mean()) for name, values in metrics_of_users(ranks).items()}


def save_ranks(ranks: dict[str, np.ndarray], folder: Path) -> None:
    """The ranks (users,) of the test users, as `rank_users` returns them."""
    of_users = {f"test_{kind}": torch.from_numpy(found.astype(np.int32)) for kind, found in ranks.items()}
    save_tensors(of_users, folder / RANKS_FILE)


def paired_bootstrap(
    ranks: np.ndarray, others: np.ndarray, clusters: int = 1, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of NDCG@10 between two models, and the limits of its 95 % interval over users.

    ranks, others (users * clusters,): of the same users, seed after seed where there are several. Users are drawn with
    replacement, each with all its seeds.
    """
    gains = [metrics_of_users(r)["NDCG@10"].reshape(clusters, -1).mean(0) for r in (ranks, others)]
    [found] = bootstrap((gains[0] - gains[1])[None], draws, seed)
    return found


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> list[tuple[float, float, float]]:
    """Mean of each row of `values` (rows, users), and the limits of its 95 % interval over users.

    Users are drawn with replacement, the same ones for all rows.
    """
    rng, users = np.random.default_rng(seed), values.shape[1]
    means = [values.take(rng.integers(0, users, users), axis=1).mean(1) for _ in range(draws)]  # (rows,) each
    limits = np.quantile(means, [0.025, 0.975], axis=0)  # (2, rows)
    return list(map(tuple, np.vstack([values.mean(1), limits]).T.tolist()))


def rank_users(
    recommender: torch.nn.Module, data: Sequences, split: str, negatives: np.ndarray, **options
) -> tuple[dict[str, np.ndarray], float]:
    """Rank every kept user's held-out item, among `negatives` (sampled) and in the whole catalogue (full).

    In the full ranking the items of the user's history are masked. options: of `rank_each`. Returns
    {"sampled": (users,), "full": (users,)} and the seconds it took. Raises RunError on a score that is not finite.
    """

    def score_blocks(*batch) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        return ((block, [scores]) for block, scores in recommender.score_blocks(*batch))

    [ranks], seconds = rank_each(recommender, score_blocks, 1, data, split, negatives, **options)
    return ranks, seconds


@torch.inference_mode()
def rank_each(
    recommender: torch.nn.Module,
    score_blocks: Callable[[torch.Tensor, torch.Tensor, int], Iterator[tuple[slice, Iterable[torch.Tensor]]]],
    count: int,
    data: Sequences,
    split: str,
    negatives: np.ndarray,
    *,
    max_length: int,
    batch_size: int,
    batched_length: int | None = None,
    device: torch.device | str = "cpu",
    autocast: Callable = torch.no_grad,
    progress: bool = False,
) -> tuple[list[dict[str, np.ndarray]], float]:
    """`rank_users` by each of `count` scores that a recommender gives the items; and the seconds of all.

    score_blocks: as the recommender's own, but with `count` tensors of scores per block, which are overwritten one
    after another. batched_length: users whose histories differ in earlier items alone are batched as alike.
    """
    examples = split_examples(data, split, max_length)
    ranks = [{kind: np.zeros(len(examples), np.int64) for kind in ("sampled", "full")} for _ in range(count)]
    begun = time.perf_counter()
    users_at_once = max(64, SCORES_AT_ONCE // (data.num_items + 1))
    batches = list(sorted_batches(np.minimum(examples.lengths, batched_length or max_length), batch_size))
    with autocast(), recommender.for_inference():
        for index in tqdm(batches, desc=f"rank {split}", unit="batch", disable=not progress, leave=False):
            batch = {name: values.to(device) for name, values in examples.batch(index).items()}
            for block, several in score_blocks(batch["histories"], batch["users"], users_at_once):
                for found, scores in zip(ranks, several, strict=True):
                    part = rank_block(scores, data, examples, index[block], negatives)
                    found["sampled"][index[block]], found["full"][index[block]] = part
    return ranks, time.perf_counter() - begun


def rank_block(
    scores: torch.Tensor,
    data: Sequences,
    examples: Examples,
    index: np.ndarray,
    negatives: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sampled and full ranks (b,) of the examples `index`.

    scores (b, V + 1), which are overwritten; negatives of all users.
    """
    low, high = torch.aminmax(scores[:, 1:])
    if not (low > -torch.inf and high < torch.inf):  # neither holds for NaN
        raise RunError("scores are not finite: the model has diverged; lower --learning_rate")

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(scores.device)

    target = on_device(data.items[examples.end[index]])[:, None]  # (b, 1)
    positive = scores.gather(1, target)  # (b, 1)
    scores[:, 0] = -torch.inf  # padding is no candidate
    sampled = ranks_from_scores(positive, scores.gather(1, on_device(negatives[index])))
    row, item = seen_pairs(data, data.users[index], examples.end[index])
    scores[on_device(row), on_device(item)] = -torch.inf
    scores.scatter_(1, target, -torch.inf)
    return sampled.cpu().numpy(), ranks_from_scores(positive, scores).cpu().numpy()


def evaluate(
    recommender: torch.nn.Module, data: Sequences, split: str, negatives: np.ndarray, **options
) -> tuple[dict, float]:
    """`rank_users` turned into {"sampled": {...}, "full": {...}}, with the seconds it took."""
    ranks, seconds = rank_users(recommender, data, split, negatives, **options)
    return {kind: metrics_from_ranks(values) for kind, values in ranks.items()}, seconds
