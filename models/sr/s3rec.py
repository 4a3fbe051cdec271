"""S3-Rec (Zhou et al., 2020): BERT's encoder, causal as SASRec, is first pre-trained on items, attributes and segments.

Pre-training reads both sides of a place. Items are hidden with probability `mask_prob`, the newest always. A task has
a W of its own. Two tell from the state a at a place which attributes its item has, by the binary cross-entropy of a W m
for each attribute m: masked attribute prediction at hidden places, associated attribute prediction at the others. Two
more, with f(a, b) = sigma(a W b) and one drawn negative, minimise -log(exp f(a, b) / (exp f(a, b) + exp f(a, b-))).
Masked item prediction: a is the state at a hidden place, b its item. Segment prediction: a is the newest state of a
sequence with a segment hidden, b that of the segment alone, b- that of one from elsewhere. Losses are sums over places
and attributes, and means over sequences. Then SASRec is trained from these weights. A dataset without attributes
(`--attributes` of datasets/process.py) goes without their tasks.

As in the release, and unlike the paper, associated attributes are told from states, not from item vectors. Deviations
from the release: each epoch draws one prefix of every training sequence, of two items at least, where the release takes
all of the newest `max_seq_length` items; segments from elsewhere are of the training part; a negative may be an item of
the sequence. With --micro_batch_size a micro-batch of pre-training counts by its targets, not by what is hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import dot_products, flag
from models.losses import bpr, item_logits, uniform_negatives
from models.sr.bert4rec import MaskedSASRec
from models.sr.sasrec import SASRec, start_as_bert
from utils.data import Examples, TrainingPart, consecutive
from utils.errors import UserError


def rows_of_attributes(data: TrainingPart) -> torch.Tensor:
    """The attributes of each item (V + 1, most), 0 where it has fewer."""
    item, attribute = data.attributes[data.attributes[:, 0].argsort()].T
    counts = np.bincount(item, minlength=data.num_items + 1)
    rows = np.zeros((len(counts), counts.max()), np.int64)
    rows[item, consecutive(np.zeros_like(counts), counts)] = attribute
    return torch.from_numpy(rows)


class S3Rec(MaskedSASRec):
    """Bidirectional while it is pre-trained, causal from then on."""

    inner_dropout, reads_attributes = False, True

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        pretrain_epochs: float = flag(10.0, "epochs of pre-training, before those of --num_epochs", ">= 0")
        mask_prob: float = flag(0.2, "probability that an item is hidden in pre-training", "0..1")
        item_weight: float = flag(1.0, "weight of masked item prediction", ">= 0")
        segment_weight: float = flag(0.5, "weight of segment prediction", ">= 0")
        masked_attribute_weight: float = flag(1.0, "weight of masked attribute prediction", ">= 0")
        associated_attribute_weight: float = flag(0.2, "weight of associated attribute prediction", ">= 0")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        if config.pretrain_epochs and data.num_items < 2:
            raise UserError("s3rec's pre-training needs two items, and the dataset has one; add --pretrain_epochs 0")
        self.pretrain_epochs, self.mask_prob = config.pretrain_epochs, config.mask_prob
        self.weights = {"item": config.item_weight, "segment": config.segment_weight}
        self.weights["masked_attribute"] = config.masked_attribute_weight
        self.weights["associated_attribute"] = config.associated_attribute_weight
        self.known = data.items  # (interactions,)
        self.maps = nn.ModuleDict({task: nn.Linear(config.item_dim, config.item_dim) for task in self.weights})
        start_as_bert(*self.maps.values())
        number = data.attributes[:, 1].max(initial=0)
        self.attribute_vectors = nn.Parameter(0.02 * torch.randn(number, config.item_dim))
        self.register_buffer("attributes_of", rows_of_attributes(data), persistent=False)

    def resize(self, weights: dict[str, torch.Tensor]) -> None:
        if (found := weights.get("attribute_vectors")) is not None and found.ndim == 2:
            width = self.attribute_vectors.shape[1]
            self.attribute_vectors = nn.Parameter(self.attribute_vectors.new_empty(len(found), width))

    def stages(self) -> list[tuple[str, float]]:
        return [("pretrain", self.pretrain_epochs)] if self.pretrain_epochs else []

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """In pre-training, of items (B, T): hidden, where items are hidden, and context, segment, elsewhere (B, T)."""
        if self.stage != "pretrain":
            return examples.batch(index)
        end = rng.integers(examples.start[index] + 1, examples.end[index] + 1)  # (B,): where a prefix ends
        prefixes = Examples(examples.items, examples.users[index], examples.start[index], end, end)
        batch = prefixes.batch(np.arange(len(index)))
        items = torch.cat([batch["histories"], batch["targets"][:, -1:]], 1)[:, -self.max_length :]  # (B, T)
        present, T = items != 0, items.shape[1]
        hidden = present & (torch.from_numpy(rng.random(items.shape)) < self.mask_prob)
        hidden[:, -1] = True
        lengths = present.sum(1).numpy()
        of_segments = rng.integers(1, np.maximum(lengths // 2, 1) + 1)  # their lengths, (B,)
        start = T - lengths + rng.integers(0, lengths - of_segments + 1)  # the column where they begin, (B,)
        other = rng.integers(0, len(self.known) - of_segments + 1)  # where a segment from elsewhere begins, (B,)
        offset = np.arange(T) - start[:, None]  # (B, T)
        inside = torch.from_numpy((offset >= 0) & (offset < of_segments[:, None]))
        elsewhere = torch.from_numpy(self.known.take(other[:, None] + offset, mode="clip").astype(np.int64))
        blank = torch.where(present, self.mask_id, 0)  # (B, T)
        parts = {"context": torch.where(inside, blank, items), "segment": torch.where(inside, items, blank)}
        return parts | {"items": items, "hidden": hidden, "elsewhere": torch.where(inside, elsewhere, blank)}

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        return super().states(histories, causal=self.stage != "pretrain")

    def contrast(self, name: str, vectors: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The sum of a task's losses of vectors a (N, d); ids (N, 2): the rows of b and of b- in the table."""
        return len(ids) * bpr(item_logits(self.maps[name](vectors), table, ids).sigmoid())

    def attribute_loss(self, name: str, vectors: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The sum of a task's losses of vectors a (N, d) at places of the items (N,)."""
        logits = dot_products(self.maps[name](vectors), self.attribute_vectors)  # (N, A)
        has = logits.new_zeros(len(items), 1 + logits.shape[1]).scatter_(1, self.attributes_of[items], 1)[:, 1:]
        return F.binary_cross_entropy_with_logits(logits, has, reduction="sum")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.stage != "pretrain":
            return super().forward(batch)
        items, masked = batch["items"], batch["items"].masked_fill(batch["hidden"], self.mask_id)
        vectors, places = self.states_asked(masked, items + self.mask_id * batch["hidden"])  # (N, d), (N,)
        hidden, items = places > self.mask_id, places % self.mask_id  # (N,)
        pairs = torch.cat([items[hidden, None], uniform_negatives(items[hidden], 1, self.mask_id - 1)], 1)
        terms = {"item": self.contrast("item", vectors[hidden], self.items.weight, pairs)}
        parts = torch.cat([batch[name] for name in ("context", "segment", "elsewhere")])  # (3 B, T)
        context, segments = self.newest_states(parts).tensor_split([len(masked)])  # (B, d), (2 B, d)
        rows = torch.arange(len(segments), device=items.device).view(2, -1).T  # (B, 2)
        terms["segment"] = self.contrast("segment", context, segments, rows)
        if len(self.attribute_vectors):
            for name, at in (("masked_attribute", hidden), ("associated_attribute", ~hidden)):
                terms[name] = self.attribute_loss(name, vectors[at], items[at])
        return {name: self.weights[name] / len(context) * term for name, term in terms.items()}
