"""What models share that read a fixed number of newest items and know the user: Caser and HGN."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import flag
from models.sr.objectives import SequentialRecommender
from utils.data import TrainingPart
from utils.errors import UserError


class WindowRecommender(SequentialRecommender):
    """Derive and write `window_vectors`. The score of item j is w_j . x + b_j, with output vectors w_j of their own.

    Every position is a target, read after the L items before it, padded on the left. A user without a training
    example counts as the mean of those who have one. Step 2 gets the table that is read, `items`.
    """

    @dataclass(frozen=True)
    class Config(SequentialRecommender.Config):
        window: int = flag(5, "L: newest items before a target that are read", ">= 1")

    def __init__(self, config: Config, data: TrainingPart, width: int) -> None:
        """width: of x."""
        super().__init__(config, data)
        self.window = config.window
        if self.window > self.max_length:
            raise UserError(f"--window {self.window} is longer than --max_seq_length {self.max_length}: change one")
        self.items = nn.Embedding(data.num_items + 1, config.item_dim, padding_idx=0)
        self.users = nn.Embedding(data.num_users, config.item_dim)
        self.output = nn.Embedding(data.num_items + 1, width, padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(data.num_items + 1))
        for table in (self.items, self.users, self.output):
            nn.init.normal_(table.weight, std=1 / table.embedding_dim)
        for table in (self.items, self.output):
            nn.init.zeros_(table.weight[0])
        untrained = torch.from_numpy(np.bincount(data.users, minlength=data.num_users) < 2)  # without an example
        self.users.weight.data[untrained] = 0  # and so it stays, as no gradient reaches it

    def window_vectors(self, windows: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """x (N, width) from the newest items (N, L), left-padded, and the users' vectors (N, d)."""
        raise NotImplementedError

    def with_one(self, windows: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """(N, width + 1): x and a 1, which meets the items' bias."""
        return F.pad(self.window_vectors(windows, users), (0, 1), value=1.0)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        histories, targets = batch["histories"], batch["targets"]  # (B, T)
        windows = F.pad(histories, (self.window - 1, 0)).unfold(1, self.window, 1)[targets != 0]  # (N, L)
        users = batch["users"][:, None].expand_as(targets)[targets != 0]  # (N,)
        return self.objective(self.with_one(windows, self.users(users)), targets[targets != 0])

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        table = self.users.weight
        known = (table != 0).any(1)  # (users,)
        found = (table.sum(0) / known.sum().clamp_min(1)).expand(len(histories), -1)  # (B, d)
        if users is not None:
            found = torch.where(known[users][:, None], table[users], found)
        windows = F.pad(histories, (self.window, 0))[:, -self.window :]  # (B, L)
        return self.with_one(windows, found)

    def item_vectors(self) -> torch.Tensor:
        return torch.cat([self.output.weight, self.bias[:, None]], 1)  # (V + 1, width + 1)

    def item_table(self) -> torch.Tensor:
        return self.items.weight  # (V + 1, d)
