"""Caser (Tang and Wang, 2018): convolutions over the matrix E (L, d) of the newest items, beside a user vector.

Each horizontal filter F of height h = 1..L gives max over i of relu(<E[i:i+h], F> + b); each vertical filter gives d
weighted sums of the rows of E. With o and o' what they give, z = relu(W [o, o'] + b) and x = [z, P_u]: the score is
W'_j . x + b'_j. Deviations: one target after each window (T = 1), and the default loss is over all items, not binary.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.dropout import Dropout
from models.interface import flag
from models.sr.windows import WindowRecommender
from utils.data import TrainingPart


class Caser(WindowRecommender):
    """Padding is read as rows of zeros."""

    @dataclass(frozen=True)
    class Config(WindowRecommender.Config):
        num_horizontal: int = flag(16, "horizontal filters of each height", ">= 1")
        num_vertical: int = flag(4, "vertical filters", ">= 1")
        dropout: float = flag(0.5, "dropout of what the filters give", "0..1")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        d, L = config.item_dim, config.window
        super().__init__(config, data, width=2 * d)
        self.horizontal = nn.ModuleList(nn.Conv1d(d, config.num_horizontal, height) for height in range(1, L + 1))
        self.vertical = nn.Linear(L, config.num_vertical)
        self.out = nn.Linear(L * config.num_horizontal + d * config.num_vertical, d)
        self.dropout = Dropout(config.dropout)

    def window_vectors(self, windows: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        E = self.items(windows).transpose(1, 2)  # (N, d, L)
        found = [filters(E).amax(2).relu() for filters in self.horizontal]  # each (N, num_horizontal)
        found.append(self.vertical(E).transpose(1, 2).flatten(1))  # (N, num_vertical * d)
        z = self.out(self.dropout(torch.cat(found, 1))).relu()  # (N, d)
        return torch.cat([z, users], 1)  # (N, 2 d)
