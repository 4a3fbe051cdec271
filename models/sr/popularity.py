"""The floor: every user is recommended the items that occur most often in the training part."""

import torch
from torch import nn


class Popularity(nn.Module):
    """Scores are training counts, the same for everybody.

    counts: (V + 1,), how often each item occurs in the training part of the sequences; entry 0 is 0.
    """

    def __init__(self, counts: torch.Tensor):
        super().__init__()
        self.register_buffer("counts", counts.float())

    def user_vectors(self, histories: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(histories), 1, device=histories.device)  # (B, 1)

    def item_vectors(self) -> torch.Tensor:
        return self.counts[:, None]  # (V + 1, 1)
