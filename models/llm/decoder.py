"""A base model: its decoder loaded, cut to the layers that are kept, checked and fingerprinted; and its prompt."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from models.llm.attention import has_adapters, renumber, what_lacks
from utils.errors import UserError, first_line, is_out_of_memory

PREFIX = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGiven the user\u2019s purchase history, predict next possible item to be purchased.\n\n"
    "### Input:\n"
)
RESPONSE = "\n### Response:\n"
MOST_LAYERS = 1000  # the largest models have 126


def listed_layers(layer_selection: str) -> list[int] | None:
    """The layers that a `--layer_selection` lists, counted from 0; None where it lists none."""
    if layer_selection in ("first", "interval", "influence"):
        return None
    expected = "first, interval, influence, or numbers of layers from 0, as in 0,1,2,5"
    return layer_numbers(f"--layer_selection {layer_selection}", layer_selection, expected)


def layer_numbers(flag: str, text: str, expected: str) -> list[int]:
    """The numbers of a list of layers with commas; UserError that names `flag` where they do not ascend."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise UserError(f"{flag}: expected {expected}")
    layers = [int(number) for number in numbers]
    if layers != sorted(set(layers)):
        raise UserError(f"{flag}: layers ascend, each once, as in {','.join(map(str, sorted(set(layers))))}")
    return layers


def layer_flags(num_layers: int | None, layer_selection: str | None, default: int) -> tuple[int, str | None]:
    """`--num_layers` and `--layer_selection` resolved: a list of layers says how many they are."""
    layers = listed_layers(layer_selection) if layer_selection else None
    if layers is None:
        return default if num_layers is None else num_layers, layer_selection
    if num_layers not in (None, len(layers)):
        raise UserError(
            f"--num_layers {num_layers}: --layer_selection {layer_selection} lists {len(layers)}; make them agree, as "
            f"with --num_layers {len(layers)}"
        )
    return len(layers), ",".join(map(str, layers))


