"""Dropout with masks that are cheap to draw without an accelerator."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """nn.Dropout with 16 random bits per number, where its CPU form draws a double for each (docs/log.md, 2026-11-25).

    Four numbers share one draw. `p` is met to 2^-17; what is kept is divided by the share that is really kept, so
    the expectation is exact. On other devices than a CPU it is nn.Dropout.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**16)  # of the 2^16 values of 16 bits
        if not self.training or x.device.type != "cpu" or not 0 < dropped < 2**16:
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))
