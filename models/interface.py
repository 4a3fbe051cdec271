"""What a recommender is: the page that the author of a new model reads.

A traditional model is one file in `models/sr/` with one class, named in `models/sr/__init__.py` and in the
README's list of files.
Teacher and student (`models/llm/`, `models/slmrec.py`) answer the same interface, so that training, evaluation, step 2
and `recommend.py` are written once. Item ids are 1..V, 0 is padding; histories (B, T) are left-padded, the newest item
last; d is the width of the item table.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.data import Examples, TrainingPart
from utils.errors import UserError


def flag(default: Any, meaning: str, limits: str = "") -> Any:
    """A field of a Config: a command-line flag with its default, what it means, and the range of a number.

    limits: "> 0", ">= 0", ">= 1", "0..1" (1 excluded) or "-1 or >= 1".
    """
    return field(default=default, metadata={"meaning": meaning, "limits": limits})


def dot_products(vectors: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Scores in float32, under autocast too: (B, d), (V, d) -> (B, V)."""
    with torch.autocast(vectors.device.type, enabled=False):
        return vectors.float() @ items.float().T


class Recommender(nn.Module):
    """Derive, give it a Config, and write `__init__`, `forward`, `user_vectors` and `item_vectors`.

    The rest has defaults. What is random must come from torch's generator or from `rng`: both are seeded for each
    step, so that an interrupted run continues exactly.
    """

    @dataclass(frozen=True)
    class Config:
        """The model's flags: `--help` shows them, recipes and run folders hold them. Derive from this one."""

        max_seq_length: int = flag(30, "newest items of a history that are read", ">= 1")

    def __init__(self, config: Config | None, data: TrainingPart | None) -> None:
        """config: the resolved flags. data: what training may know (counts, pairs for graphs, attributes of items)."""
        super().__init__()

    # --- needed ---

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named loss terms of a batch of `batch`; their sum is minimised, and each is logged."""
        raise NotImplementedError

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d) from histories (B, T) and the users' numbers (B,), which only some models need."""
        raise NotImplementedError

    def item_vectors(self) -> torch.Tensor:
        """(V + 1, d), row 0 the padding. The score of an item is its dot product with the user vector."""
        raise NotImplementedError

    # --- defaults that most models keep ---

    def batch(self, examples: Examples, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What `forward` gets for the training examples `index`: histories, targets (B, T) and users (B,).

        targets[b, t] is the item to predict after histories[b, :t + 1], 0 where nothing is to be predicted. Masks,
        positives and the like are drawn here, from `rng`.
        """
        return examples.batch(index)

    def scores(
        self, histories: torch.Tensor, users: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, V + 1), or (B, len(items)) for these items. A generative model, which has no vectors, overrides it."""
        vectors = self.item_vectors() if items is None else self.item_vectors()[items]
        return dot_products(self.user_vectors(histories, users), vectors)

    def score_blocks(
        self, histories: torch.Tensor, users: torch.Tensor, size: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The users of each block of `size` and their `scores` (size, V + 1), float32: histories (B, T), users (B,).

        User vectors are computed for all B at once, as they need less memory.
        """
        blocks = [slice(low, low + size) for low in range(0, len(histories), size)]
        if type(self).scores is not Recommender.scores:
            yield from ((block, self.scores(histories[block], users[block]).float()) for block in blocks)
            return
        vectors, items = self.user_vectors(histories, users), self.item_vectors().float()
        yield from ((block, dot_products(vectors[block], items)) for block in blocks)

    def item_table(self) -> torch.Tensor:
        """(V + 1, d): what step 2 hands to the language model."""
        return self.item_vectors()

    @torch.no_grad()
    def init_items(self, rows: torch.Tensor) -> None:
        """Start the item table from `rows` (V + 1, d), at the scale of its own start.

        Rows of zeros, and the padding, keep their start. UserError where the widths differ, or the table is computed
        from other weights: such a model overrides this.
        """
        table = self.item_table()
        if rows.shape != table.shape:
            raise UserError(
                f"--init_items: its table has width {rows.shape[1]}, the model's {table.shape[1]}: change one"
            )
        given = (rows != 0).any(dim=1)
        given[0] = False
        scale = table[1:].square().mean().sqrt() / rows[given].square().mean().sqrt()  # in root mean square
        table[given] = started = (rows[given] * scale).to(table.dtype)
        if not torch.equal(self.item_table()[given], started):
            raise UserError(f"--init_items: the item table of {type(self).__name__} is computed, so it cannot be given")

    # --- optional: nothing happens by default ---

    def stages(self) -> list[tuple[str, float]]:
        """Pre-training stages before the training proper: name and epochs of each. `self.stage` is the current one."""
        return []

    stage = "train"

    reads_attributes = False  # whether training learns from the attributes of items, where the dataset has some

    def resize(self, weights: dict[str, torch.Tensor]) -> None:
        """Make room for saved `weights` whose shape the training data decides."""

    def for_inference(self) -> AbstractContextManager[None]:
        """Inside, while no weight changes, the model may keep what it computes."""
        return nullcontext()

    def for_accumulation(self) -> AbstractContextManager[None]:
        """Inside, while micro-batches add up to one step, they may share what they have in common."""
        return nullcontext()

    def shard(self, device: torch.device) -> None:
        """Let each process hold its part of what does not train, on `device`: for a model too large for one (FSDP)."""
        raise UserError(
            f"accelerate's --use_fsdp shards the base of finetune.py and distill.py: start {type(self).__name__} "
            "without it"
        )

    def head_parameters(self) -> list[nn.Parameter]:
        """Those that --head_learning_rate is for."""
        return []
