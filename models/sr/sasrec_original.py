"""SASRec as MTandHJ/CE-SCE-LLMRec computes it: with the norms of kang205/SASRec, and padding attended to.

On x (B, T, d), which is 0 at padding, a block is

    a = x + Attention(Q = LN(x), K = x, V = x)        y = LN(a)        x' = y + FFN(y)

so keys and values are not normalised, and the feed-forward's residual starts from the norm. The mask is causal only:
every history is padded to max_seq_length, and a padded position is a key and a value like any other, with the biases
of their maps as its vectors. A user with few items thereby listens to them less. Its authors' code masks the padding,
has no map after the attention, and starts the first residual from LN(x). Deviations from MTandHJ: all padding of a
history is one key whose logit is raised by the logarithm of their number, which is the same sum, but dropout takes it
whole; the attention's maps start as PyTorch's linear layers (Xavier there).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.dropout import Dropout
from models.interface import flag
from models.sr.sasrec import SASRec
from utils.data import TrainingPart

EPS = 1e-8  # of every norm


def feed_forward(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), Dropout(dropout), nn.ReLU(), nn.Linear(dim, dim), Dropout(dropout))


class OriginalBlock(nn.Module):
    """The block above."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feed = feed_forward(dim, dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x (B, T, d), mask (B, 1, T, 1 + T) is added to the logits; its first column is the padding."""
        B, T, d = x.shape
        q = self.query(self.norm1(x)).view(B, T, self.heads, -1).transpose(1, 2)  # (B, heads, T, d / heads)
        kv = self.key_value(F.pad(x, (0, 0, 1, 0)))  # (B, 1 + T, 2 d), the padding's first
        k, v = kv.view(B, 1 + T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, 1 + T, d / heads)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0)
        y = self.norm2(x + self.out(found.transpose(1, 2).reshape(B, T, d)))
        return y + self.feed(y)


class SASRecOriginal(SASRec):
    """The tables start as in MTandHJ/CE-SCE-LLMRec: normal, of Xavier's variance."""

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        scale_items: bool = flag(True, "item vectors that are read are multiplied by sqrt(item_dim)")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        d, heads, dropout = config.item_dim, config.num_heads, config.dropout
        self.blocks = nn.ModuleList(OriginalBlock(d, heads, dropout) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d, EPS)
        for table in (self.items, self.positions):
            nn.init.xavier_normal_(table.weight)
        nn.init.zeros_(self.items.weight[0])

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """User vectors after every position: histories (B, T), T <= max_length -> (B, T, d)."""
        T, real = histories.shape[1], histories != 0  # (B, T)
        x = self.dropout(self.scale * self.embed(histories) + self.positions(self.ages(histories)))  # (B, T, d)
        every = torch.ones(T, T, dtype=torch.bool, device=histories.device)
        seen = torch.zeros(len(histories), 1, T, T, dtype=x.dtype, device=histories.device)
        seen = seen.masked_fill(~(every.tril() & real[:, None, None, :]), float("-inf"))
        padding = (self.max_length - real.sum(1)).to(x.dtype).log()[:, None, None, None]  # -inf where there is none
        mask = torch.cat([padding.expand(-1, 1, T, 1), seen], 3)  # (B, 1, T, 1 + T)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
