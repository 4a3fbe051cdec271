"""Teacher and student alike: a decoder language model that reads item vectors and answers with a user vector.

Input, as embeddings: prompt prefix tokens | one vector a history item (frozen item table -> `input_proj`) | response
tokens. The last position of the last layer through `score` is the user vector; item scores are its dot products with
the frozen item table (PAPER, step 3).

Computation. The prefix is the same for everybody and attention is causal, so it runs once for the whole batch, with
gradient, and every sample attends to its keys and values. Only tokens that are there run: those of all samples are
packed into one row (1, N, h), without padding; for attention alone they are laid out in rows as long as the longest
sample, which short samples share. Explicit position ids keep every item at the position that it has in the released
layout, where each sample is left-padded to `max_length` items between prefix and response. Several targets of one
history share it.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from models.dropout import Dropout
from models.interface import Recommender
from models.lora import Linear as LoraLinear
from models.losses import catalogue_cross_entropy
from utils.assets import base_model_path
from utils.cli import ROOT
from utils.errors import UserError
from utils.files import load_tensors, read_json, save_tensors

PREFIX = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGiven the user's purchase history, predict next possible item to be purchased.\n\n### Input:\n"
)
RESPONSE = "\n### Response:\n"
HEADS_FILE, ADAPTER_FOLDER, DECODER_FILE = "rec_heads.safetensors", "adapter", "decoder.safetensors"


def select_layers(num_layers: int, base_layers: int, layer_selection: str) -> list[int]:
    """Which of the base's layers are kept, in order: the first ones, or `num_layers` at an even interval."""
    if not 1 <= num_layers <= base_layers:
        raise UserError(f"--num_layers {num_layers}: the base model has {base_layers} layers; choose 1..{base_layers}")
    if layer_selection == "first":
        return list(range(num_layers))
    return [index * base_layers // num_layers for index in range(num_layers)]


def block_ends(num_layers: int, num_blocks: int) -> list[int]:
    """Block k of a stack ends after layer k * num_layers / num_blocks, counted from 1 (PAPER, step 4)."""
    if num_blocks < 1 or num_layers % num_blocks:
        raise UserError(f"--num_blocks {num_blocks} does not divide the {num_layers} layers; choose a divisor")
    return [k * num_layers // num_blocks for k in range(1, num_blocks + 1)]


def source(base_model: str | Path) -> dict:
    """Arguments of transformers' `from_pretrained` for a folder or `id@revision` on the hub. No code of it is run."""
    name, revision = str(base_model), None
    if not Path(name).is_dir():
        name, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or "main", "trust_remote_code": False}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its warnings (of the layers that are left out, for one) and its progress bar."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def base_config(base_model: str | Path) -> AutoConfig:
    """Configuration of a base's decoder, which may be part of a multimodal model; UserError where there is none."""
    try:
        with quiet_transformers():
            whole = AutoConfig.from_pretrained(**source(base_model))
            config = whole.get_text_config(decoder=True)
    except Exception as error:  # a config.json of anything else, or of a library that is not there
        raise UserError(
            f"--base_model {base_model}: no model found there ({first_line(error)}); give a folder or hub id"
        ) from error
    if whole.is_encoder_decoder or not getattr(config, "num_hidden_layers", None):
        raise UserError(f"--base_model {base_model}: a {whole.model_type} model is no decoder-only language model")
    if config is not whole and getattr(whole, "quantization_config", None):
        raise quantised(base_model, f"a {whole.model_type} model")
    return config


def quantised(base_model: str | Path, reason: str) -> UserError:
    return UserError(f"--base_model {base_model}: its weights are quantised ({reason}); give the model that is not")


def cut(config: AutoConfig, layers: list[int]) -> AutoConfig:
    """Leave these layers in `config`, and in each of its lists that has an entry for every layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[index] for index in layers])
    config.num_hidden_layers = len(layers)
    return config


# Where multimodal checkpoints hold their decoder's weights, which are loaded as those of the decoder alone.
TEXT_WEIGHTS = r"^(model\.)?(language_model|text_model|llm)\.(model\.)?"


def load_decoder(base_model: str | Path, num_layers: int, layer_selection: str, dtype: torch.dtype) -> nn.Module:
    """The base's embedding, the selected layers and the final norm, without a language-modelling head.

    Of a multimodal base it is the language model's. Raises UserError where the weights are missing or damaged, or the
    layers are not those of a LLaMA-like decoder.
    """
    config = base_config(base_model)
    layers = select_layers(num_layers, config.num_hidden_layers, layer_selection)
    try:
        with quiet_transformers():
            decoder, loading = AutoModel.from_pretrained(
                **source(base_model),
                config=cut(copy.deepcopy(config), list(range(layers[-1] + 1))),
                key_mapping={TEXT_WEIGHTS: ""},
                dtype=dtype,
                use_safetensors=True,  # anything else is a pickle
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file, a package that is not there, ...: any library's error
        if getattr(config, "quantization_config", None):
            raise quantised(base_model, first_line(error)) from error
        raise UserError(f"--base_model {base_model}: the weights cannot be read ({first_line(error)})") from error
    if getattr(decoder.config, "quantization_config", None):  # gone where transformers made plain weights of them
        raise quantised(base_model, "and stay so when loaded")
    stack = getattr(decoder, "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != layers[-1] + 1:
        raise unlike_llama(base_model, decoder, f"no list of {layers[-1] + 1} `layers`")
    for index in layers:
        layer = stack[index]
        lacking = [name for name in ("self_attn", "mlp") if not hasattr(layer, name)]
        if lacking or not hasattr(layer.self_attn, "layer_idx"):
            raise unlike_llama(base_model, decoder, f"layer {index + 1} has no {(lacking or ['layer_idx'])[0]}")
    if any(isinstance(module, BaseTunerLayer) for module in decoder.modules()):
        raise UserError(f"--base_model {base_model}: it has adapters; merge them into its weights first")
    lacking = sorted(loading["missing_keys"]) + sorted(str(key) for key, *_ in loading["mismatched_keys"])
    if lacking:
        raise UserError(
            f"--base_model {base_model}: its weights lack {len(lacking)} tensors, or have them in another shape, "
            f"{lacking[0]} for one"
        )
    return keep_layers(decoder, layers)


def unlike_llama(base_model: str | Path, decoder: nn.Module, reason: str) -> UserError:
    return UserError(
        f"--base_model {base_model}: the layers of {type(decoder).__name__} are not a LLaMA-like decoder's ({reason}); "
        "choose another base"
    )


def keep_layers(decoder: nn.Module, layers: list[int]) -> nn.Module:
    """Drop all layers but `layers`, and renumber what is left for the key-value cache."""
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    cut(decoder.config, layers)  # which the attention modules hold too
    return decoder


def prompt_ids(base_model: str | Path) -> dict[str, list[int]]:
    """Token ids of the prompt: the prefix after the tokenizer's start tokens if it has any, the response without.

    What a tokenizer adds at the end of a text is left out: the text goes on.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(**source(base_model))
            marked = tokenizer(PREFIX).input_ids
            prefix, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (PREFIX, RESPONSE))
    except Exception as error:  # tokenizers raise what they like
        raise UserError(f"--base_model {base_model}: its tokenizer cannot be read ({first_line(error)})") from error
    if not prefix or not response:
        raise UserError(f"--base_model {base_model}: its tokenizer makes no tokens of the prompt")
    begin = next((at for at in range(len(marked)) if marked[at : at + len(prefix)] == prefix), None)
    if begin is None:
        raise UserError(f"--base_model {base_model}: its tokenizer splits the prompt otherwise with a start token")
    starts = [token for token in dict.fromkeys(marked[:begin]) if token != prefix[0]]  # none twice
    return {"prefix_ids": starts + prefix, "response_ids": response}


