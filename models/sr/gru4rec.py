"""GRU4Rec (Hidasi et al., 2016): a recurrent network over the history, whose state meets the item vectors.

With e_t the vector of item t: h_t = GRU(e_t, h_{t-1}), the user vector after t is W h_t + b. Deviations: the table is
shared between input and output, a linear map leads back to its width (as in RecBole and RecBoard), histories are
users' and not sessions, each position of one is a target in one pass, the gates have biases and start as PyTorch's
(RecBole has none, and Xavier), and the default loss is over all items.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.dropout import Dropout
from models.interface import flag
from models.sr.objectives import SequentialRecommender
from utils.data import TrainingPart


class GRU4Rec(SequentialRecommender):
    """Histories are read from their first item on, so that padding changes no state."""

    @dataclass(frozen=True)
    class Config(SequentialRecommender.Config):
        hidden_dim: int = flag(128, "width of the recurrent state", ">= 1")
        num_layers: int = flag(1, "recurrent layers", ">= 1")
        dropout: float = flag(0.2, "dropout of the items that are read, and between layers", "0..1")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        d, h, layers = config.item_dim, config.hidden_dim, config.num_layers
        self.items = nn.Embedding(data.num_items + 1, d, padding_idx=0)
        self.dropout = Dropout(config.dropout)
        self.gru = nn.GRU(d, h, layers, batch_first=True, dropout=config.dropout if layers > 1 else 0.0)
        self.out = nn.Linear(h, d)
        nn.init.trunc_normal_(self.items.weight, std=0.02)
        nn.init.zeros_(self.items.weight[0])

    def states(self, histories: torch.Tensor) -> torch.Tensor:
        T = histories.shape[1]
        padding, at = (histories == 0).sum(1, keepdim=True), torch.arange(T, device=histories.device)
        items_first = histories.gather(1, (at + padding) % T)  # (B, T): left padding goes behind the items
        with torch.autocast(histories.device.type, enabled=False):  # cuDNN would take float16, too small for gradients
            states = self.gru(self.dropout(self.items(items_first)).float())[0]  # (B, T, h)
        return self.out(states.take_along_dim(((at - padding) % T)[..., None], dim=1))  # (B, T, d)
