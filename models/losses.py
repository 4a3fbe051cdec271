"""One function per equation. Shapes: B examples, K blocks, h hidden size, d item dimension, V items.

The printed and the released forms of the distillation loss differ; see `norm_distance` and `reduce_blocks`.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**20  # entries of a chunk of the logits: small enough for a cache, large enough for a fast product
# A CPU takes a catalogue of more than MANY_ITEMS in chunks of EXAMPLES_AT_ONCE by ITEMS_AT_ONCE, which its cache holds.
MANY_ITEMS, EXAMPLES_AT_ONCE, ITEMS_AT_ONCE = 4096, 1024, 512


def catalogue_cross_entropy(vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_ce: cross-entropy over the whole catalogue, mean over the examples, without the logits (N, V) in memory.

    vectors (N, d); items (V + 1, d), row 0 the padding, which is no class; targets (N,) in 1..V. In float32 also under
    autocast, as the scores at evaluation are.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, items = vectors.float(), items.float()
        if len(vectors) * len(items) <= LOGITS_AT_ONCE:  # one chunk: nothing to save
            return F.cross_entropy(vectors @ items[1:].T, targets - 1)
        return in_parts(lambda v, t: ChunkedCrossEntropy.apply(v, items, t), is_large(items), vectors, targets)


def is_large(items: torch.Tensor) -> bool:
    """Whether a catalogue is too large for the cache of a CPU."""
    return items.device.type == "cpu" and len(items) > MANY_ITEMS


def in_parts(loss: Callable[..., torch.Tensor], large: bool, *examples: torch.Tensor) -> torch.Tensor:
    """loss(*examples), a mean over N examples: tensors (N, ...); with a large catalogue part by part."""
    if not large:
        return loss(*examples)
    parts = zip(*(tensor.split(EXAMPLES_AT_ONCE) for tensor in examples), strict=True)
    return sum(len(part[0]) * loss(*part) for part in parts) / len(examples[0])


def item_chunks(vectors: torch.Tensor, items: torch.Tensor) -> Iterator[slice]:
    """Rows of `items` (V + 1, d), the padding left out, in chunks whose logits with `vectors` (N, d) fit in memory."""
    size = max(256, LOGITS_AT_ONCE // len(vectors))
    if is_large(items):
        size = min(size, max(ITEMS_AT_ONCE, EXAMPLES_AT_ONCE * ITEMS_AT_ONCE // len(vectors)))
    return (slice(low, min(low + size, len(items))) for low in range(1, len(items), size))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Exact cross-entropy, chunk by chunk of the items; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = vectors.new_full((len(vectors),), -torch.inf)  # log of the sum of exp(logit) so far, (N,)
        for chunk in item_chunks(vectors, items):
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
            for chunk in item_chunks(vectors, items):
                part = items[chunk]
                share = torch.addmm(total[:, None], vectors, part.T, beta=-1).exp_()  # softmax, (N, chunk)
                d_vectors.addmm_(share, part)
                if d_items is not None:
                    torch.mm(share.T, scaled, out=d_items[chunk])
        if d_items is not None:
            d_items[0] = 0
            d_items.index_add_(0, targets, scaled, alpha=-1)
        return d_vectors.mul_(scale), d_items, None


def distillation_kl(
    vectors: torch.Tensor,
    items: torch.Tensor,
    teacher_vectors: torch.Tensor,
    teacher_items: torch.Tensor,
    temperature: float = 1.0,
    top: int | None = None,
) -> torch.Tensor:
    """L_kl: KL(teacher || student) between the distributions over the items (Hinton et al., 2015), mean over N targets.

    Logits are dot products over `temperature`, and the result counts `temperature` squared times, which keeps the
    gradient's size. vectors (N, d) and items (V + 1, d) of the student, teacher_vectors (N, d') and teacher_items
    (V + 1, d'), which get no gradient; row 0 of both tables is the padding, which is no class. top: the classes are
    the teacher's `top` best items of each target, and all other items together as one. In float32 also under autocast;
    no logits (N, V) stand in memory.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, items = vectors.float() / temperature, items.float()
        teacher_vectors, teacher_items = teacher_vectors.float().detach() / temperature, teacher_items.float().detach()

        def divergence(vectors: torch.Tensor, teacher_vectors: torch.Tensor) -> torch.Tensor:
            if top is not None and top < len(items) - 1:
                best, teacher = best_and_rest(teacher_vectors, teacher_items, top)  # (N, top), (N, top + 1)
                student = BestAndRest.apply(vectors, items, best)
            elif len(vectors) * len(items) <= LOGITS_AT_ONCE:  # one chunk: nothing to save
                teacher, student = teacher_vectors @ teacher_items[1:].T, vectors @ items[1:].T
            else:
                return ChunkedKL.apply(vectors, items, teacher_vectors, teacher_items)
            return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)

        return temperature**2 * in_parts(divergence, is_large(items), vectors, teacher_vectors)