@dataclass(frozen=True)
class Base:
    """What a teacher or student keeps of its base model.

    decoder: as `load_decoder` returns it. prompt: of `prompt_ids`. fingerprint: SHA-256 of both.
    """

    decoder: nn.Module
    prompt: dict[str, list[int]]
    fingerprint: str


def load_base(config: dict, base_model: str | Path) -> Base:
    """What resolved flags keep of the base at `base_model`; UserError where it is not what LLMRec can compute with."""
    prompt = prompt_ids(base_model)
    dtype = torch.float32 if config["train_strategy"] == "full" else getattr(torch, config["dtype"])
    decoder = load_decoder(base_model, config["num_layers"], config["layer_selection"], dtype)
    try:
        rows = len(decoder.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError) as error:
        raise unlike_llama(base_model, decoder, "no embedding of tokens") from error
    largest = max(prompt["prefix_ids"] + prompt["response_ids"])
    if largest >= rows:
        raise UserError(
            f"--base_model {base_model}: its tokenizer makes token {largest} of the prompt, its embedding has {rows} "
            "rows; give it the tokenizer that belongs to it"
        )
    found = fingerprint(decoder, prompt)
    check_packing(decoder, prompt, config["max_seq_length"], base_model)
    return Base(decoder, prompt, found)


