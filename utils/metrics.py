"""Ranks and metrics: written once for every recommender.

A recommender is what `models/interface.py` says; this module uses its `score_blocks` and `for_inference`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from utils.candidates import Negatives, parts, seen_pairs
from utils.data import Examples, Sequences, sorted_batches, split_examples
from utils.errors import RunError
from utils.files import save_tensors

METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
# the metric on validation that chooses the weights: candidates and name, of `evaluate`
SelectBy = Literal[*(f"{kind}/{name}" for kind in ("sampled", "full") for name in METRICS)]
DEFAULT_SELECTION = "sampled/NDCG@10"
RANKS_FILE = "ranks.safetensors"  # of every test user, so that two runs can be compared user by user
DRAWS = 2000  # of a bootstrap
SCORES_AT_ONCE = 2**20  # entries of a block of scores: users x items never stands in memory


def ranks_from_scores(positive: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """rank = number of other candidates with score >= the positive's, so 0 is best and a tie counts against.

    positive (B, 1), others (B, C) with -inf where there is no candidate. Returns (B,) int64.
    """
    return (others >= positive).sum(1, dtype=torch.int32).long()  # int64 sums of long rows take six times as long


def metrics_of_users(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """HR@1/5/10, NDCG@5/10 and MRR of each user; ranks (users,) from 0."""
    gain = 1.0 / np.log2(ranks + 2.0)
    result = {f"HR@{k}": np.where(ranks < k, 1.0, 0.0) for k in (1, 5, 10)}
    result |= {f"NDCG@{k}": np.where(ranks < k, gain, 0.0) for k in (5, 10)}
    return result | {"MRR": 1.0 / (ranks + 1.0)}


def metrics_from_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Means of `metrics_of_users` over the users."""
    return {name: float(values.mean()) for name, values in metrics_of_users(ranks).items()}


def metrics_by_kind(ranks: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`metrics_from_ranks` among the candidates and among all items: {"sampled": {...}, "full": {...}}."""
    return {kind: metrics_from_ranks(found) for kind, found in ranks.items()}


def save_ranks(ranks: dict[str, np.ndarray], folder: Path) -> None:
    """The ranks (users,) of the test users, as `rank_users` returns them."""
    of_users = {f"test_{kind}": torch.from_numpy(found.astype(np.int32)) for kind, found in ranks.items()}
    save_tensors(of_users, folder / RANKS_FILE)


def paired_bootstrap(ranks: np.ndarray, others: np.ndarray, clusters: int = 1) -> tuple[float, float, float]:
    """Mean difference of NDCG@10 between two models, and the limits of its 95 % interval over users.

    ranks, others (users * clusters,): of the same users, seed after seed where there are several. Users are drawn with
    replacement, each with all its seeds.
    """
    gains = [metrics_of_users(r)["NDCG@10"].reshape(clusters, -1).mean(0) for r in (ranks, others)]
    [found] = bootstrap((gains[0] - gains[1])[None])
    return found


def bootstrap(values: np.ndarray) -> list[tuple[float, float, float]]:
    """Mean of each row of `values` (rows, users), and the limits of its 95 % interval over users.

    Users are drawn with replacement, the same ones for all rows.
    """
    rng, users = np.random.default_rng(0), values.shape[1]
    means = [values.take(rng.integers(0, users, users), axis=1).mean(1) for _ in range(DRAWS)]  # (rows,) each
    limits = np.quantile(means, [0.025, 0.975], axis=0)  # (2, rows)
    return list(map(tuple, np.vstack([values.mean(1), limits]).T.tolist()))


def rank_users(
    recommender: torch.nn.Module, data: Sequences, split: str, negatives: np.ndarray | Negatives, **options
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
    negatives: np.ndarray | Negatives,
    *,
    max_length: int,
    batch_size: int,
    batched_length: int | None = None,
    device: torch.device | str = "cpu",
    autocast: Callable = torch.no_grad,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
    together: bool = False,
) -> tuple[list[dict[str, np.ndarray]], float]:
    """`rank_users` by each of `count` scores that a recommender gives the items; and the seconds of all.

    score_blocks: as the recommender's own, but with `count` tensors of scores per block, which are overwritten one
    after another. negatives (users, N). batched_length: longer histories count as equally long when batches are
    formed. share: rank and number of the processes among which the users are shared; those of others get rank 0.
    together: each of these calls the recommender equally often, which a sharded base needs.
    """
    examples = split_examples(data, split, max_length)
    ranks = [{kind: np.zeros(len(examples), np.int64) for kind in ("sampled", "full")} for _ in range(count)]
    begun = time.perf_counter()
    users_at_once = max(16, SCORES_AT_ONCE // (data.num_items + 1))
    lengths = np.minimum(examples.lengths, batched_length or max_length)
    rank, processes = share
    own, user_parts = math.ceil(len(examples) / processes), parts(data, negatives.shape[1], processes)
    if len(user_parts) >= processes and not together:  # each draws only the candidates of its users
        user_parts, rank, processes = user_parts[rank::processes], 0, 1

    def scored(index: np.ndarray) -> Iterator[tuple[slice, Iterable[torch.Tensor]]]:
        batch = {name: values.to(device) for name, values in examples.batch(index).items()}
        return score_blocks(batch["histories"], batch["users"], users_at_once)

    bar = tqdm(total=own, desc=f"rank {split}", unit="user", disable=not progress, leave=False)
    with autocast(), recommender.for_inference(), bar:
        for part in user_parts:
            paused = time.perf_counter()
            drawn = negatives[part]
            begun += time.perf_counter() - paused  # candidates are drawn once for all models: not their time
            batches = list(sorted_batches(lengths[part], min(batch_size, own)))
            for within in batches[rank::processes]:
                index = part.start + within
                for block, several in scored(index):
                    for found, scores in zip(ranks, several, strict=True):
                        of_block = rank_block(scores, data, examples, index[block], drawn[within[block]])
                        found["sampled"][index[block]], found["full"][index[block]] = of_block
                bar.update(len(index))
            if together and len(batches[rank::processes]) < len(batches[::processes]):
                next(scored(part.start + batches[0]))
    return ranks, time.perf_counter() - begun


def rank_block(
    scores: torch.Tensor,
    data: Sequences,
    examples: Examples,
    index: np.ndarray,
    negatives: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sampled and full ranks (b,) of the examples `index`.

    scores (b, V + 1), which are overwritten; negatives (b, N).
    """
    scores[:, 0] = 0  # padding is no candidate, and a part of the columns would be copied
    low, high = torch.aminmax(scores)
    if not (low > -torch.inf and high < torch.inf):  # neither holds for NaN
        raise RunError("scores are not finite: the model has diverged; lower --learning_rate")

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(scores.device)

    target = on_device(data.items[examples.end[index]])[:, None]  # (b, 1)
    positive = scores.gather(1, target)  # (b, 1)
    scores[:, 0] = -torch.inf
    sampled = ranks_from_scores(positive, scores.gather(1, on_device(negatives)))
    row, item = seen_pairs(data, data.users[index], examples.end[index])
    scores[on_device(row), on_device(item)] = -torch.inf
    scores.scatter_(1, target, -torch.inf)
    return sampled.cpu().numpy(), ranks_from_scores(positive, scores).cpu().numpy()


def evaluate(
    recommender: torch.nn.Module, data: Sequences, split: str, negatives: np.ndarray | Negatives, **options
) -> tuple[dict, float]:
    """`rank_users` turned into {"sampled": {...}, "full": {...}}, with the seconds it took."""
    ranks, seconds = rank_users(recommender, data, split, negatives, **options)
    return metrics_by_kind(ranks), seconds
