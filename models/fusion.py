"""Score fusion: two trained recommenders answer as one, by a weighted sum of their scores."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from models.interface import Recommender
from utils.candidates import Negatives
from utils.data import Sequences
from utils.metrics import rank_each


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores (B, V + 1) minus the mean of each row, over its standard deviation.

    Column 0, the padding, is left out of both. Where all items have one score, it becomes 0.
    """
    deviation, mean = torch.std_mean(scores[:, 1:], dim=1, correction=0, keepdim=True)
    return (scores - mean) / deviation.where(deviation > 0, 1)


def fuse(pair: Sequence[torch.Tensor], weights: Sequence[float]) -> Iterator[torch.Tensor]:
    """For each weight, (1 - weight) of the first standardised scores and `weight` of the second; all (B, V + 1).

    With weight 0 or 1 it is the one model's scores as they are: their order is the same, and nothing is rounded.
    """
    standard = [standardised(scores) for scores in pair]
    for weight in weights:
        yield pair[int(weight)].clone() if weight in (0, 1) else torch.lerp(*standard, weight)


class Fusion(Recommender):
    """Two recommenders over the same items. Each reads as many items of a history as it was trained on.

    max_lengths: how many. autocasts: the precision in which each computes. weight: of the second one, 0..1.
    """

    def __init__(
        self,
        models: Sequence[Recommender],
        max_lengths: Sequence[int],
        autocasts: Sequence[Callable[[], AbstractContextManager]],
        weight: float,
    ) -> None:
        super().__init__(None, None)
        self.models, self.max_lengths, self.autocasts = nn.ModuleList(models), max_lengths, autocasts
        self.weight = weight

    def score_pairs(
        self, histories: torch.Tensor, users: torch.Tensor, size: int
    ) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """The scores (b, V + 1) of both models, of `size` users at a time."""
        streams = [
            model.score_blocks(histories[:, -length:], users, size)
            for model, length in zip(self.models, self.max_lengths, strict=True)
        ]
        for low in range(0, len(histories), size):
            pair = []
            for stream, autocast in zip(streams, self.autocasts, strict=True):
                with autocast():
                    pair.append(next(stream)[1])
            yield slice(low, low + size), pair

    def score_blocks(
        self, histories: torch.Tensor, users: torch.Tensor, size: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        for block, pair in self.score_pairs(histories, users, size):
            yield block, next(fuse(pair, [self.weight]))

    def scores(
        self, histories: torch.Tensor, users: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        pair = []
        for model, length, autocast in zip(self.models, self.max_lengths, self.autocasts, strict=True):
            with autocast():
                pair.append(model.scores(histories[:, -length:], users).float())
        fused = next(fuse(pair, [self.weight]))  # standardised over all items, whichever are asked for
        return fused if items is None else fused[:, items]

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model, autocast in zip(self.models, self.autocasts, strict=True):
                with autocast():
                    stack.enter_context(model.for_inference())
            yield


def rank_with_weights(
    fusion: Fusion, weights: Sequence[float], data: Sequences, split: str, negatives: np.ndarray | Negatives, **options
) -> tuple[list[dict[str, np.ndarray]], float]:
    """`rank_each` by the scores with each of the weights; each model computes its own once."""

    def score_blocks(*batch) -> Iterator[tuple[slice, Iterator[torch.Tensor]]]:
        return ((block, fuse(pair, weights)) for block, pair in fusion.score_pairs(*batch))

    options |= {"max_length": max(fusion.max_lengths), "batched_length": fusion.max_lengths[0]}
    return rank_each(fusion, score_blocks, len(weights), data, split, negatives, **options)