def select_layers(num_layers: int, base_layers: int, layer_selection: str) -> list[int]:
    """Which of the base's layers are kept: the first ones, `num_layers` at an even interval, or those listed."""
    layers = listed_layers(layer_selection)
    if layers is not None:
        layer_flags(num_layers, layer_selection, default=num_layers)  # refuses a list of another length
        if layers[-1] >= base_layers:
            raise UserError(
                f"--layer_selection {layer_selection}: the base model has {base_layers} layers; choose from "
                f"0..{base_layers - 1}"
            )
        return layers
    if not 1 <= num_layers <= base_layers:
        raise UserError(f"--num_layers {num_layers}: the base model has {base_layers} layers; choose 1..{base_layers}")
    if layer_selection == "first":
        return list(range(num_layers))
    if layer_selection != "interval":
        raise ValueError(f"{layer_selection} names no layers yet: explicit_selection makes a list of it")
    return [index * base_layers // num_layers for index in range(num_layers)]


def block_boundaries(num_layers: int, num_blocks: int) -> list[int]:
    """Block k of a stack ends after layer k * num_layers / num_blocks, counted from 1 (section 3.3 of the paper)."""
    if num_blocks < 1 or num_layers % num_blocks:
        raise UserError(f"--num_blocks {num_blocks} does not divide the {num_layers} layers; choose a divisor")
    return [k * num_layers // num_blocks for k in range(1, num_blocks + 1)]


def pretrained_arguments(base_model: str | Path) -> dict:
    """Arguments of transformers' `from_pretrained` for a folder or `id@revision` on the hub. No code of it is run."""
    name, revision = str(base_model), None
    if not Path(name).is_dir():
        name, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or "main", "trust_remote_code": False}


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
            whole = AutoConfig.from_pretrained(**pretrained_arguments(base_model))
            config = whole.get_text_config(decoder=True)
    except Exception as error:  # a config.json of anything else, or of a library that is not there
        raise UserError(
            f"--base_model {base_model}: no model found there ({first_line(error)}); give a folder or hub id"
        ) from error
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    if whole.is_encoder_decoder or not all(getattr(config, name, None) for name in needed):
        raise UserError(f"--base_model {base_model}: a {whole.model_type} model is no decoder-only language model")
    if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
        raise UserError(f"--base_model {base_model}: its config.json names {config.num_hidden_layers} layers; mend it")
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
                **pretrained_arguments(base_model),
                config=cut(copy.deepcopy(config), list(range(layers[-1] + 1))),
                key_mapping={TEXT_WEIGHTS: ""},
                dtype=dtype,
                use_safetensors=True,  # anything else is a pickle
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file, a package that is not there, ...: any library's error
        if is_out_of_memory(error):
            raise
        if getattr(config, "quantization_config", None):
            raise quantised(base_model, first_line(error)) from error
        raise UserError(f"--base_model {base_model}: the weights cannot be read ({first_line(error)})") from error
    if getattr(decoder.config, "quantization_config", None):  # gone where transformers made plain weights of them
        raise quantised(base_model, "and stay so when loaded")
    stack = getattr(decoder, "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != layers[-1] + 1:
        raise unlike_llama(base_model, decoder, f"no list of {layers[-1] + 1} `layers`")
    for index in layers:
        if lacking := what_lacks(stack[index]):
            raise unlike_llama(base_model, decoder, f"layer {index + 1} has no {lacking}")
    if has_adapters(decoder):
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
    renumber(decoder.layers)
    cut(decoder.config, layers)  # which the attention modules hold too
    return decoder


def shard_layers(decoder: nn.Module, device: torch.device) -> None:
    """Let each process hold its part of the layers' frozen weights, moved to `device` (FSDP2).

    A layer's weights are gathered when it runs, and left again after it. What trains, and what is outside the layers,
    stands whole in each process: it is small, or used outside the decoder, as token embeddings are.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    trained = {parameter for parameter in decoder.parameters() if parameter.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        layer.unshard()  # makes room to gather into, which inference mode would make for inference alone
        layer.reshard()
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))


@torch.no_grad()
def load_head(base_model: str | Path, decoder: nn.Module, prompt: list[int]) -> nn.Parameter:
    """The base's language-model head (vocabulary, h), in the type of `decoder`; its embedding where both are one.

    UserError where logits are not the states times this matrix, or what is read is not a row of the embedding: tried
    on the tokens `prompt` with the first layer alone.
    """
    embedding = decoder.get_input_embeddings().weight
    first = cut(copy.deepcopy(base_config(base_model)), [0])
    how = {"config": first, "dtype": embedding.dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(**pretrained_arguments(base_model), **how)
            head = model.get_output_embeddings().weight
            output = model(torch.tensor([prompt]), output_hidden_states=True)
        states, read = output.hidden_states[-1].float(), output.hidden_states[0]
        plain = torch.allclose(output.logits.float(), states @ head.float().T, rtol=1e-2, atol=1e-2)
        plain = plain and torch.equal(read[0], embedding[prompt])
    except Exception as error:  # what another architecture does is anybody's guess
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--base_model {base_model}: its language-model head cannot be read ({first_line(error)}); choose another"
        ) from error
    if loading["missing_keys"]:
        raise UserError(
            f"--base_model {base_model}: its weights lack {min(loading['missing_keys'])}; choose another base"
        )
    if not plain:
        raise UserError(f"--base_model {base_model}: it scales its embeddings or logits; choose another base")
    return embedding if torch.equal(head, embedding) else head


def prompt_ids(base_model: str | Path) -> dict[str, list[int]]:
    """Token ids of the prompt, as released: the texts alone, without what a tokenizer adds at their start or end."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(**pretrained_arguments(base_model))
            prefix, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (PREFIX, RESPONSE))
    except Exception as error:  # tokenizers raise what they like
        raise UserError(f"--base_model {base_model}: its tokenizer cannot be read ({first_line(error)})") from error
    if not prefix or not response:
        raise UserError(f"--base_model {base_model}: its tokenizer makes no tokens of the prompt")
    return {"prefix_ids": prefix, "response_ids": response}


def check_tokens(base_model: str | Path, decoder: nn.Module, prompt: dict[str, list[int]]) -> None:
    """UserError where the decoder has no embedding, or lacks a token of the prompt."""
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


def fingerprint(decoder: nn.Module, prompt: dict[str, list[int]]) -> str:
    """SHA-256 of all weights, the prompt's token ids, and the rotation of positions, which has no weights."""
    rope = getattr(decoder.config, "rope_parameters", None)
    digest = hashlib.sha256(json.dumps([prompt, rope], sort_keys=True).encode())
    for name, value in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_length(config: AutoConfig, max_length: int, prompt: int, tokens_per_item: int = 1) -> None:
    """UserError where a history of `max_length` items and `prompt` tokens are more than the base can look back on."""
    limits = {"max_position_embeddings": "positions"}
    if set(getattr(config, "layer_types", None) or []) != {"full_attention"}:
        limits |= {"sliding_window": "window", "attention_chunk_size": "chunk"}
    for name, what in limits.items():
        limit = getattr(config, name, None)
        if limit and limit < max_length * tokens_per_item + prompt:
            most = (limit - prompt) // tokens_per_item
            advice = f"at most {most}" if most > 0 else "another base"
            raise UserError(
                f"--max_seq_length {max_length}: history and prompt ({prompt} tokens) exceed the base's "
                f"{what} of {limit}; choose {advice}"
            )


def base_shape(config: AutoConfig) -> dict:
    """What an adapter must find again in its base."""
    return {name: getattr(config, name) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")}
