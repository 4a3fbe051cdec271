"""What the traditional models share: their objectives (--loss), and user vectors from states after every position."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from models.interface import Recommender, flag
from models.losses import (
    binary_cross_entropy,
    bpr,
    catalogue_cross_entropy,
    gbce_beta,
    item_logits,
    sampled_cross_entropy,
    uniform_negatives,
)
from utils.data import TrainingPart
from utils.errors import UserError

# A CPU runs the users of a training batch in groups of at most this size, sorted by length, and in smaller ones where
# padding would make histories longer than so many times their items; an accelerator would lose more to small kernels.
GROUP, PADDED = 64, 1.5


def groups_by_length(lengths: torch.Tensor) -> Iterator[list[int]]:
    """Rows with `lengths` (B,) in groups, the shortest first; a group is halved until it has little padding."""
    order, lengths = lengths.argsort().tolist(), lengths.tolist()
    waiting = [order[low : low + GROUP] for low in range(0, len(order), GROUP)][::-1]
    while waiting:
        rows = waiting.pop()
        if len(rows) * lengths[rows[-1]] > PADDED * sum(lengths[row] for row in rows):
            middle = len(rows) // 2
            waiting += [rows[middle:], rows[:middle]]
        else:
            yield rows


class SequentialRecommender(Recommender):
    """Derive, make `self.items` in `__init__`, and write `states`. Or write `forward`, which ends in `objective`."""

    @dataclass(frozen=True)
    class Config(Recommender.Config):
        item_dim: int = flag(128, "width d of the item table", ">= 1")
        loss: Literal["ce", "bce", "bpr", "sampled_softmax", "gbce"] | None = flag(
            None, "objective (default: ce, over all items; sampled_softmax where --num_negatives is given)"
        )
        num_negatives: int = flag(
            0, "negatives of a batch (sampled_softmax), or of each target, drawn uniformly (bce, bpr, gbce)", ">= 0"
        )
        calibration: float | None = flag(
            None, "t of gbce, between 0, where it is bce, and 1, where scores are calibrated (default: 0.75)", ">= 0"
        )

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.max_length, self.num_negatives = config.max_seq_length, config.num_negatives
        self.loss = config.loss or ("sampled_softmax" if self.num_negatives else "ce")
        others, t = data.num_items - 1, 0.75 if config.calibration is None else config.calibration
        if self.loss == "ce" and self.num_negatives:
            raise UserError("--loss ce is over all items: give --num_negatives 0, or choose another --loss")
        if self.loss != "ce" and not self.num_negatives:
            raise UserError(f"--loss {self.loss} needs negatives: give --num_negatives a number of at least 1")
        if self.loss != "sampled_softmax" and self.num_negatives > others:
            raise UserError(f"--num_negatives {self.num_negatives}: a target has {others} other items, so at most that")
        if config.calibration is not None and self.loss != "gbce":
            raise UserError("--calibration belongs to --loss gbce: leave it out, or choose that loss")
        if t > 1:
            raise UserError(f"--calibration {t}: expected a number between 0 and 1")
        self.beta = gbce_beta(self.num_negatives / others, t) if self.loss == "gbce" else 1.0
        if self.loss == "sampled_softmax":  # drawn once per (micro-)batch, in proportion to (count + 1) ** 0.75
            q = (torch.from_numpy(data.counts()).double() + 1) ** 0.75  # (V + 1,)
            q[0] = 0
            self.register_buffer("log_q", (q / q.sum()).log().float(), persistent=False)

    def objective(self, vectors: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss term that --loss names, of user vectors (N, d) and targets (N,) in 1..V."""
        items = self.item_vectors()  # (V + 1, d)
        if self.loss == "ce":
            return {"ce": catalogue_cross_entropy(vectors, items, targets)}
        if self.loss == "sampled_softmax":
            negatives = self.log_q.exp().multinomial(self.num_negatives, replacement=True)  # (S,)
            return {"sampled_ce": sampled_cross_entropy(vectors, items, targets, negatives, self.log_q)}
        negatives = uniform_negatives(targets, self.num_negatives, len(items) - 1)  # (N, S)
        logits = item_logits(vectors, items, torch.cat([targets[:, None], negatives], 1))  # (N, 1 + S)
        return {self.loss: bpr(logits) if self.loss == "bpr" else binary_cross_entropy(logits, self.beta)}

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """User vectors after every position: histories (B, T), T <= max_length -> (B, T, d)."""
        raise NotImplementedError

    def states_asked(self, histories: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """User vectors (N, d) where there is a target, and the targets (N,); on a CPU short histories come first."""
        if histories.device.type != "cpu":
            return self.states(histories)[targets != 0], targets[targets != 0]
        lengths, found = (histories != 0).sum(1), []
        for rows in groups_by_length(lengths):
            T = int(lengths[rows[-1]])
            wanted = targets[rows, -T:]
            found.append((self.states(histories[rows, -T:])[wanted != 0], wanted[wanted != 0]))
        vectors, targets = zip(*found, strict=True)
        return torch.cat(vectors), torch.cat(targets)

    def newest_states(self, histories: torch.Tensor) -> torch.Tensor:
        """User vectors (B, d) after the newest items, computed as in `states_asked`."""
        places = torch.zeros_like(histories)
        places[:, -1] = torch.arange(1, len(histories) + 1, device=histories.device)
        vectors, places = self.states_asked(histories, places)
        return vectors[places.argsort()]

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms of a batch: targets (B, T), 0 where there is none."""
        return self.objective(*self.states_asked(batch["histories"], batch["targets"]))

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.states(histories)[:, -1]  # (B, d)

    def item_vectors(self) -> torch.Tensor:
        return self.items.weight  # (V + 1, d)
