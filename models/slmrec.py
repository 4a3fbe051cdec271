"""SLMRec: a shallow student, and the terms that pull it towards a deep, frozen teacher (section 3.3 of the paper)."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from models.interface import Recommender
from models.llm.decoder import block_boundaries
from models.llm.recommender import LLMRec
from models.llm.teacher_states import Answers
from models.losses import catalogue_cross_entropy, cosine_similarity, distillation_kl, norm_distance, reduce_blocks
from utils.data import Examples


def heads_of_blocks(model: LLMRec, number: int) -> nn.ModuleList:
    """Heads of L_ms for the first `number` blocks of a stack: hidden size -> d each."""
    return nn.ModuleList(nn.Linear(model.hidden_size, model.table.shape[1], bias=False) for _ in range(number))


def block_vectors(model: LLMRec, heads: nn.ModuleList, states: torch.Tensor) -> list[torch.Tensor]:
    """User vectors (N, d) of each block that has a head of L_ms, from the states (N, K, h) of all blocks."""
    return [head(model.state_dropout(states[:, k].to(head.weight.dtype))) for k, head in enumerate(heads)]


class SLMRec(Recommender):
    """A student and its loss, L_ce + lambda_cos (1 - D_cos) + lambda_norm D_norm + lambda_ms L_ms + lambda_kl L_kl.

    A term with weight 0 is neither computed nor logged, so with all weights 0 this is plain training. `ms_heads` are
    L_ms's adapters (hidden -> d), one for each block but the last; they serve training only. `teacher_states`
    (targets, K, h) and `teacher_vectors` (targets, d'), if a term needs them, have a row per target of all training
    examples, in their order; `teacher_table` (V + 1, d') belongs to the vectors. Without `teacher_states`, `teacher`, a
    model in eval mode with its block boundaries, computes the states of each batch. A teacher that trains too:
    `OnlineSLMRec`.
    """

    teacher_states: Answers | None = None
    teacher: tuple[LLMRec, list[int]] | None = None
    teacher_vectors: Answers | None = None

    def __init__(
        self,
        student: LLMRec,
        *,
        num_blocks: int = 1,
        lambda_cos: float = 0.0,
        lambda_norm: float = 0.0,
        lambda_ms: float = 0.0,
        norm_form: str = "l2",
        block_reduction: str = "sum",
        lambda_kl: float = 0.0,
        temperature: float = 1.0,
        kl_items: int | None = None,
    ):
        super().__init__(None, None)
        self.student = student
        self.boundaries = block_boundaries(student.num_layers, num_blocks)
        self.lambda_cos, self.lambda_norm, self.lambda_ms = lambda_cos, lambda_norm, lambda_ms
        self.norm_form, self.block_reduction = norm_form, block_reduction
        self.lambda_kl, self.temperature, self.kl_items = lambda_kl, temperature, kl_items
        self.register_buffer("teacher_table", None, persistent=False)  # neither trained nor saved
        self.ms_heads = heads_of_blocks(student, num_blocks - 1 if lambda_ms else 0)

    @property
    def needs_states(self) -> bool:
        """Whether a term reads the teacher's hidden states."""
        return bool(self.lambda_cos or self.lambda_norm)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weighted loss terms: histories (B, T), targets (B, T), 0 where there is none; N targets.

        teacher_states (N, K, h) and teacher_vectors (N, d'), if a term needs them, row-major over the targets; int16
        are bits of bfloat16. Vectors (N, J, d') teach the student's last J blocks, with a teacher_table of their own.
        """
        needs_blocks = self.needs_states or self.lambda_ms
        target_mask = batch["targets"] != 0
        states = self.student.states(
            batch["histories"], target_mask, self.boundaries if needs_blocks else self.boundaries[-1:]
        )
        items, targets = self.student.item_vectors(), batch["targets"][target_mask]  # (V + 1, d), (N,)
        user_vectors = self.student.head(states[:, -1])  # (N, d)
        terms = {"ce": catalogue_cross_entropy(user_vectors, items, targets)}
        if self.needs_states:
            stored = self.teacher is None
            taught = batch["teacher_states"] if stored else self.of_teacher(batch["histories"], target_mask)
            taught = taught.view(torch.bfloat16) if taught.dtype == torch.int16 else taught  # (N, K, h)
        if self.lambda_cos:
            distance = 1 - cosine_similarity(taught, states)  # (K,)
            terms["cos"] = self.lambda_cos * reduce_blocks(distance, self.block_reduction)
        if self.lambda_norm:
            distance = norm_distance(taught, states, self.norm_form)  # (K,)
            terms["norm"] = self.lambda_norm * reduce_blocks(distance, self.block_reduction)
        early = block_vectors(self.student, self.ms_heads, states)
        if early:
            terms["ms"] = self.lambda_ms * self.supervision(early, items, targets)
        if self.lambda_kl:
            table, vectors = batch.get("teacher_table", self.teacher_table), batch["teacher_vectors"]
            of_teacher = vectors.unbind(1) if vectors.ndim == 3 else [vectors]  # (N, d') each
            of_student = [*early, user_vectors][-len(of_teacher) :]  # (N, d) each
            divergences = [
                distillation_kl(ours, items, theirs, table, self.temperature, self.kl_items)
                for ours, theirs in zip(of_student, of_teacher, strict=True)
            ]
            terms["kl"] = self.lambda_kl * reduce_blocks(torch.stack(divergences), self.block_reduction)
        return terms

    def supervision(self, early: list[torch.Tensor], items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """L_ms of one stack: the cross-entropy of its `block_vectors`, over the blocks."""
        losses = torch.stack([catalogue_cross_entropy(vectors, items, targets) for vectors in early])  # (K - 1,)
        return reduce_blocks(losses, self.block_reduction)

    @torch.no_grad()
    def of_teacher(self, histories: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """The teacher's states (N, K, h), where they are not stored."""
        teacher, boundaries = self.teacher
        return teacher.states(histories, target_mask, boundaries)

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        answers = {"teacher_states": self.teacher_states, "teacher_vectors": self.teacher_vectors}
        rows = examples.target_rows(index)
        found = {name: torch.from_numpy(of[rows]) for name, of in answers.items() if of is not None}
        return super().batch(examples, index, rng) | found

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.student.user_vectors(histories, users)

    def for_inference(self) -> AbstractContextManager[None]:
        return self.student.for_inference()

    def for_accumulation(self) -> AbstractContextManager[None]:
        return self.student.for_accumulation()

    def item_vectors(self) -> torch.Tensor:
        return self.student.item_vectors()

    def shard(self, device: torch.device) -> None:
        self.student.shard(device)

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.student.head_parameters(), *self.ms_heads.parameters()]
