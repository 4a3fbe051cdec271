"""LoRA added inside the product is W x + b + scaling B A x, with the gradients and the extras of PEFT's own."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from models.lora import Linear

SCALING = 2.5


def adapted(module: nn.Module, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A model of one linear map `up` (8 -> 12) with an adapter of rank 4, none of whose parts is 0."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=4 * SCALING, lora_dropout=dropout, target_modules=["up"])
    config._register_custom_module({nn.Linear: module})
    model = get_peft_model(nn.ModuleDict({"up": nn.Linear(8, 12)}), config)
    nn.init.normal_(model.up.lora_B["default"].weight)
    assert type(model.up) is module
    return model


def test_it_is_the_formula():
    model, x = adapted(Linear), torch.randn(2, 3, 8)
    layer = model.up
    W, b, A, B = (
        p.detach().double().numpy()
        for p in (
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
    )
    expected = x.double().numpy() @ (W + SCALING * B @ A).T + b
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_answers_and_gradients_are_those_of_peft(dropout):
    found = []
    for module in (Linear, lora.Linear):
        layer = adapted(module, dropout).train().up
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)  # of dropout
        y = layer(x)
        y.square().sum().backward()
        found.append([y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_rounded_no_more_than_peft():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    exact = adapted(Linear).up(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (adapted(module).up(x) for module in (Linear, lora.Linear))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_merged_disabled_and_in_another_precision_it_is_pefts_own():
    x = torch.randn(5, 8)
    for model in (adapted(Linear), adapted(lora.Linear)):
        apart, base = model.up(x), model.up.base_layer(x)
        with model.disable_adapter():
            assert torch.equal(model.up(x), base) and not torch.allclose(apart, base)
        model.merge_adapter()
        torch.testing.assert_close(model.up(x), apart)
        model.unmerge_adapter()
        model.up.base_layer.to(torch.bfloat16)
        assert model.up(x.bfloat16()).dtype == torch.bfloat16
