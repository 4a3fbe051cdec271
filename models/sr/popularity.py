"""The baseline without training: every user is recommended the items that occur most often in the training part."""

import torch

from models.interface import Recommender
from utils.data import TrainingPart


class Popularity(Recommender):
    """Scores are training counts, the same for everybody."""

    def __init__(self, config: Recommender.Config | None, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.register_buffer("counts", torch.from_numpy(data.counts()).float())  # (V + 1,)

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ones(len(histories), 1, device=histories.device)  # (B, 1)

    def item_vectors(self) -> torch.Tensor:
        return self.counts[:, None]  # (V + 1, 1)
