"""SASRec (Kang and McAuley, 2018): self-attention over the history, item table shared between input and output."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.dropout import Dropout
from models.interface import flag
from models.sr.objectives import SequentialRecommender
from utils.data import TrainingPart
from utils.errors import UserError


def start_as_bert(*maps: nn.Linear) -> None:
    """Their weights where BERT's start."""
    for linear in maps:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


class Block(nn.Module):
    """Self-attention and feed-forward on x (B, T, d); a norm is before each, or as in BERT after its sum with x."""

    def __init__(self, dim: int, heads: int, dropout: float, norm_first: bool = True, inner_dropout: bool = True):
        super().__init__()
        self.heads, self.dropout, self.norm_first = heads, Dropout(dropout), norm_first
        inner = dim if norm_first else 4 * dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        within = Dropout(dropout if inner_dropout else 0.0)
        self.feed = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), within, nn.Linear(inner, dim))
        if not norm_first:
            start_as_bert(self.qkv, self.out, self.feed[0], self.feed[3])

    def attend(self, qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What each position attends to: qkv (3, B, heads, T, d / heads), mask (B, 1, T, T) of what may be seen."""
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0)

    def attention(self, x: torch.Tensor, *seen: torch.Tensor) -> torch.Tensor:
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, d / heads)
        return self.out(self.attend(qkv, *seen).transpose(1, 2).reshape(B, -1, d))

    def forward(self, x: torch.Tensor, *seen: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), *seen))
            return x + self.dropout(self.feed(self.norm2(x)))
        found = self.attention(x, *seen)  # (B, T, d), in LightSANs' last block (B, 1, d)
        x = self.norm1(x[:, -found.shape[1] :] + self.dropout(found))
        return self.norm2(x + self.dropout(self.feed(x)))


class SASRec(SequentialRecommender):
    """Histories are left-padded and may be trimmed: positions count back from the newest item.

    norm_first: blocks normalise what they read, and the last norm is at the end. False, for models that have BERT's
    encoder: blocks normalise their sums, feed forward at width 4 d, and the norm is at the start. inner_dropout:
    whether there is dropout inside the feed-forward too.
    """

    norm_first = True
    inner_dropout = True

    @dataclass(frozen=True)
    class Config(SequentialRecommender.Config):
        num_layers: int = flag(2, "blocks", ">= 1")
        num_heads: int = flag(2, "attention heads", ">= 1")
        dropout: float = flag(0.2, "dropout", "0..1")
        scale_items: bool = flag(False, "item vectors that are read are multiplied by sqrt(item_dim)")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        d, heads, dropout = config.item_dim, config.num_heads, config.dropout
        if d % heads:
            raise UserError(f"--num_heads {heads} does not divide --item_dim {d}")
        self.scale = d**0.5 if config.scale_items else 1.0
        self.items = nn.Embedding(data.num_items + 1, d, padding_idx=0)
        self.positions = nn.Embedding(self.max_length, d)
        how = (self.norm_first, self.inner_dropout)
        self.blocks = nn.ModuleList(Block(d, heads, dropout, *how) for _ in range(config.num_layers))
        self.dropout, self.norm = Dropout(dropout), nn.LayerNorm(d)
        for table in (self.items, self.positions):
            nn.init.trunc_normal_(table.weight, std=0.02)
        nn.init.zeros_(self.items.weight[0])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Item vectors that are read: (B, T) -> (B, T, d)."""
        return self.items(ids)

    def ages(self, histories: torch.Tensor) -> torch.Tensor:
        """(T,) rows of the position table, of which the last is the newest item's."""
        return torch.arange(self.max_length - histories.shape[1], self.max_length, device=histories.device)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What the first block reads."""
        return self.dropout(x if self.norm_first else self.norm(x))

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What becomes of the last block's output."""
        return self.norm(x) if self.norm_first else x

    def states(self, histories: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """User vectors after every position: histories (B, T), T <= max_length -> (B, T, d)."""
        T = histories.shape[1]
        x = self.enter(self.scale * self.embed(histories) + self.positions(self.ages(histories)))  # (B, T, d)
        # The mask comes from the ids. A padded position sees itself only, which keeps its softmax defined.
        every = torch.ones(T, T, dtype=torch.bool, device=histories.device)
        itself = torch.eye(T, dtype=torch.bool, device=histories.device)
        mask = ((every.tril() if causal else every) & (histories != 0)[:, None, None, :]) | itself  # (B, 1, T, T)
        for block in self.blocks:
            x = block(x, mask)
        return self.leave(x)
