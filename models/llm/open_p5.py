"""Open-P5: a language model that writes the next item as tokens (Xu et al., 2024), the paper's generative baseline.

Items are numbered in the order of their first appearance, user after user (sequential indexing). Item number n is two
new tokens, n // W and n % W with W = ceil(sqrt(V)): neighbours in the order share the first one. The text is the prompt
and the tokens of the history, and goes on with those of the next item. The loss is the cross-entropy of a language
model, over its vocabulary and the new tokens, at the tokens of the targets.

A prefix tree of the existing items constrains what is written. With two tokens per item it has two levels, so a beam
search reads the prompt once, and then each first token that it follows, all at once behind the same keys and values.
The score of an item is the log-probability of its tokens after the prompt. A beam that is as wide as the tree (the
default) makes it exact for all items: every candidate has a rank, sampled or in the full ranking, as with any other
model, and so have all metrics. With a narrower beam, items behind first tokens that fell out share the lowest score:
ties count against them.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import Recommender
from models.llm.attention import add_adapters, base_of, cache_of, keys_values, lora_targets, merged
from models.llm.decoder import check_length, load_head
from models.llm.storage import (
    HEADS_FILE,
    Base,
    check_base,
    check_weights,
    load_base,
    read_adapter,
    recorded_run,
    save_adapter,
)
from utils.checked import load_tensors
from utils.data import TrainingPart
from utils.errors import UserError
from utils.files import save_tensors

ROWS_AT_ONCE = 512  # of logits over the whole vocabulary


def sequential_index(data: TrainingPart) -> torch.Tensor:
    """The two tokens of each item, (V + 1, 2) int64; row 0, the padding, is tokens 0 and 0.

    Items that training does not see come last. First tokens are numbered from 0, second tokens go on after them.
    """
    seen, first = np.unique(data.items, return_index=True)
    order = seen[np.argsort(first)]
    order = np.concatenate([order, np.setdiff1d(np.arange(1, data.num_items + 1), seen)])
    width = int(np.ceil(np.sqrt(data.num_items)))
    number = np.arange(data.num_items)
    tokens = np.zeros((data.num_items + 1, 2), np.int64)
    tokens[order] = np.stack([number // width, -(-data.num_items // width) + number % width], axis=1)
    return torch.from_numpy(tokens)


class OpenP5(Recommender):
    """A decoder with LoRA adapters, its language-model head, and vectors of the new tokens, which are read and written.

    decoder: as `load_decoder` returns it; head (vocabulary, h): of `load_head`, frozen. item_tokens (V + 1, 2): of
    `sequential_index`. beam_width: how many first tokens are followed, None for all.
    """

    def __init__(
        self,
        decoder: nn.Module,
        head: nn.Parameter,
        item_tokens: torch.Tensor,
        *,
        prefix_ids: list[int],
        max_length: int,
        lora: dict,
        beam_width: int | None = None,
    ) -> None:
        super().__init__(None, None)
        check_length(decoder.config, max_length, len(prefix_ids) + 1, tokens_per_item=2)  # a first token of the answer
        self.num_firsts = int(item_tokens[:, 0].max()) + 1
        self.beam_width = min(beam_width or self.num_firsts, self.num_firsts)
        self.head = head.requires_grad_(False)
        decoder.requires_grad_(False)
        new = torch.randn(int(item_tokens.max()) + 1, head.shape[1])
        self.tokens = nn.Parameter(new * head.float().std())  # as long as the base's own tokens
        self.register_buffer("item_tokens", item_tokens)
        self.register_buffer("prefix_ids", torch.tensor([prefix_ids]), persistent=False)
        self.decoder = add_adapters(decoder, lora)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms of a batch: histories (B, T), targets (B, T), 0 where there is none."""
        items = torch.cat([batch["histories"], batch["targets"][:, -1:]], dim=1)  # (B, T + 1)
        asked = F.pad(batch["targets"] != 0, (1, 0)).repeat_interleave(2, dim=1)[:, 1:]  # (B, 2T + 1)
        tokens = self.item_tokens[items].flatten(1)  # (B, 2T + 2)
        states, *_ = self.read(tokens[:, :-1], (items != 0).repeat_interleave(2, dim=1)[:, :-1])
        return {"ce": -self.log_probabilities(states[asked], tokens[:, 1:][asked][:, None]).mean()}

    def read(self, tokens: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, object, torch.Tensor]:
        """States (B, S, h) after new tokens (B, S) behind the prompt, left-padded where not `real` (B, S).

        Also the cache of keys and values, and the mask (B, P + S) of its tokens that are real.
        """
        prefix = base_of(self.decoder).get_input_embeddings()(self.prefix_ids)  # (1, P, h)
        cache = cache_of(keys_values(self.decoder, prefix), len(tokens))  # the prompt is computed once
        mask = F.pad(real, (prefix.shape[1], 0), value=True)
        position = (mask.cumsum(1) - 1)[:, prefix.shape[1] :]
        return self.decode(tokens, cache, mask.long(), position), cache, mask

    def decode(self, tokens: torch.Tensor, cache: object, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """States (B, S, h) of new tokens (B, S) behind what the cache holds; the cache grows by them."""
        embeds = self.tokens[tokens].to(self.head.dtype)
        given = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
        return self.decoder(inputs_embeds=embeds, **given).last_hidden_state

    def log_probabilities(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of new tokens (N, n) after states (N, h), among the whole vocabulary: (N, n), in float32 as scores are."""
        found = []
        with torch.autocast(states.device.type, enabled=False):
            head, own = self.head.float(), self.tokens.float()
            for part, wanted in zip(states.float().split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True):
                logits = part @ own.T
                total = torch.logaddexp((part @ head.T).logsumexp(1), logits.logsumexp(1))
                found.append(logits.gather(1, wanted) - total[:, None])
        return torch.cat(found)

    def scores(
        self, histories: torch.Tensor, users: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probabilities of all items (B, V + 1), or of the tree of `items` alone (B, len(items)); see above."""
        allowed = self.item_tokens[1:] if items is None else self.item_tokens[items]  # (V, 2)
        (B, _), device = histories.shape, histories.device
        states, cache, mask = self.read(
            self.item_tokens[histories].flatten(1), (histories != 0).repeat_interleave(2, dim=1)
        )
        firsts = allowed[:, 0].unique()
        first = self.log_probabilities(states[:, -1], firsts.expand(B, -1))  # (B, firsts)
        value, place = first.topk(min(self.beam_width, len(firsts)), dim=1)  # (B, beam)
        width = place.shape[1]
        alone = torch.eye(width, dtype=torch.bool, device=device).expand(B, -1, -1)
        mask = torch.cat([mask[:, None].expand(-1, width, -1), alone], dim=2)[:, None]  # (B, 1, beam, P + S + beam)
        position = mask[:, 0].sum(2) - 1  # of all of them: the next one
        states = self.decode(firsts[place], cache, mask, position)  # (B, beam, h)
        seconds = torch.arange(self.num_firsts, len(self.tokens), device=device)
        second = self.log_probabilities(states.flatten(0, 1), seconds.expand(B * width, -1)).view(B, width, -1)
        tree = value.new_full((B, self.num_firsts, len(seconds)), torch.inf)
        tree[torch.arange(B, device=device)[:, None], firsts[place]] = value[:, :, None] + second
        found = tree[:, allowed[:, 0], allowed[:, 1] - self.num_firsts]  # (B, V)
        lost = found.isposinf()
        lowest = found.where(~lost, torch.inf).amin(1, keepdim=True) - 1
        found = torch.where(lost, lowest, found)
        return F.pad(found, (1, 0)) if items is None else found

    def for_inference(self) -> AbstractContextManager[None]:
        """Inside, adapters are merged into the base; in bfloat16 they stay apart, as the sum would be rounded."""
        reduced = torch.is_autocast_enabled(self.tokens.device.type)
        return nullcontext() if reduced else merged(self.decoder)

    def head_parameters(self) -> list[nn.Parameter]:
        return [self.tokens]


# --- build, save, load ---


def build_open_p5(config: dict, base: Base, base_model: str, item_tokens: torch.Tensor) -> OpenP5:
    """A model with fresh tokens and adapters from resolved flags."""
    lora = {name: config[name] for name in ("lora_alpha", "lora_dropout")} | {"r": config["lora_r"]}
    return OpenP5(
        base.decoder,
        load_head(base_model, base.decoder, base.prompt["prefix_ids"]),
        item_tokens,
        prefix_ids=base.prompt["prefix_ids"],
        max_length=config["max_seq_length"],
        lora=lora | {"target_modules": lora_targets(base.decoder.layers, config["lora_target_modules"])},
        beam_width=config["beam_width"],
    )


def save_open_p5(model: OpenP5, folder: Path) -> None:
    """Write what the base model does not have: the adapter, the new tokens' vectors, and the items' tokens."""
    save_tensors({"tokens": model.tokens, "item_tokens": model.item_tokens}, folder / HEADS_FILE)
    save_adapter(model.decoder, folder)


def load_open_p5(folder: Path, base_model: str | Path | None = None) -> OpenP5:
    """A saved run in eval mode, with identical scores; base_model and errors are those of `load_llm_rec`."""
    config, base_model = recorded_run(folder, base_model)
    saved = load_tensors(folder / HEADS_FILE)
    tokens, base = saved.pop("item_tokens", torch.zeros(0)), load_base(config, base_model)
    if tokens.ndim != 2 or len(tokens) < 2 or tokens.shape[1] != 2 or tokens.dtype != torch.int64 or tokens.min() < 0:
        raise UserError(f"{folder / HEADS_FILE}: its item tokens are no two numbers per item; train the run again")
    if tokens.max() >= len(saved["tokens"]) or tokens[1:, 1].min() <= tokens[:, 0].max():
        raise UserError(f"{folder / HEADS_FILE}: its item tokens are none of its own; train the run again")
    model = build_open_p5(config, base, base_model, tokens)
    saved |= read_adapter(folder, config["lora_r"])
    check_weights(model, saved, config, base_model, folder)
    check_base(config, base.fingerprint, base_model, folder)
    model.load_state_dict(saved, strict=False)
    return model.eval()
