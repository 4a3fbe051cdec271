"""Teacher and student: built from flags and a base, saved without the base, loaded on the same base alone."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from models.llm.attention import lora_targets
from models.llm.decoder import (
    base_config,
    base_shape,
    check_tokens,
    fingerprint,
    keep_layers,
    load_decoder,
    prompt_ids,
    quiet_transformers,
    unlike_llama,
)
from models.llm.recommender import PLAIN, LLMRec
from utils.assets import base_model_path
from utils.checked import load_tensors
from utils.cli import ROOT
from utils.errors import UserError, first_line, is_out_of_memory
from utils.files import not_written, save_tensors
from utils.run_files import read_config

HEADS_FILE, ADAPTER_FOLDER, DECODER_FILE = "rec_heads.safetensors", "adapter", "decoder.safetensors"


@dataclass(frozen=True)
class Base:
    """What a teacher or student keeps of its base model.

    decoder: as `load_decoder` returns it. prompt: of `prompt_ids`. fingerprint: SHA-256 of both.
    """

    decoder: nn.Module
    prompt: dict[str, list[int]]
    fingerprint: str


def load_base(config: dict, base_model: str | Path) -> Base:
    """What resolved flags keep of the base at `base_model`; UserError where it is not what can be computed with."""
    prompt = prompt_ids(base_model)
    dtype = torch.float32 if config["train_strategy"] == "full" else getattr(torch, config["dtype"])
    decoder = load_decoder(base_model, config["num_layers"], config["layer_selection"], dtype)
    check_tokens(base_model, decoder, prompt)
    found = fingerprint(decoder, prompt)
    if config.get("kind") != "open_p5":  # which packs nothing
        check_packing(decoder, prompt, config["max_seq_length"], base_model, config["read_out"])
    return Base(decoder, prompt, found)


def check_base(config: dict, found: str, base_model: str, folder: Path) -> None:
    """UserError unless the fingerprint of `base_model`, `found`, is the one that the run in `folder` recorded."""
    recorded = config.get("base_fingerprint")
    if recorded is None:
        raise UserError(f"{folder} is of an early version, which had another prompt; train it anew")
    if recorded != found:
        raise UserError(
            f"{folder} was trained on a base with fingerprint {recorded[:16]}, {base_model} has {found[:16]}: other "
            "weights, another tokenizer, or the prompt of an earlier version; bring back the base or the version that "
            "it was trained with, or train it anew"
        )


def layer_signature(layer: nn.Module) -> str:
    """What tells layers apart beside their weights and their number."""
    parts = []
    for name, module in layer.named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "layer_idx"}
        parts.append((name, type(module).__name__, plain, [tuple(p.shape) for p in module.parameters(recurse=False)]))
    return repr(parts)


@torch.no_grad()
def check_packing(
    decoder: nn.Module, prompt: dict[str, list[int]], max_length: int, base_model: str | Path, read_out: str
) -> None:
    """UserError unless `LLMRec.states` are those of transformers' own forward pass, `plain_states`.

    Tried in float32 on copies of the first two layers of each kind, with two short histories: it costs little, and
    catches what no list of architectures could. transformers' `eager` attention honours every argument of a layer.
    """
    some: dict[str, list[int]] = {}
    for index, layer in enumerate(decoder.layers):
        some.setdefault(layer_signature(layer), []).append(index)
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
                read_out=read_out,
            ).eval()
            newest = torch.zeros_like(histories, dtype=torch.bool)
            newest[:, -1] = True
            boundaries = list(range(1, len(layers) + 1))
            found = [model.states(histories, newest, boundaries)]
            with model.for_inference():
                found.append(model.states(histories, newest, boundaries))
            twin.set_attn_implementation("eager")
            model.fast = PLAIN
            expected = model.states(histories, newest, boundaries)  # (2, K, h)
    except UserError:
        raise
    except Exception as error:  # what another architecture does with our arguments is anybody's guess
        if is_out_of_memory(error):
            raise
        raise unlike_llama(base_model, decoder, f"{type(error).__name__}: {first_line(error)}") from error
    off = max(((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item() for states in found)
    if not off < 1e-4:  # NaN is refused too
        raise unlike_llama(base_model, decoder, f"packed, they give states that differ by {off:.0e}")


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
        item_rank=config["lora_r"],
        read_out=config["read_out"],
        item_dropout=config["item_dropout"],
        state_dropout=config["state_dropout"],
        input_map=config["input_map"],
        item_output=config["item_output"],
    )


def recorded_base(config: dict, base_model: str | Path | None = None) -> str:
    """Where the base model of the run that recorded `config` is; `base_model`: where it is now, if it moved.

    On the hub it is the revision that the run was trained on, whatever has become of the model since.
    """
    recorded = config["base_model"]
    if recorded is None:
        raise UserError("the run has no base_model in its config.json: train it again")
    if base_model is None:
        try:
            return base_model_path(recorded, ROOT)
        except UserError as error:
            reason = str(error).removeprefix("--base_model ")
            raise UserError(
                "the base model of this run is no longer there; bring it back, or name its new place (recommend.py "
                f"--base_model): {reason}"
            ) from error
    found = base_model_path(str(base_model))
    same = "@" in recorded and not Path(found).is_dir() and found.partition("@")[0] == recorded.partition("@")[0]
    return recorded if same else found


def save_llm_rec(model: LLMRec, folder: Path) -> None:
    """Write what the base model does not have: heads with the item table, and the adapter or trained decoder."""
    heads = {f"input_proj.{name}": value for name, value in model.input_proj.state_dict().items()}
    heads |= {f"item_output.{name}": value for name, value in model.item_output.state_dict().items()}
    heads |= {"score.weight": model.score.weight, "item_table": model.table}
    save_tensors(heads, folder / HEADS_FILE)
    if model.train_strategy == "lora":
        save_adapter(model.decoder, folder)
    elif model.train_strategy == "full":
        trained = {name: value for name, value in model.decoder.named_parameters() if value.requires_grad}
        save_tensors(trained, folder / DECODER_FILE)


def read_heads(folder: Path, width: int | None) -> dict[str, torch.Tensor]:
    """What `save_llm_rec` wrote beside the adapter; UserError unless its item table has rows of `width` numbers.

    width: None in a run of a version that did not record it.
    """
    path = folder / HEADS_FILE
    saved = load_tensors(path)
    table = saved["item_table"]
    fits = table.ndim == 2 and len(table) > 1 and table.shape[1] == (width or table.shape[1])
    if not fits or not table.is_floating_point():
        what = f"{table.dtype} {tuple(table.shape)}, not rows of {width or 'so many'} numbers"
        raise UserError(f"{path}: its item table is {what}; train the run again")
    return saved


def load_llm_rec(folder: str | Path, base_model: str | Path | None = None) -> LLMRec:
    """A saved teacher or student from its run folder, in eval mode, with identical scores.

    base_model: where its base is now, if not where the run found it. A bfloat16 run computed under autocast: use the
    model under it too. Raises UserError where files are missing or damaged, or the base has another shape or other
    weights than the one that the run was trained on.
    """
    folder = Path(folder)
    config, base_model = recorded_run(folder, base_model)
    saved, adapter = read_heads(folder, config.get("item_dim")), {}
    if config["train_strategy"] == "lora":
        adapter = read_adapter(folder, config["lora_r"])
    base = load_base(config, base_model)
    model = build_llm_rec(config, base, saved.pop("item_table"))
    saved |= adapter
    if model.train_strategy == "full":
        saved |= {f"decoder.{name}": value for name, value in load_tensors(folder / DECODER_FILE).items()}
    check_weights(model, saved, config, base_model, folder)
    check_base(config, base.fingerprint, base_model, folder)
    model.load_state_dict(saved, strict=False)
    return model.eval()


def recorded_run(folder: Path, base_model: str | Path | None = None) -> tuple[dict, str]:
    """config.json of a run folder, and where its base is; UserError where that has another shape now."""
    config = read_config(folder, f"{folder} is no run folder: it has no config.json")
    base_model = recorded_base(config, base_model)
    shape, found = config["base_shape"], base_shape(base_config(base_model))
    if shape != found:
        raise UserError(f"{folder} was trained on a base with {shape}, but {base_model} has {found}")
    return config, base_model


def save_adapter(decoder: nn.Module, folder: Path) -> None:
    """As PEFT writes it."""
    try:  # embeddings never train; left to itself, PEFT would ask the hub whether they have grown
        decoder.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise not_written(folder / ADAPTER_FOLDER, error) from error


def read_adapter(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """The adapter of a run folder, by the names that its weights have in the model; UserError if of another rank."""
    path = folder / ADAPTER_FOLDER / "adapter_model.safetensors"
    adapter = load_tensors(path)
    ranks = {value.shape[0] for name, value in adapter.items() if "lora_A" in name and value.ndim}
    if ranks != {rank}:  # told before memory is taken for so many
        raise UserError(f"{path}: its weights do not fit: adapters of rank {sorted(ranks)}, not {rank}")
    # PEFT writes lora_A.weight for what it holds as lora_A.default.weight
    return {"decoder." + re.sub(r"(lora_[AB])", r"\1.default", name): value for name, value in adapter.items()}


def check_weights(
    model: nn.Module, saved: dict[str, torch.Tensor], config: dict, base_model: str, folder: Path
) -> None:
    """UserError unless `saved` are the weights of `model` that train."""
    trained = {name: (p.shape, True) for name, p in model.named_parameters() if p.requires_grad}
    found = {name: (value.shape, value.is_floating_point()) for name, value in saved.items()}
    if trained != found:
        odd = min(name for name in trained.keys() | found.keys() if trained.get(name) != found.get(name))
        raise UserError(f"{folder}: its weights do not fit {config['num_layers']} layers of {base_model}: {odd}")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters at inference (the paper's table 7: embedding, kept layers, adapter, heads), and those that train."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return {"total": total, "trained": trained, "lora": lora}
