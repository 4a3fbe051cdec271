"""LightSANs (Fan et al., 2021): positions attend to k latent interests in place of all items.

With Q, K, V the maps of a block's input X (T, d), per head: interests K~ = f(K), V~ = f(V), where
f(Y) = softmax(Y Theta^T)^T Y, the softmax over the T positions, Theta (k, d) learned, one for K and one for V. The
attention is softmax(Q K~^T / sqrt(d_h)) V~ + softmax(P W_Q (P W_K)^T / sqrt(d_h)) V, of positions P (T, d) apart from
the items (decoupled position encoding). An interest gathers all positions, also later ones, so a state is only right
after the newest item: each target is asked after a history of its own that ends before it. The encoder is BERT's
otherwise. Deviations: P is normalised first, as in RecBole; padding is masked, which it is not there, and both
softmaxes are over what is attended to, as printed; logits of positions are divided by sqrt(d_h) as printed, by more in
the release. Positions count back from the newest item, and the Theta of each block is drawn for itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import flag
from models.sr.sasrec import Block, SASRec, start_as_bert
from utils.data import Examples, TrainingPart


class LightBlock(Block):
    """A block whose attention has low rank. newest: its output is that of the last position alone, (B, 1, d)."""

    def __init__(self, dim: int, heads: int, dropout: float, interests: int, newest: bool = False):
        super().__init__(dim, heads, dropout, norm_first=False, inner_dropout=False)
        self.newest = newest
        self.theta = nn.Parameter(torch.randn(2, interests, dim))  # of keys and of values
        self.position_norm, self.position = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        start_as_bert(self.position)

    def attend(self, qkv: torch.Tensor, padding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """qkv (3, B, heads, T, d_h), padding (B, T) is True there, positions (T, d)."""
        q, kv, (_, B, H, T, h) = qkv[0], qkv[1:], qkv.shape
        lowest = torch.finfo(q.dtype).min  # not -inf, with which a history of nothing would be NaN
        flat = kv.transpose(2, 3).flatten(3)  # (2, B, T, d)
        share = torch.einsum("sbtd,skd->sbkt", flat, self.theta.to(q.dtype))
        share = share.masked_fill(padding[:, None], lowest).softmax(3)  # (2, B, k, T)
        k, v = (share @ flat).view(2, B, -1, H, h).transpose(2, 3)  # each (B, heads, k, d_h)
        pq, pk = self.position(self.position_norm(positions)).view(T, 2, H, h).permute(1, 2, 0, 3)  # (heads, T, d_h)
        if self.newest:
            q, pq = q[:, :, -1:], pq[:, -1:]
        found = super().attend((q, k, v), None)
        places = (pq @ pk.mT / h**0.5).masked_fill(padding[:, None, None], lowest).softmax(3)  # (B, heads, T or 1, T)
        return found + places @ kv[1]


class LightSANs(SASRec):
    """Trained after whole histories, as its attention is not causal."""

    norm_first = False

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        num_interests: int = flag(5, "latent interests k", ">= 1")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        light = (config.item_dim, config.num_heads, config.dropout, config.num_interests)
        last = config.num_layers - 1
        self.blocks = nn.ModuleList(LightBlock(*light, newest=n == last) for n in range(config.num_layers))

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """One history (N, T) for each of the N targets, which stand in the last column."""
        batch = examples.batch(index)
        row, column = batch["targets"].nonzero(as_tuple=True)  # (N,)
        T = batch["targets"].shape[1]
        source = column[:, None] + torch.arange(1 - T, 1)  # (N, T): the columns up to the target's
        histories = batch["histories"][row[:, None], source.clamp_min(0)] * (source >= 0)
        targets = torch.zeros_like(histories)
        targets[:, -1] = batch["targets"][row, column]
        return {"users": batch["users"][row], "histories": histories, "targets": targets}

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """(B, T, d), 0 but for the last position: that one alone is a user vector."""
        x, positions = self.enter(self.scale * self.embed(histories)), self.positions(self.ages(histories))
        for block in self.blocks:
            x = block(x, histories == 0, positions)
        return F.pad(self.leave(x), (0, 0, histories.shape[1] - 1, 0))
