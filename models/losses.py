"""One function per equation. Shapes: B examples, K blocks, h hidden size, d item dimension, V items.

The printed and the released forms of the distillation loss differ; see `norm_distance` and `reduce_blocks`.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**20  # entries of a chunk of the logits: small enough for a cache, large enough for a fast product


def catalogue_cross_entropy(vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_ce: cross-entropy over the whole catalogue, mean over the examples, without the logits (N, V) in memory.

    vectors (N, d); items (V + 1, d), row 0 the padding, which is no class; targets (N,) in 1..V. In float32 also under
    autocast, as the scores at evaluation are.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, items = vectors.float(), items.float()
        if len(vectors) * len(items) <= LOGITS_AT_ONCE:  # one chunk: nothing to save
            return F.cross_entropy(vectors @ items[1:].T, targets - 1)
        return ChunkedCrossEntropy.apply(vectors, items, targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Exact cross-entropy, chunk by chunk of the items; the backward pass computes each chunk's logits again."""

    @staticmethod
    def chunks(vectors: torch.Tensor, items: torch.Tensor) -> Iterator[slice]:
        size = max(256, LOGITS_AT_ONCE // len(vectors))
        return (slice(low, min(low + size, len(items))) for low in range(1, len(items), size))

    @staticmethod
    def forward(ctx, vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = vectors.new_full((len(vectors),), -torch.inf)  # log of the sum of exp(logit) so far, (N,)
        for chunk in ChunkedCrossEntropy.chunks(vectors, items):
            total = torch.logaddexp(total, (vectors @ items[chunk].T).logsumexp(1))
        ctx.save_for_backward(vectors, items, targets, total)
        return (total - (vectors * items[targets]).sum(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        vectors, items, targets, total = ctx.saved_tensors
        scale = gradient / len(vectors)
        scaled = vectors * scale
        d_vectors = items[targets].neg_()  # (N, d)
        d_items = torch.empty_like(items) if ctx.needs_input_grad[1] else None  # (V + 1, d)
        with torch.autocast(vectors.device.type, enabled=False):
            for chunk in ChunkedCrossEntropy.chunks(vectors, items):
                part = items[chunk]
                share = torch.addmm(total[:, None], vectors, part.T, beta=-1).exp_()  # softmax, (N, chunk)
                d_vectors.addmm_(share, part)
                if d_items is not None:
                    torch.mm(share.T, scaled, out=d_items[chunk])
        if d_items is not None:
            d_items[0] = 0
            d_items.index_add_(0, targets, scaled, alpha=-1)
        return d_vectors.mul_(scale), d_items, None


def sampled_cross_entropy(
    vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor, log_q: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy whose sum over the catalogue is estimated from `negatives` (S,), drawn with replacement from q.

    log_q (V + 1,) is log of q. A negative counts 1 / (S q) times (logQ correction), which makes the estimate of the
    sum unbiased; where it is the example's own target it counts nothing, as the target is in the sum already.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, items = vectors.float(), items.float()
        positive = (vectors * items[targets]).sum(1, keepdim=True)  # (N, 1)
        logits = vectors @ items[negatives].T - log_q[negatives] - math.log(len(negatives))  # (N, S)
        logits = logits.masked_fill(negatives == targets[:, None], -torch.inf)
        return (torch.cat([positive, logits], 1).logsumexp(1) - positive[:, 0]).mean()


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