class ChunkedKL(torch.autograd.Function):
    """Exact KL(teacher || student) over all items, chunk by chunk, as `ChunkedCrossEntropy`."""

    @staticmethod
    def forward(
        ctx, vectors: torch.Tensor, items: torch.Tensor, teacher_vectors: torch.Tensor, teacher_items: torch.Tensor
    ) -> torch.Tensor:
        total = vectors.new_full((len(vectors),), -torch.inf)  # as there, of the student and of the teacher, (N,)
        teacher_total = total.clone()
        excess = torch.zeros_like(total)  # by how much the teacher's logit exceeds the student's, in the mean over p
        for chunk in item_chunks(vectors, items):
            student, teacher = vectors @ items[chunk].T, teacher_vectors @ teacher_items[chunk].T
            total = torch.logaddexp(total, student.logsumexp(1))
            before, teacher_total = teacher_total, torch.logaddexp(teacher_total, teacher.logsumexp(1))
            share = (teacher - teacher_total[:, None]).exp_()
            excess = excess * (before - teacher_total).exp() + share.mul_(teacher.sub_(student)).sum(1)
        ctx.save_for_backward(vectors, items, teacher_vectors, teacher_items, total, teacher_total)
        return (excess + total - teacher_total).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        vectors, items, teacher_vectors, teacher_items, total, teacher_total = ctx.saved_tensors
        d_vectors = torch.zeros_like(vectors)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        scaled = vectors * (gradient / len(vectors))
        with torch.autocast(vectors.device.type, enabled=False):
            for chunk in item_chunks(vectors, items):
                change = torch.addmm(total[:, None], vectors, items[chunk].T, beta=-1).exp_()  # (N, chunk)
                change -= torch.addmm(teacher_total[:, None], teacher_vectors, teacher_items[chunk].T, beta=-1).exp_()
                d_vectors.addmm_(change, items[chunk])
                if d_items is not None:
                    torch.mm(change.T, scaled, out=d_items[chunk])
        return d_vectors.mul_(gradient / len(vectors)), d_items, None, None


def best_and_rest(vectors: torch.Tensor, items: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` items of each vector with the highest logits (N, top), and the logits (N, top + 1) of these classes.

    The last class is all other items together: the log of the sum of their exp(logit).
    """
    best = vectors.new_full((len(vectors), top), -torch.inf)  # logits of the best items so far
    number = torch.zeros_like(best, dtype=torch.long)
    rest = vectors.new_full((len(vectors),), -torch.inf)
    for chunk in item_chunks(vectors, items):
        logits = torch.cat([best, vectors @ items[chunk].T], 1)
        best, at = logits.topk(top)
        number = torch.where(at < top, number.gather(1, at.clamp_max(top - 1)), at + (chunk.start - top))
        rest = torch.logaddexp(rest, logits.scatter_(1, at, -torch.inf).logsumexp(1))
    return number, torch.cat([best, rest[:, None]], 1)


class BestAndRest(torch.autograd.Function):
    """Logits (N, top + 1) of the items `best` (N, top) and of all others together, chunk by chunk."""

    @staticmethod
    def inside(best: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of `best` that lie in the chunk."""
        return ((best >= chunk.start) & (best < chunk.stop)).nonzero(as_tuple=True)

    @staticmethod
    def forward(ctx, vectors: torch.Tensor, items: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        classes = vectors.new_full((best.shape[0], best.shape[1] + 1), -torch.inf)
        for chunk in item_chunks(vectors, items):
            logits = vectors @ items[chunk].T
            row, column = BestAndRest.inside(best, chunk)
            at = best[row, column] - chunk.start
            classes[row, column] = logits[row, at]
            logits[row, at] = -torch.inf
            classes[:, -1] = torch.logaddexp(classes[:, -1], logits.logsumexp(1))
        ctx.save_for_backward(vectors, items, best, classes[:, -1].clone())
        return classes

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        vectors, items, best, rest = ctx.saved_tensors
        d_vectors = torch.zeros_like(vectors)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        with torch.autocast(vectors.device.type, enabled=False):
            for chunk in item_chunks(vectors, items):
                change = torch.addmm(rest[:, None], vectors, items[chunk].T, beta=-1).exp_()  # (N, chunk)
                change *= gradient[:, -1:]
                row, column = BestAndRest.inside(best, chunk)
                change[row, best[row, column] - chunk.start] = gradient[row, column]
                d_vectors.addmm_(change, items[chunk])
                if d_items is not None:
                    torch.mm(change.T, vectors, out=d_items[chunk])
        return d_vectors, d_items, None


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


def uniform_negatives(targets: torch.Tensor, number: int, num_items: int) -> torch.Tensor:
    """(N, number) items, each uniform over the num_items - 1 that are not the target: targets (N,) in 1..num_items."""
    drawn = torch.randint(1, num_items, (len(targets), number), device=targets.device)
    return drawn + (drawn >= targets[:, None])


def item_logits(vectors: torch.Tensor, items: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(N, S) dot products of vectors (N, d) with the rows `ids` (N, S) of items (V + 1, d); in float32."""
    with torch.autocast(vectors.device.type, enabled=False):
        return (items.float()[ids] @ vectors.float()[..., None])[..., 0]


def binary_cross_entropy(logits: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """L_gBCE, mean over N: -(beta log sigma(s+) + sum of log(1 - sigma(s-))) / (S + 1) (Petrov and Macdonald, 2023).

    logits (N, 1 + S): of the target, then of its negatives. beta 1 is the plain binary cross-entropy.
    """
    return -torch.cat([beta * F.logsigmoid(logits[:, :1]), F.logsigmoid(-logits[:, 1:])], 1).mean()


def gbce_beta(alpha: float, t: float) -> float:
    """beta = alpha (t (1 - 1 / alpha) + 1 / alpha), of the sampling rate alpha = S / (V - 1) and the calibration t."""
    return 1 - t * (1 - alpha)


def bpr(logits: torch.Tensor) -> torch.Tensor:
    """-log sigma(s+ - s-), mean over all negatives (Rendle et al., 2009); logits (N, 1 + S), the target's first."""
    return -F.logsigmoid(logits[:, :1] - logits[:, 1:]).mean()


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
