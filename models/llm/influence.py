"""Layers by block influence (ShortGPT, arXiv 2403.03853): what a layer changes in the hidden states that it reads.

It is measured on the text of the prompt alone: every example has it, and before training it is all of the input that
means something, as the map of item vectors is still random. So the layers depend on the base model alone, not on
dataset or seed.
"""

from pathlib import Path

import torch
from torch import nn

from models.llm.attention import layer_states
from models.llm.decoder import base_config, check_tokens, load_decoder, prompt_ids, select_layers


def block_influence(decoder: nn.Module, token_ids: list[int]) -> list[float]:
    """BI of each layer: 1 - mean over the tokens of the cosine between a hidden state before it and after it.

    The state after the top layer is taken before the final norm.
    """
    pairs = layer_states(decoder.eval(), torch.tensor([token_ids]))
    return [1 - torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairs]


def explicit_selection(config: dict, base_model: str | Path) -> str:
    """`--layer_selection` of resolved flags, with the layers of the highest influence listed if asked for."""
    if config["layer_selection"] != "influence":
        return config["layer_selection"]
    depth = base_config(base_model).num_hidden_layers
    select_layers(config["num_layers"], depth, "first")  # refuses more layers than there are
    dtype = getattr(torch, config["dtype"])
    prompt, decoder = prompt_ids(base_model), load_decoder(base_model, depth, "first", dtype)
    check_tokens(base_model, decoder, prompt)
    influence = block_influence(decoder, prompt["prefix_ids"] + prompt["response_ids"])
    best = sorted(range(depth), key=influence.__getitem__, reverse=True)[: config["num_layers"]]
    print("block influence: " + ", ".join(f"{layer}: {value:.3f}" for layer, value in enumerate(influence)))
    return ",".join(map(str, sorted(best)))
