"""Teacher and student alike: a decoder language model that reads item vectors and answers with a user vector.

Input, as embeddings: prompt prefix tokens | one vector per history item (frozen item table -> `input_proj`) | response
tokens. The last position of the last layer through `score` is the user vector; item scores are its dot products with
the item table, which is frozen but for `item_output` (section 3.2 of E4SRec, which the paper's teacher follows). With
`read_out` "item" no response tokens run, and the user vector after an item is read at the item itself.

`plain_states` computes this as transformers would, a copy of the history for each target. `states` computes the same
for less: the prefix is the same for everybody and attention is causal, so it runs once for the whole batch, with
gradient, and every sample attends to its keys and values; only tokens that are there run (models/llm/packing.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.interface import Recommender, dot_products
from models.llm.attention import (
    KeyValues,
    ReadSome,
    Rows,
    add_adapters,
    base_of,
    keys_values,
    merged,
    use_packed_attention,
)
from models.llm.decoder import check_length, shard_layers
from models.llm.packing import pack
from models.losses import catalogue_cross_entropy
from utils.errors import UserError


@dataclass(frozen=True)
class Fast:
    """Which optimisations are on. With all off, `states` are `plain_states`; the answers are the same to rounding."""

    prefix_once: bool = True  # the prompt prefix runs once for all samples
    keep_prefix: bool = True  # and at inference once for all batches, in training for all micro-batches of a step
    packing: bool = True  # only tokens that are there run
    share_rows: bool = True  # short samples share rows of attention
    share_keys: bool = True  # query heads share keys and values without a copy for each
    read_some: bool = True  # the top layer computes at positions that are read
    merge: bool = True  # at inference adapters are merged into the base


PLAIN = Fast(*[False] * 7)


class ItemOutput(nn.Module):
    """The table (V + 1, d) that scores items, from the frozen one; it starts as the frozen one.

    kind: "frozen"; "residual" adds a trained matrix of rank `rank`; "trained" trains every number, as E4SRec does.
    """

    def __init__(self, kind: str, table: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "residual":  # one step of Adam moves a number by its rate times the scale of the table's numbers
            left = torch.randn(len(table), rank) * table[1:].square().mean().sqrt() / rank**0.5
            self.left, self.right = nn.Parameter(left), nn.Parameter(torch.zeros(rank, table.shape[1]))
        elif kind == "trained":
            self.change = nn.Parameter(torch.zeros_like(table))

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        if self.kind == "frozen":
            return table
        with torch.autocast(table.device.type, enabled=False):  # scores are float32 also in a bfloat16 run
            return table + (self.left @ self.right if self.kind == "residual" else self.change)


class LLMRec(Recommender):
    """A decoder with a frozen item table, two trained maps and, by `train_strategy`, what else trains.

    decoder: as `load_decoder` returns it. item_table: (V + 1, d), row 0 the padding.
    train_strategy: "lora" trains adapters on `lora["target_modules"]`; "full" all decoder layers and the final norm;
    "frozen" neither. `input_proj` and `score` always train; token embeddings and item table never.
    read_out: "response" or "item", see above. item_dropout, state_dropout: of the item vectors that are read, and of
    the states that `score` maps. input_map: `input_proj` is "linear" or an "mlp" of two layers. item_output, with
    `item_rank`: see `ItemOutput`. UserError where the base is too short for prompt and history, or has
    an attention that packed rows cannot follow.
    """

    fast = Fast()

    def __init__(
        self,
        decoder: nn.Module,
        item_table: torch.Tensor,
        *,
        prefix_ids: list[int],
        response_ids: list[int],
        max_length: int,
        train_strategy: str = "lora",
        lora: dict | None = None,
        read_out: str = "response",
        item_dropout: float = 0.0,
        state_dropout: float = 0.0,
        input_map: str = "linear",
        item_output: str = "frozen",
        item_rank: int = 16,
    ):
        super().__init__(None, None)
        hidden, dim = decoder.config.hidden_size, item_table.shape[1]
        self.max_length, self.train_strategy = max_length, train_strategy
        self.num_layers, self.hidden_size = len(decoder.layers), hidden
        response_ids = response_ids if read_out == "response" else []
        self.input_proj = nn.Linear(dim, hidden)
        if input_map == "mlp":
            self.input_proj = nn.Sequential(self.input_proj, nn.GELU(), nn.Linear(hidden, hidden))
        self.score = nn.Linear(hidden, dim, bias=False)
        self.item_output = ItemOutput(item_output, item_table.float(), item_rank)
        self.item_dropout, self.state_dropout = nn.Dropout(item_dropout), nn.Dropout(state_dropout)
        self.register_buffer("table", item_table.float())
        self.register_buffer("prefix_ids", torch.tensor([prefix_ids]), persistent=False)
        self.register_buffer("response_ids", torch.tensor([response_ids], dtype=torch.long), persistent=False)
        decoder.requires_grad_(train_strategy == "full")
        decoder.get_input_embeddings().requires_grad_(False)
        check_length(decoder.config, max_length, len(prefix_ids) + len(response_ids))
        use_packed_attention(decoder)
        adapted = [name.rsplit(".", 1)[-1] for name in lora["target_modules"]] if train_strategy == "lora" else []
        self.top = ReadSome(decoder.layers[-1], adapted)
        self.kept_prefix: KeyValues | None = None
        self.init_input_proj(decoder.get_input_embeddings())
        self.decoder = add_adapters(decoder, lora) if train_strategy == "lora" else decoder

    @torch.no_grad()
    def init_input_proj(self, embed: nn.Module) -> None:
        """Let items start at the scale of the prompt's words, which nn.Linear's own start does not know.

        With SmolLM2-135M and SASRec's table of MovieLens-100K what tells items apart starts several times too small.
        """
        norms = self.table[1:].norm(dim=1)
        words, scale = embed(self.prefix_ids).float().std(), (norms > 0).sum() / norms.sum()
        for layer in [self.input_proj] if isinstance(self.input_proj, nn.Linear) else self.input_proj[::2]:
            nn.init.normal_(layer.weight).mul_(scale)
            nn.init.zeros_(layer.bias)
            scale = (0.425 * layer.out_features) ** -0.5  # E[gelu(x)^2] = 0.425 for x from N(0, 1)
        layer.weight.mul_(words)

    @property
    def base(self) -> nn.Module:
        """The decoder itself, under the adapter if there is one."""
        return base_of(self.decoder)

    def prefix_keys_values(self, copies: int = 1) -> KeyValues:
        """Keys and values of the prompt prefix in each layer, (copies, heads, P, head size) each."""
        self.top.positions = slice(0, 0) if self.fast.read_some else None  # only keys and values are used
        prefix = self.base.get_input_embeddings()(self.prefix_ids)  # (1, P, h)
        return keys_values(self.decoder, prefix.expand(copies, -1, -1))

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Inside, while no weight changes: adapters are merged into the base and the prefix is computed once.

        Afterwards every weight is what it was, to the bit. In bfloat16 adapters stay apart: the sum would be rounded.
        """
        if self.kept_prefix is not None:  # inside already
            yield
            return
        with ExitStack() as stack:
            if self.fast.merge and not torch.is_autocast_enabled(self.table.device.type):
                stack.enter_context(merged(self.decoder))
            try:
                if self.fast.prefix_once and self.fast.keep_prefix:
                    with torch.no_grad():
                        self.kept_prefix = self.prefix_keys_values()
                yield
            finally:
                self.kept_prefix = None

    @contextmanager
    def for_accumulation(self) -> Iterator[None]:
        """Inside, while micro-batches add up: the prefix is computed once and gets their gradient at the end."""
        if not (self.fast.prefix_once and self.fast.keep_prefix):
            yield
            return
        computed = [part for layer in self.prefix_keys_values() for part in layer]
        # in float32, also where the prefix is not: the micro-batches' gradients add up in them
        leaves = [part.detach().float().requires_grad_(part.requires_grad) for part in computed]
        kept = [leaf.to(part.dtype) for leaf, part in zip(leaves, computed, strict=True)]
        self.kept_prefix = list(zip(kept[::2], kept[1::2], strict=True))
        try:
            yield
        finally:
            self.kept_prefix = None
        reached = [(part, leaf.grad) for part, leaf in zip(computed, leaves, strict=True) if leaf.grad is not None]
        if reached:
            parts, gradients = zip(*reached, strict=True)
            torch.autograd.backward(parts, [g.to(part.dtype) for g, part in zip(gradients, parts, strict=True)])

    def states(self, histories: torch.Tensor, target_mask: torch.Tensor, boundaries: list[int]) -> torch.Tensor:
        """The states that become user vectors, one per target, after the layers `boundaries`, counted from 1.

        histories (B, T), left-padded; target_mask (B, T) bool: after which items a user vector is wanted. Returns
        (N, len(boundaries), h), N = target_mask.sum(), row-major. Those of the top layer are after the final norm, as
        transformers' `hidden_states` are. ValueError where T is above max_length.
        """
        T, fast = histories.shape[1], self.fast
        if self.max_length < T:
            raise ValueError(f"histories of {T} items, the model reads {self.max_length}")
        if fast == PLAIN:
            return self.plain_states(histories, target_mask, boundaries)
        embed = self.base.get_input_embeddings()
        prefix, response = embed(self.prefix_ids), embed(self.response_ids)  # (1, P, h), (1, R, h)
        P, R = prefix.shape[1], response.shape[1]
        rows = {"keep_padding": not fast.packing, "share_rows": fast.share_rows and fast.prefix_once}
        batch = pack(histories, target_mask, P, R, self.max_length, prefix.dtype, **rows)
        items = self.read_items(histories[histories != 0]).to(response.dtype)  # (items, h)
        packed, position = torch.cat([items, response[0]])[batch.source][None], batch.position  # (1, tokens, h)
        before = self.kept_prefix if fast.prefix_once else self.prefix_keys_values(len(histories))
        read = batch.last
        if before is None:
            packed = torch.cat([prefix, packed], dim=1)
            position = torch.cat([torch.arange(P, device=position.device), position])
            read = read + P
        self.top.positions = read if fast.read_some else None
        top_only = boundaries == [self.num_layers]
        output = self.decoder(
            inputs_embeds=packed,
            attention_mask=batch.mask,
            position_ids=position[None],
            use_cache=False,
            output_hidden_states=not top_only,
            packing=Rows(batch.slot, P, before, fast.share_keys),
        )
        layers = [output.last_hidden_state] if top_only else [output.hidden_states[end] for end in boundaries]
        return torch.stack([layer[0, read] for layer in layers], dim=1)  # (N, K, h)

    def plain_states(self, histories: torch.Tensor, target_mask: torch.Tensor, boundaries: list[int]) -> torch.Tensor:
        """What `states` returns, computed as transformers does: nothing is shared and nothing is left out.

        Each target has a copy of its history, left-padded to `max_length` items between prefix and response; items
        after the one that the target follows are masked, and the response goes on right after that item.
        """
        row, column = target_mask.nonzero(as_tuple=True)  # (N,)
        length, device = self.max_length, histories.device
        copies = F.pad(histories[row], (length - histories.shape[1], 0))  # (N, length)
        newest = column + length - histories.shape[1]  # (N,)
        embed = self.base.get_input_embeddings()
        prefix, response = (embed(ids).expand(len(row), -1, -1) for ids in (self.prefix_ids, self.response_ids))
        P, R = prefix.shape[1], response.shape[1]
        items = self.read_items(copies).to(prefix.dtype)  # (N, length, h)
        seen = (copies != 0) & (torch.arange(length, device=device) <= newest[:, None])
        of_response = P + 1 + newest[:, None] + torch.arange(R, device=device)  # (N, R)
        self.top.positions = None
        output = self.decoder(
            inputs_embeds=torch.cat([prefix, items, response], dim=1),  # (N, P + length + R, h)
            attention_mask=F.pad(seen, (P, R), value=True).long(),
            position_ids=torch.cat([torch.arange(P + length, device=device).expand(len(row), -1), of_response], dim=1),
            use_cache=False,
            output_hidden_states=True,
        )
        at = torch.full_like(newest, -1) if R else P + newest
        return torch.stack(
            [output.hidden_states[end][torch.arange(len(row), device=device), at] for end in boundaries], dim=1
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms of a batch: histories (B, T), targets (B, T), 0 where there is none."""
        target_mask = batch["targets"] != 0
        vectors = self.head(self.states(batch["histories"], target_mask, [self.num_layers])[:, 0])
        return {"ce": catalogue_cross_entropy(vectors, self.item_vectors(), batch["targets"][target_mask])}

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer_vectors(histories, [self.num_layers])[0]  # (B, d)

    def layer_vectors(self, histories: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
        """User vectors (B, d) from the states after each of `layers`, counted from 1: direct inference (Figure 2).

        All go through the one trained `score`, without the final norm but at the top.
        """
        newest = torch.zeros_like(histories, dtype=torch.bool)
        newest[:, -1] = True
        return [self.head(states) for states in self.states(histories, newest, layers).unbind(1)]

    def layer_score_blocks(
        self, layers: list[int], histories: torch.Tensor, users: torch.Tensor, size: int
    ) -> Iterator[tuple[slice, Iterator[torch.Tensor]]]:
        """`score_blocks` with the scores (b, V + 1) of each of `layers`, from one forward pass."""
        vectors, items = self.layer_vectors(histories, layers), self.item_vectors()
        for low in range(0, len(histories), size):
            block = slice(low, low + size)
            yield block, (dot_products(of_layer[block], items) for of_layer in vectors)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """User vectors from states: (B, h) -> (B, d)."""
        return self.score(self.state_dropout(states.to(self.score.weight.dtype)))

    def read_items(self, items: torch.Tensor) -> torch.Tensor:
        """What the decoder reads for item ids: (...) -> (..., h)."""
        return self.input_proj(self.item_dropout(self.table[items]))

    def item_vectors(self) -> torch.Tensor:
        return self.item_output(self.table)  # (V + 1, d)

    def shard(self, device: torch.device) -> None:
        """Shard the decoder's frozen layers. What trains stands whole in each process, as do the token embeddings."""
        if self.train_strategy == "full":
            raise UserError("--train_strategy full trains the layers that --use_fsdp shards: leave out one of them")
        shard_layers(self.base, device)
        self.fast = replace(self.fast, merge=False)  # no process has the weights that adapters are merged into

    def head_parameters(self) -> list[nn.Parameter]:
        """What is around the decoder. States are long, so one step of Adam on `score` moves all scores far.

        A high rate of either lets training grow rounding (docs/log.md).
        """
        return [*self.input_proj.parameters(), self.score.weight, *self.item_output.parameters()]
