"""All that leans on the inside of transformers or PEFT: attention functions, layers, adapters, the KV cache.

Other modules of models/llm/ use their public interface alone. tests/test_attention.py has a test for each attribute
that this one relies on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.errors import UserError, first_line

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer, (B, heads, tokens, head size) each
PACKED = "slmrec_packed"
# What layers hand to attention that changes nothing here, as SDPA, masks and positions see to it.
UNDERSTOOD = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
UNDERSTOOD |= {"output_attentions", "output_hidden_states"}


# --- attention ---


@dataclass(frozen=True)
class Rows:
    """How a packed row is laid out for attention.

    slot (tokens,): place of the samples' tokens in the flat (rows, width). The packed row holds them in this order,
    after the P tokens of the prefix, unless `prefix` has its keys and values already: of one sample, or of each row.
    share_keys: without a copy of keys and values for each query head.
    """

    slot: torch.Tensor
    P: int
    prefix: KeyValues | None
    share_keys: bool = True


def use_packed_attention(decoder: nn.Module) -> None:
    if not decoder._supports_sdpa:
        raise UserError(f"--base_model: {type(decoder).__name__} has an attention of its own; choose another base")
    decoder.set_attn_implementation(PACKED)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Rows | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, for a packed row (1, heads, tokens, size) too; the mask is that of `Packed`.

    Returns (1, tokens, heads, size), as attention functions of transformers do, and no weights. UserError for an
    argument that would be ignored, as soft-capping or sinks would.
    """
    ignored = [name for name, value in options.items() if value is not None and name not in UNDERSTOOD]
    if ignored:
        raise UserError(
            f"--base_model: {type(module).__name__} wants {ignored[0]}, which is not computed here; choose another base"
        )
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    ahead = packing.P if packing.prefix is None else 0  # tokens of the prefix in the packed row
    rows, _, width, _ = attention_mask.shape

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        tokens = x[0, :, ahead:].transpose(0, 1)  # (tokens, heads, size)
        flat = tokens.new_zeros(rows * width, *tokens.shape[1:]).index_copy(0, packing.slot, tokens)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)  # (rows, heads, width, size)

    before = packing.prefix[module.layer_idx] if packing.prefix else (key[:, :, :ahead], value[:, :, :ahead])
    keys, values = (
        torch.cat([part.expand(rows, -1, -1, -1), laid_out(own)], dim=2)
        for part, own in zip(before, (key, value), strict=True)
    )
    if packing.share_keys and query.device.type == "cpu":  # elsewhere transformers knows which kernels can
        settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling"), "enable_gqa": True}
        query_rows = laid_out(query)
        found = F.scaled_dot_product_attention(query_rows, keys, values, attention_mask, **settings).transpose(1, 2)
    else:
        found, _ = sdpa_attention_forward(module, laid_out(query), keys, values, attention_mask, **options)
    found = found.flatten(0, 1)[packing.slot][None]  # (1, tokens, heads, size)
    if ahead:
        of_prefix, _ = sdpa_attention_forward(module, query[:, :, :ahead], *before, None, **options)  # causal
        found = torch.cat([of_prefix, found], dim=1)
    return found, None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def keys_values(decoder: nn.Module, embeds: torch.Tensor) -> KeyValues:
    """Keys and values in each layer of a sequence of embeddings (B, tokens, h)."""
    cache = DynamicCache(config=base_of(decoder).config)
    decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(known: KeyValues, copies: int) -> DynamicCache:
    """A cache that `copies` samples go on from, made of the keys and values of one."""
    return DynamicCache([tuple(part.expand(copies, -1, -1, -1) for part in layer) for layer in known])


# --- layers ---


def renumber(layers: nn.ModuleList) -> None:
    """Number the layers from 0 for the KV cache."""
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def what_lacks(layer: nn.Module) -> str | None:
    """The attribute that a layer would need to be one of a LLaMA-like decoder, None if it has all."""
    lacking = [name for name in ("self_attn", "mlp") if not hasattr(layer, name)]
    if not lacking and not hasattr(layer.self_attn, "layer_idx"):
        lacking = ["layer_idx"]
    return lacking[0] if lacking else None


@torch.inference_mode()
def layer_states(decoder: nn.Module, token_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states before and after each layer, float64, (1, T, h) each, of token ids (1, T)."""
    states = []

    def keep(layer: nn.Module, args: tuple, options: dict, output: torch.Tensor | tuple) -> None:
        before, after = args[0] if args else options["hidden_states"], output if torch.is_tensor(output) else output[0]
        states.append((before.double(), after.double()))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in decoder.layers]
    decoder(input_ids=token_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


class ReadSome:
    """Lets the top layer compute at the positions that are read; at every one where `positions` is None.

    The MLP looks at one position at a time, and so do the query and output maps; those that have adapters, which
    would run everywhere, are left alone. Where nothing is read the output is 0. Keys and values are needed everywhere.
    """

    def __init__(self, layer: nn.Module, adapted: list[str]) -> None:
        self.positions: slice | torch.Tensor | None = None
        modules = [layer.mlp]
        for name in {"q_proj", "o_proj"}.difference(adapted):
            if isinstance(getattr(layer.self_attn, name, None), nn.Linear):
                modules.append(getattr(layer.self_attn, name))
        for module in modules:
            module.register_forward_pre_hook(self.gather)
            module.register_forward_hook(self.scatter)

    def gather(self, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        if self.positions is None:
            return args
        self.tokens = args[0].shape[1]
        return (args[0][:, self.positions],)

    def scatter(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            return output
        full = output.new_zeros(output.shape[0], self.tokens, output.shape[2])
        full[:, self.positions] = output
        return full


# --- adapters ---


def has_adapters(decoder: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in decoder.modules())


def base_of(decoder: nn.Module) -> nn.Module:
    """The decoder itself, under the adapter if there is one."""
    return decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder


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


def add_adapters(decoder: nn.Module, lora: dict) -> PeftModel:
    """`decoder` with LoRA adapters: r, lora_alpha, lora_dropout and target_modules of PEFT's LoraConfig."""
    config = LoraConfig(**lora)
    try:
        adapted = get_peft_model(decoder, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {first_line(error)}") from error
    if config.target_parameters:  # PEFT takes these names for the experts, which had them in older checkpoints
        left = sorted(config.target_modules)
        experts = sorted(set(lora["target_modules"]).difference(left))
        raise UserError(
            f"--lora_target_modules: this base's experts are no linear modules; leave out {', '.join(experts)} "
            f"and name others: {', '.join(left) or 'q_proj, v_proj'}"
        )
    return adapted


@contextmanager
def merged(decoder: nn.Module) -> Iterator[None]:
    """Inside, adapters are merged into the weights of float32; afterwards these are what they were, to the bit."""
    layers = [m.get_base_layer() for m in decoder.modules() if isinstance(m, LoraLayer)]
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
    if not layers:
        yield
        return
    originals = [layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = weight.clone()  # PEFT merges in place, and subtracts with a rounding error
        decoder.merge_adapter()
        yield
    finally:
        decoder.unmerge_adapter()
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = weight
