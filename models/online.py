"""Online distillation: teacher and student are trained together, as the released code's `online` does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.llm.decoder import block_boundaries
from models.llm.recommender import LLMRec
from models.losses import catalogue_cross_entropy
from models.slmrec import SLMRec, block_vectors, heads_of_blocks


class OnlineSLMRec(SLMRec):
    """`SLMRec` with a teacher that trains beside its student: it answers as the student does.

    The loss is the student's plus the teacher's: L_ce + lambda_ms_teacher L_ms, with the teacher's own heads. cos and
    norm compare states of the same step, and both models get their gradient. L_kl reads the teacher's user vectors of
    the last block, or with `kl_blocks` those of every block (from the heads of L_ms); the teacher gets no gradient from
    it. If `teacher_vectors` are set, L_kl reads those of another run instead.
    """

    def __init__(
        self, student: LLMRec, teacher: LLMRec, *, num_blocks: int, lambda_ms_teacher: float, kl_blocks: bool, **terms
    ) -> None:
        """terms: the other arguments of `SLMRec`. kl_blocks needs both sides' heads, so weights of L_ms above 0."""
        super().__init__(student, num_blocks=num_blocks, **terms)
        self.online_teacher = teacher
        self.teacher_boundaries = block_boundaries(teacher.num_layers, num_blocks)
        self.lambda_ms_teacher, self.kl_blocks = lambda_ms_teacher, kl_blocks
        self.teacher_ms_heads = heads_of_blocks(teacher, num_blocks - 1 if lambda_ms_teacher else 0)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weighted loss terms: histories (B, T), targets (B, T), 0 where there is none."""
        teacher, target_mask = self.online_teacher, batch["targets"] != 0
        states = teacher.states(batch["histories"], target_mask, self.teacher_boundaries)  # (N, K, h)
        items, targets = teacher.item_vectors(), batch["targets"][target_mask]  # (V + 1, d), (N,)
        user_vectors = teacher.head(states[:, -1])  # (N, d)
        early = block_vectors(teacher, self.teacher_ms_heads, states)
        terms = {"teacher_ce": catalogue_cross_entropy(user_vectors, items, targets)}
        if early:
            terms["teacher_ms"] = self.lambda_ms_teacher * self.supervision(early, items, targets)
        taught = {"teacher_states": states}
        if self.teacher_vectors is None:
            compared = [*early, user_vectors] if self.kl_blocks else [user_vectors]
            taught |= {"teacher_vectors": torch.stack(compared, dim=1), "teacher_table": items}
        return super().forward(batch | taught) | terms

    @contextmanager
    def for_accumulation(self) -> Iterator[None]:
        with super().for_accumulation(), self.online_teacher.for_accumulation():
            yield

    def shard(self, device: torch.device) -> None:
        super().shard(device)
        self.online_teacher.shard(device)

    def head_parameters(self) -> list[nn.Parameter]:
        of_teacher = [*self.online_teacher.head_parameters(), *self.teacher_ms_heads.parameters()]
        return [*super().head_parameters(), *of_teacher]
