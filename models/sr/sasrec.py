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


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), Dropout(dropout), nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, d/heads)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(B, T, d)))
        return x + self.dropout(self.feed(self.norm2(x)))


class SASRec(SequentialRecommender):
    """Histories are left-padded and may be trimmed: positions count back from the newest item."""

    @dataclass(frozen=True)
    class Config(SequentialRecommender.Config):
        num_layers: int = flag(2, "blocks", ">= 1")
        num_heads: int = flag(2, "attention heads", ">= 1")
        dropout: float = flag(0.2, "dropout", "0..1")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        d, heads, dropout = config.item_dim, config.num_heads, config.dropout
        if d % heads:
            raise UserError(f"--num_heads {heads} does not divide --item_dim {d}")
        self.items = nn.Embedding(data.num_items + 1, d, padding_idx=0)
        self.positions = nn.Embedding(self.max_length, d)
        self.blocks = nn.ModuleList(Block(d, heads, dropout) for _ in range(config.num_layers))
        self.dropout, self.norm = Dropout(dropout), nn.LayerNorm(d)
        for table in (self.items, self.positions):
            nn.init.trunc_normal_(table.weight, std=0.02)
        nn.init.zeros_(self.items.weight[0])

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """User vectors after every position: histories (B, T), T <= max_length -> (B, T, d)."""
        T = histories.shape[1]
        age = torch.arange(self.max_length - T, self.max_length, device=histories.device)
        x = self.dropout(self.items(histories) + self.positions(age))  # (B, T, d)
        # The mask comes from the ids. A padded position sees itself only, which keeps its softmax defined.
        causal = torch.ones(T, T, dtype=torch.bool, device=histories.device).tril()
        itself = torch.eye(T, dtype=torch.bool, device=histories.device)
        mask = (causal & (histories != 0)[:, None, None, :]) | itself  # (B, 1, T, T)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
