"""DuoRec (Qiu et al., 2022): user vectors are pulled towards those of other histories with the same target.

Of each example one target is drawn. Two views of it: h', its history read again with dropout of its own, and h's, a
history of the training part, drawn from those of other users that lead to the same item. Both are close, views of
other examples far: L_reg = mean over the 2 B views of -log(exp(s(z, z+)) / sum over the other views of exp(s)), with
s(a, b) = a . b / tau, and L = L_rec + lambda L_reg. The encoder is BERT's, causal. Deviations: the loss of the next
item is at every position that --train_targets asks for, a view per example, not per prefix, and positives of other
users first (of all other examples in the release). As in the release an item that one user alone has met is its own
pair, and examples with the same target are negatives of each other. With --micro_batch_size, or several processes, the
negatives are those of a part of the batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from models.interface import flag
from models.sr.sasrec import SASRec
from utils.data import Examples, TrainingPart


def info_nce(views: torch.Tensor, others: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_reg of two views (B, d) of each example, mean over the 2 B views; in float32 also under autocast."""
    with torch.autocast(views.device.type, enabled=False):
        z = torch.cat([views, others]).float()  # (2 B, d)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(views)))


class DuoRec(SASRec):
    """Histories by target are found once, in the training part."""

    norm_first = inner_dropout = False

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        contrast_weight: float = flag(0.1, "weight lambda of L_reg", ">= 0")
        contrast_temperature: float = flag(1.0, "tau of L_reg", "> 0")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.weight, self.tau = config.contrast_weight, config.contrast_temperature
        self.known = data.items  # (interactions,)
        first = np.searchsorted(data.users, data.users)  # (interactions,): where the user's items begin
        asked = np.flatnonzero(np.arange(len(first)) > first)  # what has a history
        self.places = asked[np.argsort(data.items[asked], kind="stable")]  # these, by item and user
        self.num_users = data.num_users
        self.pairs = self.pair(data.items[self.places], data.users[self.places])  # the same as one number, ascending
        self.begin = np.maximum(first, np.arange(len(first)) - self.max_length)

    def pair(self, items: np.ndarray, users: np.ndarray | int) -> np.ndarray:
        return items.astype(np.int64) * self.num_users + users

    def of_other_users(self, items: np.ndarray, users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw for each item one of `places`, of another user if there is any: (B,), (B,) -> (B,)."""
        ends = [self.pair(items, 0), self.pair(items, users), self.pair(items, users + 1), self.pair(items + 1, 0)]
        low, own, after, high = np.searchsorted(self.pairs, np.stack(ends))  # each (B,)
        others = high - low - (after - own)
        drawn = low + rng.integers(0, np.where(others, others, high - low))
        return self.places[drawn + np.where((others > 0) & (drawn >= own), after - own, 0)]

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Also prefixes and positives (B, T), two histories of the same target."""
        batch = examples.batch(index)
        end = rng.integers(examples.first[index], examples.end[index] + 1)  # a target of each, (B,)
        start, target = examples.start[index], examples.items[end]
        prefixes = Examples(examples.items, examples.users[index], start, end, end)
        place = self.of_other_users(target, examples.users[index], rng)  # (B,)
        positives = Examples(self.known, prefixes.users, self.begin[place], place, place)
        every = np.arange(len(index))
        views = {"prefixes": prefixes, "positives": positives}
        return batch | {name: view.batch(every)["histories"] for name, view in views.items()}

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        views = (self.newest_states(batch[name]) for name in ("prefixes", "positives"))
        return super().forward(batch) | {"contrast": self.weight * info_nce(*views, self.tau)}
