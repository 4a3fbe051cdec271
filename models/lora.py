"""PEFT's LoRA of a linear map with less memory traffic."""

import torch
from peft.tuners import lora


class Linear(lora.Linear):
    """W x + scaling B A x, the second term added inside the product with B (`benchmarks/cost.py`).

    PEFT multiplies an output-sized tensor by `scaling` and adds it to another, forward, and multiplies one again,
    backward. For one active adapter; merged, disabled or with a weight of another precision it is PEFT's own.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        (name,) = self.active_adapters
        A, B = self.lora_A[name], self.lora_B[name].weight
        same_precision = x.dtype == A.weight.dtype or torch.is_autocast_enabled(x.device.type)
        if self.merged or self.disable_adapters or self.lora_variant or not same_precision:
            return super().forward(x, *args, **kwargs)
        plain = self.base_layer(x)  # (..., out)
        low = A(self.lora_dropout[name](x))  # (..., r)
        total = torch.addmm(plain.flatten(0, -2), low.flatten(0, -2), B.T, alpha=self.scaling[name])
        return total.view_as(plain)
