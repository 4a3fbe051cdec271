"""The baseline without training that knows what follows what: next-item counts, decayed by distance."""

import warnings

import torch

from models.interface import Recommender
from utils.data import TrainingPart

DECAY, REACH = 0.5, 5  # per step of distance; steps between two items of a user that are counted


class Transitions(Recommender):
    """The score of item j sums DECAY^a P(j | item of age a) over the history, the newest item having age 0.

    P(j | i) is in proportion to the sum of DECAY^(distance - 1) over the times that j came at most REACH after i. A
    millionth of its popularity is added, which ranks what follows nothing in the history.
    """

    def __init__(self, config: Recommender.Config | None, data: TrainingPart) -> None:
        super().__init__(config, data)
        users, items, size = torch.from_numpy(data.users), torch.from_numpy(data.items).long(), data.num_items + 1
        counts, found = torch.from_numpy(data.counts()).float(), []
        for distance in range(1, REACH + 1):
            same = users[distance:] == users[:-distance]
            pairs = torch.stack([items[:-distance][same], items[distance:][same]])  # (2, pairs): from, to
            found.append((pairs, torch.full((pairs.shape[1],), DECAY ** (distance - 1))))
        pairs, weights = (torch.cat(part, -1) for part in zip(*found, strict=True))
        weights = weights / torch.zeros(size).index_add_(0, pairs[0], weights)[pairs[0]]
        self.register_buffer("graph", sparse(pairs, weights, size, size))  # P(to | from)
        self.register_buffer("popularity", counts / counts.sum() * 1e-6)  # (V + 1,)

    def scores(
        self, histories: torch.Tensor, users: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        row, column = (histories != 0).nonzero(as_tuple=True)
        weights = DECAY ** (histories.shape[1] - 1 - column).float()
        read = sparse(torch.stack([row, histories[row, column]]), weights, len(histories), len(self.popularity))
        with warnings.catch_warnings(action="ignore"):  # the product goes through a format that torch calls beta
            scores = torch.sparse.mm(read, self.graph).to_dense() + self.popularity  # (B, V + 1)
        return scores if items is None else scores[:, items]


def sparse(places: torch.Tensor, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix (rows, columns) with `values` (n,) added at `places` (2, n)."""
    return torch.sparse_coo_tensor(places, values, (rows, columns), check_invariants=False).coalesce()
