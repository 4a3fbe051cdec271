"""The baseline without training that knows what follows what: next-item counts, decayed by distance."""

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
            pairs = torch.stack([items[distance:][same], items[:-distance][same]])  # (2, pairs): to, from
            found.append((pairs, torch.full((pairs.shape[1],), DECAY ** (distance - 1))))
        pairs, weights = (torch.cat(part, -1) for part in zip(*found, strict=True))
        weights = weights / torch.zeros(size).index_add_(0, pairs[1], weights)[pairs[1]]
        self.register_buffer("graph", torch.sparse_coo_tensor(pairs, weights, (size, size)).coalesce())  # to, from
        self.register_buffer("popularity", counts / counts.sum() * 1e-6)  # (V + 1,)

    def scores(
        self, histories: torch.Tensor, users: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        ages = torch.arange(histories.shape[1] - 1, -1, -1, device=histories.device)  # (T,)
        weights = (DECAY ** ages.float() * (histories != 0)).float()  # (B, T)
        read = torch.zeros(len(histories), len(self.popularity), device=histories.device)  # (B, V + 1)
        scores = torch.sparse.mm(self.graph, read.scatter_add_(1, histories, weights).T).T + self.popularity
        return scores if items is None else scores[:, items]
