"""S3-Rec (Zhou et al., 2020): BERT's encoder, causal as SASRec, is pre-trained on hidden items and segments.

Pre-training reads both sides of a place. With f(a, b) = sigma(a W b) and one drawn negative, each task minimises
-log(exp f(a, b) / (exp f(a, b) + exp f(a, b-))). Masked item prediction: a is the state at a hidden place, b its item;
items are hidden with probability `mask_prob`, the newest always. Segment prediction: a is the newest state of a
sequence with a segment hidden, b that of the segment alone, b- that of one from elsewhere. Then SASRec is trained from
these weights. Deviations: the two attribute tasks are left out, as datasets have no attributes; tasks are means, not
sums; and each epoch draws one prefix of every training sequence, where the release takes all. With
--micro_batch_size a micro-batch of pre-training counts by its targets, not by what is hidden of its prefixes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.interface import flag
from models.losses import bpr, item_logits, uniform_negatives
from models.sr.bert4rec import MaskedSASRec
from models.sr.sasrec import SASRec, start_as_bert
from utils.data import Examples, TrainingPart


class S3Rec(MaskedSASRec):
    """Bidirectional while it is pre-trained, causal from then on."""

    inner_dropout = False

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        pretrain_epochs: float = flag(10.0, "epochs of pre-training, before those of --num_epochs", ">= 0")
        mask_prob: float = flag(0.2, "probability that an item is hidden in pre-training", "0..1")
        item_weight: float = flag(1.0, "weight of masked item prediction", ">= 0")
        segment_weight: float = flag(0.5, "weight of segment prediction", ">= 0")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.pretrain_epochs, self.mask_prob = config.pretrain_epochs, config.mask_prob
        self.weights = {"item": config.item_weight, "segment": config.segment_weight}
        self.known = data.items  # (interactions,)
        self.maps = nn.ModuleDict({task: nn.Linear(config.item_dim, config.item_dim) for task in self.weights})
        start_as_bert(*self.maps.values())

    def stages(self) -> list[tuple[str, float]]:
        return [("pretrain", self.pretrain_epochs)] if self.pretrain_epochs else []

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """In pre-training, of items (B, T): hidden, where items are hidden, and context, segment, elsewhere (B, T)."""
        if self.stage != "pretrain":
            return examples.batch(index)
        end = rng.integers(examples.first[index], examples.end[index] + 1)  # (B,): where a prefix ends
        prefixes = Examples(examples.items, examples.users[index], examples.start[index], end, end)
        batch = prefixes.batch(np.arange(len(index)))
        items = torch.cat([batch["histories"], batch["targets"][:, -1:]], 1)[:, -self.max_length :]  # (B, T)
        present, T = items != 0, items.shape[1]
        hidden = present & (torch.from_numpy(rng.random(items.shape)) < self.mask_prob)
        hidden[:, -1] = True
        lengths = present.sum(1).numpy()
        long = rng.integers(1, np.maximum(lengths // 2, 1) + 1)  # of the segments, (B,)
        start = T - lengths + rng.integers(0, lengths - long + 1)  # the column where they begin, (B,)
        other = rng.integers(0, len(self.known) - long + 1)  # where a segment from elsewhere begins, (B,)
        offset = np.arange(T) - start[:, None]  # (B, T)
        inside = torch.from_numpy((offset >= 0) & (offset < long[:, None]))
        elsewhere = torch.from_numpy(self.known.take(other[:, None] + offset, mode="clip").astype(np.int64))
        blank = torch.where(present, self.mask_id, 0)  # (B, T)
        parts = {"context": torch.where(inside, blank, items), "segment": torch.where(inside, items, blank)}
        return {
            "items": items,
            "hidden": hidden,
            "elsewhere": torch.where(inside, elsewhere, blank),
        } | parts

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        return super().states(histories, causal=self.stage != "pretrain")

    def task(self, name: str, vectors: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """A task's loss of vectors a (N, d); ids (N, 2): the rows of b and of b- in the table."""
        return self.weights[name] * bpr(item_logits(self.maps[name](vectors), table, ids).sigmoid())

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.stage != "pretrain":
            return super().forward(batch)
        items, hidden = batch["items"], batch["hidden"]
        vectors, wanted = self.states_asked(items.masked_fill(hidden, self.mask_id), items * hidden)  # (N, d), (N,)
        negatives = uniform_negatives(wanted, 1, self.mask_id - 1)  # (N, 1)
        terms = {"item": self.task("item", vectors, self.items.weight, torch.cat([wanted[:, None], negatives], 1))}
        context, *segments = (self.newest_states(batch[name]) for name in ("context", "segment", "elsewhere"))
        rows = torch.arange(2 * len(context), device=items.device).view(2, -1).T  # (B, 2)
        return terms | {"segment": self.task("segment", context, torch.cat(segments), rows)}