def fingerprint(decoder: nn.Module, prompt: dict[str, list[int]]) -> str:
    """SHA-256 of all weights, the prompt's token ids, and the rotation of positions, which has no weights."""
    rope = getattr(decoder.config, "rope_parameters", None)
    digest = hashlib.sha256(json.dumps([prompt, rope], sort_keys=True).encode())
    for name, value in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_base(config: dict, found: str, base_model: str, folder: Path) -> None:
    """UserError unless the fingerprint of `base_model`, `found`, is the one that the run in `folder` recorded."""
    recorded = config.get("base_fingerprint")
    if recorded is None:
        print(f"{folder} is of a version that recorded no fingerprint of its base: {base_model} is taken for it")
    elif recorded != found:
        raise UserError(
            f"{folder} was trained on a base with fingerprint {recorded[:16]}, {base_model} has {found[:16]}: other "
            "weights or another tokenizer; bring back the base that it was trained on, or train it anew"
        )


def kind(layer: nn.Module) -> str:
    """What tells layers apart beside their weights and their number."""
    parts = []
    for name, module in layer.named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "layer_idx"}
        parts.append((name, type(module).__name__, plain, [tuple(p.shape) for p in module.parameters(recurse=False)]))
    return repr(parts)


@torch.no_grad()
def check_packing(decoder: nn.Module, prompt: dict[str, list[int]], max_length: int, base_model: str | Path) -> None:
    """UserError unless `LLMRec.states` are the hidden states of transformers' own forward pass, left-padded.

    Tried in float32 on copies of the first two layers of each kind, with two short histories: it costs little, and
    catches what no list of architectures could. transformers' `eager` attention honours every argument of a layer.
    """
    some: dict[str, list[int]] = {}
    for index, layer in enumerate(decoder.layers):
        some.setdefault(kind(layer), []).append(index)
    layers = sorted(index for alike in some.values() for index in alike[:2])
    embed, (P, R) = decoder.get_input_embeddings(), map(len, prompt.values())
    words = embed(torch.tensor([*prompt["prefix_ids"], *prompt["response_ids"]])).float()  # (P + R, h)
    left_out = [layer for index, layer in enumerate(decoder.layers) if index not in layers]
    not_copied = {id(layer): layer for layer in left_out} | {id(embed): nn.Embedding.from_pretrained(words)}
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            twin = keep_layers(copy.deepcopy(decoder, not_copied), layers).float().eval()
            histories = torch.tensor([[0, 0, 1], [1, 2, 3]])[:, -max_length:]
            model = LLMRec(
                twin,
                torch.randn(4, 8),
                prefix_ids=list(range(P)),
                response_ids=list(range(P, P + R)),
                max_length=max_length,
                train_strategy="frozen",
            ).eval()
            asked = torch.zeros_like(histories, dtype=torch.bool)
            asked[:, -1] = True
            ends = list(range(1, len(layers) + 1))
            found = [model.states(histories, asked, ends)]
            with model.for_inference():
                found.append(model.states(histories, asked, ends))
            model.read(slice(None))
            twin.set_attn_implementation("eager")
            padded = F.pad(histories, (max_length - histories.shape[1], 0))
            items = model.input_proj(model.item_table[padded])
            prefix, response = (part.expand(2, -1, -1) for part in (words[:P], words[P:]))
            there = F.pad(padded != 0, (P, R), value=True).long()
            plain = twin(
                inputs_embeds=torch.cat([prefix, items, response], dim=1),
                attention_mask=there,
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
    except UserError:
        raise
    except Exception as error:  # what another architecture does with our arguments is anybody's guess
        raise unlike_llama(base_model, decoder, f"{type(error).__name__}: {first_line(error)}") from error
    expected = torch.stack([plain[end][:, -1] for end in ends], dim=1)  # (2, K, h)
    off = max(((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item() for states in found)
    if not off < 1e-4:  # NaN is refused too
        raise unlike_llama(base_model, decoder, f"packed, they give states that differ by {off:.0e}")


class LLMRec(Recommender):
    """A decoder with a frozen item table, two trained maps and, by `train_strategy`, what else trains.

    decoder: as `load_decoder` returns it. item_table: (V + 1, d), row 0 the padding.
    train_strategy: "lora" trains adapters on `lora["target_modules"]`; "full" all decoder layers and the final norm;
    "frozen" neither. `input_proj` and `score` always train; token embeddings and item table never.
    """

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
    ):
        super().__init__(None, None)
        hidden, dim = decoder.config.hidden_size, item_table.shape[1]
        self.max_length, self.train_strategy = max_length, train_strategy
        self.num_layers, self.hidden_size = len(decoder.layers), hidden
        self.input_proj = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, dim, bias=False)
        self.register_buffer("item_table", item_table.float())
        self.register_buffer("prefix_ids", torch.tensor([prefix_ids]), persistent=False)
        self.register_buffer("response_ids", torch.tensor([response_ids]), persistent=False)
        decoder.requires_grad_(train_strategy == "full")
        decoder.get_input_embeddings().requires_grad_(False)
        if not decoder._supports_sdpa:
            raise UserError(f"--base_model: {type(decoder).__name__} has an attention of its own; choose another base")
        check_length(decoder.config, max_length, len(prefix_ids) + len(response_ids))
        decoder.set_attn_implementation(PACKED)
        adapted = [name.rsplit(".", 1)[-1] for name in lora["target_modules"]] if train_strategy == "lora" else []
        self.readers = read_only_some(decoder.layers[-1], adapted)
        self.kept_prefix = None
        self.init_input_proj(decoder.get_input_embeddings())
        self.decoder = decoder
        if train_strategy == "lora":
            config = LoraConfig(**lora)
            config._register_custom_module({nn.Linear: LoraLinear})
            try:
                self.decoder = get_peft_model(decoder, config)
            except ValueError as error:
                raise UserError(f"--lora_target_modules: {first_line(error)}") from error
            if config.target_parameters:  # PEFT takes these names for the experts, which had them in older checkpoints
                left = sorted(config.target_modules)
                experts = sorted(set(lora["target_modules"]).difference(left))
                raise UserError(
                    f"--lora_target_modules: this base's experts are no linear modules; leave out {', '.join(experts)} "
                    f"and name others: {', '.join(left) or 'q_proj, v_proj'}"
                )
        for adapter in (m for m in self.decoder.modules() if isinstance(m, LoraLayer)):
            for name, dropout in adapter.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):  # Identity without dropout
                    adapter.lora_dropout[name] = Dropout(dropout.p)

    @torch.no_grad()
    def init_input_proj(self, embed: nn.Module) -> None:
        """Let items start at the scale of the prompt's words, which nn.Linear's own start does not know.

        With SmolLM2-135M and SASRec's table of MovieLens-100K what tells items apart starts several times too small.
        """
        words = embed(self.prefix_ids).float().std()
        nn.init.normal_(self.input_proj.weight).mul_(words / self.item_table[1:].norm(dim=1).mean())
        nn.init.zeros_(self.input_proj.bias)

    @property
    def base(self) -> nn.Module:
        """The decoder itself, under the adapter if there is one."""
        return self.decoder.get_base_model() if isinstance(self.decoder, PeftModel) else self.decoder

    def read(self, positions: slice | torch.Tensor) -> slice | torch.Tensor:
        """Which positions of the top layer's output the next pass reads."""
        for module in self.readers:
            module.read = positions
        return positions

    def prefix_keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the prompt prefix in each layer, (1, heads, P, head size) each."""
        cache = DynamicCache(config=self.base.config)
        self.read(slice(0, 0))  # only keys and values are used
        prefix = self.base.get_input_embeddings()(self.prefix_ids)  # (1, P, h)
        self.decoder(inputs_embeds=prefix, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Inside, while no weight changes: adapters are merged into the base and the prefix is computed once.

        Afterwards every weight is what it was, to the bit. In bfloat16 adapters stay apart: the sum would be rounded.
        """
        if self.kept_prefix is not None:  # inside already
            yield
            return
        layers = [m.get_base_layer() for m in self.decoder.modules() if isinstance(m, LoraLayer)]
        if torch.is_autocast_enabled(self.item_table.device.type):
            layers = []
        layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
        originals = [layer.weight.data for layer in layers]
        try:
            if layers:
                for layer, weight in zip(layers, originals, strict=True):
                    layer.weight.data = weight.clone()  # PEFT merges in place, and subtracts with a rounding error
                self.decoder.merge_adapter()
            with torch.no_grad():
                self.kept_prefix = self.prefix_keys_values()
            yield
        finally:
            self.kept_prefix = None
            if layers:
                self.decoder.unmerge_adapter()
                for layer, weight in zip(layers, originals, strict=True):
                    layer.weight.data = weight

    @contextmanager
    def for_accumulation(self) -> Iterator[None]:
        """Inside, while micro-batches add up: the prefix is computed once and gets their gradient at the end."""
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

    def states(self, histories: torch.Tensor, asked: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """Response states after layers `ends`, counted from 1, for every asked position.

        histories (B, T), left-padded; asked (B, T) bool: after which items a user vector is wanted. Returns
        (N, len(ends), h), N = asked.sum(), row-major. Those of the top layer are after the final norm, as
        transformers' `hidden_states` are.

        A history runs once. Behind it hangs one branch of response tokens for each asked position t, which sees the
        prefix, items up to t and itself, at the positions right after t: what a copy of the history cut after t
        would compute there.
        """
        (B, T), device = histories.shape, histories.device
        if self.max_length < T:
            raise ValueError(f"histories of {T} items, the model reads {self.max_length}")
        embed = self.base.get_input_embeddings()
        prefix, response = embed(self.prefix_ids), embed(self.response_ids)  # (1, P, h), (1, R, h)
        P, R = prefix.shape[1], response.shape[1]
        row, column = asked.nonzero(as_tuple=True)  # (N,)
        slot = (asked.cumsum(1) - 1)[row, column]  # which of its history's branches
        n = int(slot.max()) + 1
        after = torch.full((B, n), -1, device=device)  # the item a branch follows, -1 where there is no branch
        after[row, slot] = column

        real = histories != 0  # (B, T)
        items = self.input_proj(self.item_table[histories[real]]).to(response.dtype)  # (items, h)
        vectors = torch.cat([items, response[0]])  # (items + R, h)
        of_items = real.flatten().cumsum(0).view(B, T) - 1  # which vector each token is, (B, T)
        of_branch = (len(items) + torch.arange(R, device=device)).repeat(n).expand(B, -1)  # (B, n R)
        first = P + self.max_length - T
        position = torch.arange(first, first + T, device=device).expand(B, -1)  # (B, T)
        branch_position = first + 1 + after[:, :, None] + torch.arange(R, device=device)  # (B, n, R)
        there = tokens_there(histories, after, R)  # in (B, L), L = T + n R
        packed = vectors[torch.cat([of_items, of_branch], dim=1).flatten()[there]][None]  # (1, tokens, h)
        positions = torch.cat([position, branch_position.flatten(1)], dim=1).flatten()[there]  # (tokens,)
        if self.kept_prefix is None:
            packed = torch.cat([prefix, packed], dim=1)
            positions = torch.cat([torch.arange(P, device=device), positions])
        last = row * (T + n * R) + T + slot * R + R - 1  # in (B, L): the last token of each branch
        read = self.read(torch.searchsorted(there, last) + packed.shape[1] - len(there))  # (N,)
        place, mask = lay_out(there, histories, after, P, R, prefix.dtype)
        output = self.decoder(
            inputs_embeds=packed,
            attention_mask=mask,
            position_ids=positions[None],
            use_cache=False,
            output_hidden_states=ends != [self.num_layers],
            packing=Packing(place, P, self.kept_prefix),
        )
        layers = [output.last_hidden_state] if ends == [self.num_layers] else [output.hidden_states[e] for e in ends]
        return torch.stack([layer[0, read] for layer in layers], dim=1)  # (N, K, h)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms of a batch: histories (B, T), targets (B, T), 0 where nothing is asked."""
        asked = batch["targets"] != 0
        vectors = self.head(self.states(batch["histories"], asked, [self.num_layers])[:, 0])
        return {"ce": catalogue_cross_entropy(vectors, self.item_table, batch["targets"][asked])}

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        asked = torch.zeros_like(histories, dtype=torch.bool)
        asked[:, -1] = True
        return self.head(self.states(histories, asked, [self.num_layers])[:, 0])  # (B, d)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """User vectors from top-layer states: (B, h) -> (B, d)."""
        return self.score(states.to(self.score.weight.dtype))

    def item_vectors(self) -> torch.Tensor:
        return self.item_table  # (V + 1, d)

    def head_parameters(self) -> list[nn.Parameter]:
        """The two maps around the decoder. States are long, so one step of Adam on `score` moves all scores far.

        A high rate of either lets training grow rounding (recipes/ml-100k.yaml).
        """
        return [*self.input_proj.parameters(), self.score.weight]

    def save_pretrained(self, folder: Path) -> None:
        """Write what the base model does not have: heads with the item table, and the adapter or trained decoder."""
        heads = {f"input_proj.{name}": value for name, value in self.input_proj.state_dict().items()}
        heads |= {"score.weight": self.score.weight, "item_table": self.item_table}
        save_tensors(heads, folder / HEADS_FILE)
        if self.train_strategy == "lora":
            # embeddings never train; left to itself, PEFT would ask the hub whether they have grown
            self.decoder.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
        elif self.train_strategy == "full":
            trained = {name: value for name, value in self.decoder.named_parameters() if value.requires_grad}
            save_tensors(trained, folder / DECODER_FILE)


def check_length(config: AutoConfig, max_length: int, prompt: int) -> None:
    """UserError where a history of `max_length` items and `prompt` tokens are more than the base can look back on."""
    limits = {"max_position_embeddings": "positions"}
    if set(getattr(config, "layer_types", None) or []) != {"full_attention"}:
        limits |= {"sliding_window": "window", "attention_chunk_size": "chunk"}
    for name, what in limits.items():
        limit = getattr(config, name, None)
        if limit and limit < max_length + prompt:
            advice = f"at most {limit - prompt}" if limit > prompt else "another base"
            raise UserError(
                f"--max_seq_length {max_length}: history and prompt ({prompt} tokens) exceed the base's "
                f"{what} of {limit}; choose {advice}"
            )


def tokens_there(histories: torch.Tensor, after: torch.Tensor, R: int) -> torch.Tensor:
    """Places in the flat (B, L) that hold a token, not padding: histories (B, T), after (B, n), L = T + n R."""
    branches = (after >= 0).repeat_interleave(R, dim=1)  # (B, n R)
    return torch.cat([histories != 0, branches], dim=1).flatten().nonzero()[:, 0]


def share_rows(lengths: list[int]) -> tuple[list[int], int]:
    """Rows as wide as the longest sample, each with as many samples as fit (best fit, the longest first).

    Returns where each sample starts in the flat (rows, width), and the number of rows.
    """
    width, rows = max(lengths), 0
    starts = [0] * len(lengths)
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows, by the places that they have left
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[sample]
        room = next((room for room in range(length, width) if with_room[room]), width)
        if room == width:
            with_room[room].append(rows)
            rows += 1
        row = with_room[room].pop()
        starts[sample] = (row + 1) * width - room
        with_room[room - length].append(row)
    return starts, rows


def lay_out(
    there: torch.Tensor, histories: torch.Tensor, after: torch.Tensor, P: int, R: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for attention: the place of each token in the flat (rows, width), and who sees whom.

    there (tokens,) of `tokens_there`; histories (B, T); after (B, n). The mask (rows, 1, width, P + width) is additive;
    keys are the prefix, which all see, then the row itself. An item sees its own history up to itself; a token of
    branch j the items up to after[:, j] and its own branch up to itself. Padding is seen by no other.
    """
    (B, T), n, device = histories.shape, after.shape[1], histories.device
    L = T + n * R
    sample, column = there // L, there % L
    lengths = torch.bincount(sample, minlength=B)
    counts = lengths.tolist()
    (starts, rows), width = share_rows(counts), max(counts)
    ahead = lengths.cumsum(0) - lengths  # tokens of earlier samples
    shift = torch.tensor(starts, device=device) - ahead  # (B,)
    place = torch.arange(len(there), device=device) + shift[sample]  # (tokens,)

    branch = ((column - T) // R).clamp_min(-1)  # -1: an item
    until = torch.cat([torch.arange(T, device=device).expand(B, -1), after.repeat_interleave(R, dim=1)], dim=1)
    # whatever `there` holds: padding that went along (benchmarks/same_metrics.py) belongs to no sample
    known = torch.cat([histories != 0, torch.ones_like(until[:, T:], dtype=torch.bool)], dim=1).flatten()[there]
    tokens = torch.stack([torch.where(known, sample, -1), branch, until.flatten()[there]])  # (3, tokens)
    laid = tokens.new_full((3, rows * width), -1).index_copy(1, place, tokens).view(3, rows, width)
    (sample, branch, until), (key_sample, key_branch, key_until) = laid[..., None], laid[:, :, None]
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    of_item, of_branch = (key_branch < 0) & (key_until <= until), (key_branch == branch) & earlier
    sees = F.pad((key_sample == sample) & (of_item | of_branch), (P, 0), value=True)  # (rows, width, P + width)
    return place, torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


@dataclass(frozen=True)
class Packing:
    """How a packed row of tokens is laid out for attention, which alone looks across positions.

    place (tokens,): where the samples' tokens go in the flat (rows, width) of `lay_out`. The packed row holds them in
    this order, after the P tokens of the prefix, unless `prefix` has its keys and values for each layer already.
    """

    place: torch.Tensor
    P: int
    prefix: list[tuple[torch.Tensor, torch.Tensor]] | None


PACKED = "slmrec_packed"
# What layers hand to attention that changes nothing here, as SDPA, masks and positions see to it.
UNDERSTOOD = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
UNDERSTOOD |= {"output_attentions", "output_hidden_states"}


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **how,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, for a packed row (1, heads, tokens, size) too; the mask is that of `lay_out`.

    Returns (1, tokens, heads, size), as attention functions of transformers do, and no weights. UserError for an
    argument that would be ignored, as soft-capping or sinks would.
    """
    ignored = [name for name, value in how.items() if value is not None and name not in UNDERSTOOD]
    if ignored:
        raise UserError(
            f"--base_model: {type(module).__name__} wants {ignored[0]}, which is not computed here; choose another base"
        )
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    ahead = packing.P if packing.prefix is None else 0  # tokens of the prefix in the packed row
    rows, _, width, _ = attention_mask.shape

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        tokens = x[0, :, ahead:].transpose(0, 1)  # (tokens, heads, size)
        flat = tokens.new_zeros(rows * width, *tokens.shape[1:]).index_copy(0, packing.place, tokens)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)  # (rows, heads, width, size)

    before = packing.prefix[module.layer_idx] if packing.prefix else (key[:, :, :ahead], value[:, :, :ahead])
    keys, values = (
        torch.cat([part.expand(rows, -1, -1, -1), laid_out(own)], dim=2)
        for part, own in zip(before, (key, value), strict=True)
    )
    found = masked_attention(module, laid_out(query), keys, values, attention_mask, **how)
    found = found.flatten(0, 1)[packing.place][None]  # (1, tokens, heads, size)
    if ahead:
        of_prefix, _ = sdpa_attention_forward(module, query[:, :, :ahead], *before, None, **how)  # causal
        found = torch.cat([of_prefix, found], dim=1)
    return found, None


def masked_attention(
    module: nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, **how
) -> torch.Tensor:
    """SDPA (rows, width, heads, size); on a CPU query heads share keys and values without transformers' copies."""
    if query.device.type != "cpu":  # transformers knows which kernels of others share under a mask
        return sdpa_attention_forward(module, query, keys, values, mask, **how)[0]
    options = {"dropout_p": how.get("dropout", 0.0), "scale": how.get("scaling"), "enable_gqa": True}
    return F.scaled_dot_product_attention(query, keys, values, mask, **options).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def read_only_some(layer: nn.Module, adapted: list[str]) -> list[nn.Module]:
    """Make what looks at one position at a time in the top layer run at the positions `module.read` only.

    Returns these modules: the MLP, and the query and output maps unless they have adapters, which would run for all.
    Where nothing is read the output is 0. Keys and values are needed everywhere.
    """

    def gather(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        module.full_length = args[0].shape[1]
        return (args[0][:, module.read],)

    def scatter(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        full = output.new_zeros(output.shape[0], module.full_length, output.shape[2])
        full[:, module.read] = output
        return full

    modules = [layer.mlp]
    for name in {"q_proj", "o_proj"}.difference(adapted):
        if isinstance(getattr(layer.self_attn, name, None), nn.Linear):
            modules.append(getattr(layer.self_attn, name))
    for module in modules:
        module.read = slice(None)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(scatter)
    return modules


def is_linear(module: nn.Module) -> bool:
    """Routers of experts only inherit from nn.Linear, and answer otherwise."""
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


def lora_targets(layers: nn.ModuleList, flag: str) -> list[str]:
    """Modules that get adapters by --lora_target_modules: those of a comma-separated list, or all-linear.

    As with PEFT, a name stands for every linear module whose path ends with it. UserError where there is none.
    """
    linear = [f".layers.{name}" for name, module in layers.named_modules() if is_linear(module)]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if flag.strip().lower() == "all-linear":
        return known
    targets = [name.strip() for name in flag.split(",")]
    missing = [name or "''" for name in targets if not any(found.endswith(f".{name}") for found in linear)]
    if missing:
        raise UserError(
            f"--lora_target_modules: the base model has no linear module named {', '.join(missing)} in the layers that "
            f"are kept; they have {', '.join(known) or 'none'}"
        )
    return targets


def build_llm_rec(config: dict, base: Base, item_table: torch.Tensor) -> LLMRec:
    """A model with fresh heads and adapters from resolved flags."""
    adapted = config["train_strategy"] == "lora"
    return LLMRec(
        base.decoder,
        item_table,
        **base.prompt,
        max_length=config["max_seq_length"],
        train_strategy=config["train_strategy"],
        lora={
            "r": config["lora_r"],
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config["lora_dropout"],
            "target_modules": lora_targets(base.decoder.layers, config["lora_target_modules"]) if adapted else [],
        },
    )


def recorded_base(config: dict, base_model: str | Path | None = None) -> str:
    """Where the base is of the run that recorded `config`; `base_model`: where it is now, if not there.

    On the hub it is the revision that the run was trained on, whatever has become of the model since.
    """
    recorded = config["base_model"]
    if base_model is None:
        try:
            return base_model_path(recorded, ROOT)
        except UserError as error:
            reason = str(error).removeprefix("--base_model ")
            raise UserError(f"the base model of this run is no longer there; bring it back: {reason}") from error
    found = base_model_path(str(base_model))
    same = "@" in recorded and not Path(found).is_dir() and found.partition("@")[0] == recorded.partition("@")[0]
    return recorded if same else found


def load_llm_rec(folder: str | Path, base_model: str | Path | None = None) -> LLMRec:
    """A saved teacher or student from its run folder, in eval mode, with identical scores.

    base_model: where its base is now, if not where the run found it. A bfloat16 run computed under autocast: use the
    model under it too. Raises UserError where files are missing or damaged, or the base has another shape or other
    weights than the one that the run was trained on.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", f"{folder} is no run folder: it has no config.json")
    base_model = recorded_base(config, base_model)
    shape, found = config["base_shape"], base_shape(base_config(base_model))
    if shape != found:
        raise UserError(f"{folder} was trained on a base with {shape}, but {base_model} has {found}")
    saved = load_tensors(folder / HEADS_FILE)
    base = load_base(config, base_model)
    model = build_llm_rec(config, base, saved.pop("item_table"))
    if model.train_strategy == "lora":
        adapter = load_tensors(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
        for name, value in adapter.items():  # PEFT writes lora_A.weight for what it holds as lora_A.default.weight
            saved["decoder." + re.sub(r"(lora_[AB])", r"\1.default", name)] = value
    elif model.train_strategy == "full":
        saved |= {f"decoder.{name}": value for name, value in load_tensors(folder / DECODER_FILE).items()}
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    found = {name: value.shape for name, value in saved.items()}
    if trained != found:
        odd = min(name for name in trained.keys() | found.keys() if trained.get(name) != found.get(name))
        raise UserError(f"{folder}: its weights do not fit {config['num_layers']} layers of {base_model}: {odd}")
    check_base(config, base.fingerprint, base_model, folder)
    model.load_state_dict(saved, strict=False)
    return model.eval()


def base_shape(config: AutoConfig) -> dict:
    """What an adapter must find again in its base."""
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters at inference (PAPER, table 7: embedding, kept layers, adapter, heads), and those that train."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return {"total": total, "trained": trained, "lora": lora}
