"""BERT4Rec (Sun et al., 2019): items behind a mask are predicted from those on both sides of them.

Training hides items of a sequence with probability rho, at least one; the state h at a hidden place gives
P(item) = softmax(E LN(GELU(W h + b))), with the norm LN of the released code, or softmax(E h) (`--output_map false`).
At inference the mask follows the history. Deviations: the output has no bias per item, as the table alone goes to step
2; only items that --train_targets asks for are hidden, and the first of a sequence if its second is; a share of the
sequences has the newest item hidden alone, as in the release, but drawn (`last_prob`); masks are drawn anew at each use
of a sequence, where the release draws ten in advance; and a hidden item is always behind the mask, also where BERT
swaps it. Queries, keys and values start as BERT's (Xavier in RecBoard), and the mask's vector has no weight decay. With
--micro_batch_size a micro-batch counts by its targets, not by what is hidden of them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import flag
from models.sr.sasrec import SASRec, start_as_bert
from utils.data import Examples, TrainingPart


class MaskedSASRec(SASRec):
    """BERT's encoder, which also reads id V + 1, the mask, whose vector is no item's."""

    norm_first = False

    def __init__(self, config: SASRec.Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.mask, self.mask_id = nn.Parameter(0.02 * torch.randn(config.item_dim)), data.num_items + 1

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = ids == self.mask_id  # (B, T)
        return torch.where(hidden[..., None], self.mask, self.items(ids.masked_fill(hidden, 0)))  # (B, T, d)


class BERT4Rec(MaskedSASRec):
    """A sequence takes one place more than the history, for the mask."""

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        mask_prob: float = flag(0.2, "probability rho that an item is hidden", "0..1")
        last_prob: float = flag(0.1, "share of the sequences whose newest item alone is hidden", "0..1")
        output_map: bool = flag(True, "states go through a map, a GELU and a norm before items are scored")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(replace(config, max_seq_length=config.max_seq_length + 1), data)
        self.mask_prob, self.last_prob = config.mask_prob, config.last_prob
        d = config.item_dim
        self.out = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d)) if config.output_map else nn.Identity()
        start_as_bert(*(part for part in self.out.children() if isinstance(part, nn.Linear)))

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """histories (B, T + 1): sequences, masks in them; targets (B, T + 1): what the masks hide, 0 elsewhere."""
        batch = examples.batch(index)
        items = torch.cat([batch["histories"], batch["targets"][:, -1:]], 1)  # (B, T + 1)
        asked = batch["targets"] != 0  # (B, T)
        first = (batch["histories"] != 0).cumsum(1) == 1  # of each sequence
        asked = F.pad(asked, (1, 0)) | F.pad(asked & first, (0, 1))  # (B, T + 1)
        draws = torch.from_numpy(rng.random(items.shape)).masked_fill(~asked, 1.0)
        least = draws.amin(1, keepdim=True)
        hidden = draws <= least.clamp_min(self.mask_prob)
        alone = torch.from_numpy(rng.random(len(index))) < self.last_prob  # (B,)
        hidden[alone] = torch.arange(items.shape[1]) == items.shape[1] - 1
        return batch | {"histories": items.masked_fill(hidden, self.mask_id), "targets": items * hidden}

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """What each position says of its item, from all: sequences (B, T) -> (B, T, d)."""
        return self.out(super().states(histories, causal=False))

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.states(F.pad(histories, (0, 1), value=self.mask_id))[:, -1]  # (B, d)
