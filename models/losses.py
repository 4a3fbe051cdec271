"""One function an equation. Shapes: B examples, K blocks, h hidden size, d item dimension, V items.

The printed and the released forms of the distillation loss differ; see `norm_distance` and `reduce_blocks`.
"""

import torch
import torch.nn.functional as F


def catalogue_cross_entropy(vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_ce: cross-entropy over the whole catalogue, mean over the examples.

    vectors (N, d); items (V + 1, d), row 0 the padding, which is no class; targets (N,) in 1..V. In float32 also under
    autocast, as the scores at evaluation are.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        logits = vectors.float() @ items[1:].float().T  # (N, V)
        return F.cross_entropy(logits, targets - 1)


def cosine_similarity(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """D_cos of each block: mean over the batch of cos(h_t, h_s); both (B, K, h), result (K,)."""
    return F.cosine_similarity(teacher.float(), student.float(), dim=-1).mean(0)


def norm_distance(teacher: torch.Tensor, student: torch.Tensor, form: str) -> torch.Tensor:
    """D_norm of each block, mean over the batch; both (B, K, h), result (K,).

    form "l2": ||h_t - h_s||, what the released code computes. form "squared": ||h_t - h_s||^2, what the paper prints.
    """
    squared = (teacher.float() - student.float()).square().sum(-1)  # (B, K)
    # the derivative of the root is infinite at 0, where a student that equals its teacher stands
    return (squared if form == "squared" else squared.clamp_min(1e-24).sqrt()).mean(0)


def reduce_blocks(values: torch.Tensor, reduction: str) -> torch.Tensor:
    """Blocks (K,) to a scalar: "sum" as the released code does, "mean" as the paper prints."""
    return values.sum() if reduction == "sum" else values.mean()
