"""Dropout with cheap masks is dropout: the promised share, independent numbers, the exact expectation and gradient."""

import math

import pytest
import torch
from conftest import make_sequences, sasrec
from torch import nn

from models.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_share_and_independence(p):
    torch.manual_seed(0)
    n = 400_000
    dropped = (Dropout(p)(torch.ones(n)) == 0).double()
    spread = math.sqrt(p * (1 - p) / n)
    assert abs(dropped.mean() - p) < 5 * spread
    for lane in range(4):  # four numbers share a draw of 64 bits: each has its share
        assert abs(dropped[lane::4].mean() - p) < 10 * spread
    for apart in (1, 2, 3, 4):  # and tells nothing about its neighbours
        both = dropped[apart:] * dropped[:-apart]
        assert abs(both.mean() - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n) + 2 * p * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_and_so_is_its_gradient(dtype):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)  # 105 numbers: no multiple of four
    y = Dropout(0.3)(x)
    y.backward(torch.ones_like(y))
    kept = y != 0
    assert y.shape == x.shape and y.dtype == dtype and 0 < kept.sum() < x.numel()
    scale = 1 / (1 - round(0.3 * 65536) / 65536)
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0))
    torch.testing.assert_close(x.grad, torch.where(kept, scale, 0.0).to(dtype))


def test_the_seed_decides_and_evaluation_drops_nothing():
    x, dropout = torch.randn(1000), Dropout(0.5)

    def drawn(seed):
        torch.manual_seed(seed)
        return dropout(x)

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))


def test_sasrec_uses_it():
    found = [m for m in sasrec(make_sequences(), dropout=0.1).modules() if isinstance(m, nn.Dropout)]
    assert len(found) >= 4 and all(type(module) is Dropout for module in found)
