"""BERT4Rec (Sun et al., 2019): items behind a mask are predicted from those on both sides of them.

Training hides items of a sequence with probability rho; the state h at a hidden place gives
P(item) = softmax(E GELU(W h + b)). At inference the mask follows the history. Deviations: blocks are SASRec's
(pre-norm, feed-forward of width d); the output has no bias per item, as the table alone goes to step 2; only items that
--train_targets asks for are hidden, so never a user's first; a share of the sequences has the newest item hidden alone,
as in the released code, but drawn (`last_prob`); and masks are drawn anew at each use of a sequence, where the release
draws ten in advance.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import flag
from models.sr.sasrec import SASRec
from utils.data import Examples, TrainingPart


class MaskedSASRec(SASRec):
    """SASRec that also reads id V + 1, the mask, whose vector is no item's."""

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

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(replace(config, max_seq_length=config.max_seq_length + 1), data)
        self.mask_prob, self.last_prob = config.mask_prob, config.last_prob
        self.out = nn.Linear(config.item_dim, config.item_dim)

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """histories (B, T + 1): sequences, masks in them; targets (B, T + 1): what the masks hide, 0 elsewhere."""
        batch = examples.batch(index)
        items = torch.cat([batch["histories"], batch["targets"][:, -1:]], 1)  # (B, T + 1)
        draws = torch.from_numpy(rng.random(items.shape))
        hidden = F.pad(batch["targets"] != 0, (1, 0)) & (draws < self.mask_prob)
        hidden &= torch.from_numpy(rng.random((len(index), 1))) >= self.last_prob
        hidden[:, -1] |= ~hidden.any(1)
        return batch | {"histories": items.masked_fill(hidden, self.mask_id), "targets": items * hidden}

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """What each position says of its item, from all: sequences (B, T) -> (B, T, d)."""
        return F.gelu(self.out(super().states(histories, causal=False)))

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.states(F.pad(histories, (0, 1), value=self.mask_id))[:, -1]  # (B, d)
