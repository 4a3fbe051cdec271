"""HGN (Ma et al., 2019): a gate on the features of each newest item, a gate on each item, and the items themselves.

With s_l the vector of item l of L and u that of the user: the feature gate s'_l = s_l * sigma(W1 s_l + W2 u + b), the
instance gate g_l = sigma(w3 . s'_l + u . w4_l), and x = u + sum of g_l s'_l / sum of g_l + sum of s_l: the score is
q_j . x + b_j, as the paper's three products all meet q_j. Deviations: padding has no part in the sums, one target
after each window (T = 1), and the default loss is over all items, not BPR. Means weighted by the gates, as released.
There all weights have an L2 penalty (--optimizer adam --weight_decay), and those of the instance gate, which are no
parameters, stay as drawn.
"""

import torch
from torch import nn

from models.sr.windows import WindowRecommender
from utils.data import TrainingPart


class HGN(WindowRecommender):
    """w4_l belongs to a place in the window, counted back from the newest item."""

    def __init__(self, config: WindowRecommender.Config, data: TrainingPart) -> None:
        d, L = config.item_dim, config.window
        super().__init__(config, data, width=d)
        self.feature_item, self.feature_user = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.instance_item, self.instance_user = nn.Linear(d, 1, bias=False), nn.Linear(d, L, bias=False)

    def window_vectors(self, windows: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        s = self.items(windows)  # (N, L, d), 0 at padding
        gated = s * (self.feature_item(s) + self.feature_user(users)[:, None]).sigmoid()  # (N, L, d)
        gates = (self.instance_item(gated)[..., 0] + self.instance_user(users)).sigmoid() * (windows != 0)  # (N, L)
        mean = (gated * gates[..., None]).sum(1) / gates.sum(1, keepdim=True).clamp_min(1e-9)
        return users + mean + s.sum(1)  # (N, d)
