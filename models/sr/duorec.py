"""DuoRec (Qiu et al., 2022): SASRec, with user vectors pulled towards those of other histories with the same target.

Of each example one target is drawn. Two views of it: h', its history read again with dropout of its own, and h's, a
history of the training part, drawn from those that lead to the same item. Both are close, views of other examples far:
L_reg = mean over the 2 B views of -log(exp(s(z, z+)) / sum over the other views of exp(s)), s(a, b) = a . b / tau, and
L = L_rec + lambda L_reg. Deviations: blocks are SASRec's (pre-norm, feed-forward of width d), the loss of the next item
is at every position that --train_targets asks for, and a view per example, not per prefix. As in the release an item
with one history alone is its own pair, and examples with the same target are negatives of each other. With
--micro_batch_size the negatives are those of a micro-batch.
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
        self.places = asked[np.argsort(data.items[asked], kind="stable")]  # these, by item
        self.starts = np.searchsorted(data.items[self.places], np.arange(data.num_items + 2))  # (V + 2,)
        self.begin = np.maximum(first, np.arange(len(first)) - self.max_length)

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Also prefixes and positives (B, T), two histories of the same target."""
        batch = examples.batch(index)
        end = rng.integers(examples.first[index], examples.end[index] + 1)  # a target of each, (B,)
        start, target = examples.start[index], examples.items[end]
        prefixes = Examples(examples.items, examples.users[index], start, end, end)
        low, high = self.starts[target], self.starts[target + 1]
        place = self.places[rng.integers(low, high)]  # (B,)
        positives = Examples(self.known, prefixes.users, self.begin[place], place, place)
        every = np.arange(len(index))
        views = {"prefixes": prefixes, "positives": positives}
        return batch | {name: view.batch(every)["histories"] for name, view in views.items()}

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        views = (self.newest_states(batch[name]) for name in ("prefixes", "positives"))
        return super().forward(batch) | {"contrast": self.weight * info_nce(*views, self.tau)}
