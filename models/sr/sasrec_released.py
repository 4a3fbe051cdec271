"""SASRec as the paper's authors released it, with its faults: what their item tables and baselines come from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.dropout import Dropout
from models.interface import Recommender, flag
from models.losses import catalogue_cross_entropy
from models.sr.sasrec_original import EPS, feed_forward
from utils.data import TrainingPart


class Block(nn.Module):
    """Causal attention of one head, queries normalised, keys and values not; both residuals start from norms."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attention = nn.MultiheadAttention(dim, 1, dropout, batch_first=True)
        self.feed = feed_forward(dim, dropout)

    def forward(self, x: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(x)  # (B, T, h)
        x = self.norm2(queries + self.attention(queries, x, x, attn_mask=forbidden, need_weights=False)[0])
        return x + self.feed(x)


class SASRecReleased(Recommender):
    """Padding is attended to, so histories are padded to max_seq_length here, however a batch was trimmed."""

    @dataclass(frozen=True)
    class Config(Recommender.Config):
        item_dim: int = flag(128, "width d of the item table", ">= 1")
        hidden_dim: int = flag(32, "width of the blocks, between two linear maps", ">= 1")
        num_layers: int = flag(2, "blocks", ">= 1")
        dropout: float = flag(0.5, "dropout", "0..1")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        d, h, dropout = config.item_dim, config.hidden_dim, config.dropout
        self.max_length, self.scale = config.max_seq_length, d**0.5
        self.items = nn.Embedding(data.num_items + 1, d, padding_idx=0)  # N(0, 1), as nn.Embedding starts
        self.padding = nn.Parameter(torch.randn(d))  # there the vector of item 0, which is an item too
        self.positions = nn.Embedding(self.max_length, h)
        self.input_proj, self.output_proj = nn.Linear(d, h), nn.Linear(h, d)
        self.blocks = nn.ModuleList(Block(h, dropout) for _ in range(config.num_layers))
        self.dropout, self.norm = Dropout(dropout), nn.LayerNorm(h, EPS)

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        """User vectors after every position: histories (B, T), T <= max_length -> (B, max_length, d)."""
        histories = F.pad(histories, (self.max_length - histories.shape[1], 0))  # (B, max_length)
        vectors = torch.where((histories == 0)[..., None], self.padding, self.items(histories))
        x = self.dropout(self.input_proj(vectors) * self.scale + self.positions.weight)  # (B, max_length, h)
        # Only what comes later is masked: the released mask compares x with 0, which it never is (fault 5).
        square = torch.ones(self.max_length, self.max_length, dtype=torch.bool, device=histories.device)
        for block in self.blocks:
            x = block(x, square.triu(1))
        return self.output_proj(self.norm(x))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms of a batch: targets (B, T), 0 where there is none; the release has one, in the last column."""
        targets = batch["targets"]
        vectors = self.states(batch["histories"])[:, -targets.shape[1] :][targets != 0]  # (N, d)
        return {"ce": catalogue_cross_entropy(vectors, self.items.weight, targets[targets != 0])}

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.states(histories)[:, -1]  # (B, d)

    def item_vectors(self) -> torch.Tensor:
        return self.items.weight  # (V + 1, d), row 0 of zeros
