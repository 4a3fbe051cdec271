"""What models/llm/attention.py relies on inside transformers and PEFT: a release that changes it fails here."""

import copy
import inspect

import pytest
import torch
from conftest import LORA, tiny_decoder
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.llm import attention
from utils.errors import UserError


def test_supports_sdpa_and_set_attn_implementation():
    decoder = tiny_decoder()
    attention.use_packed_attention(decoder)
    assert decoder.config._attn_implementation == attention.PACKED
    decoder._supports_sdpa = False
    with pytest.raises(UserError, match="attention of its own"):
        attention.use_packed_attention(decoder)


def test_attention_functions_are_found_by_name_and_get_what_layers_hand_on():
    assert attention.PACKED in AttentionInterface().valid_keys()
    assert AttentionMaskInterface()[attention.PACKED] is attention.sdpa_mask
    seen = []
    decoder = tiny_decoder(num_layers=2)
    attention.use_packed_attention(decoder)
    original = AttentionInterface()[attention.PACKED]
    AttentionInterface.register(attention.PACKED, lambda *a, **k: seen.append((len(a), set(k))) or original(*a, **k))
    try:
        decoder(inputs_embeds=torch.randn(1, 3, 32), packing=None)
    finally:
        AttentionInterface.register(attention.PACKED, original)
    assert len(seen) == 2 and all(count == 5 and "packing" in names for count, names in seen)


def test_sdpa_attention_forward_takes_these_arguments_and_transposes():
    names = list(inspect.signature(sdpa_attention_forward).parameters)
    assert names[:5] == ["module", "query", "key", "value", "attention_mask"]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    out, weights = sdpa_attention_forward(module, *torch.randn(3, 2, 4, 5, 8), None)
    assert out.shape == (2, 5, 4, 8) and weights is None


def test_a_cache_has_layers_with_keys_and_values():
    decoder = tiny_decoder(num_layers=2)
    found = attention.keys_values(decoder, torch.randn(3, 5, 32))
    assert len(found) == 2 and all(part.shape == (3, 2, 5, 8) for layer in found for part in layer)
    assert hasattr(DynamicCache(config=decoder.config), "layers")


def test_layers_have_self_attn_with_layer_idx_and_mlp():
    layer = tiny_decoder().layers[1]
    assert attention.what_lacks(layer) is None and layer.self_attn.layer_idx == 1
    for name in ("self_attn", "mlp"):
        other = copy.deepcopy(layer)
        delattr(other, name)
        assert attention.what_lacks(other) == name
    del layer.self_attn.layer_idx
    assert attention.what_lacks(layer) == "layer_idx"


def test_queries_and_outputs_are_linear_maps_of_that_name():
    layer = tiny_decoder().layers[0]
    assert all(isinstance(getattr(layer.self_attn, name), nn.Linear) for name in ("q_proj", "o_proj"))
    top, x = attention.ReadSome(layer, []), torch.randn(1, 6, 32)
    whole = layer.mlp(x)
    top.positions = torch.tensor([1, 4])
    some = layer.mlp(x)
    assert torch.allclose(some[:, [1, 4]], whole[:, [1, 4]], atol=1e-6) and some[:, [0, 2, 3, 5]].abs().sum() == 0


def test_adapters_are_lora_layers_over_get_base_layer_that_merge_in_place():
    decoder = tiny_decoder()
    adapted = attention.add_adapters(decoder, LORA)
    assert attention.base_of(adapted) is decoder and attention.base_of(decoder) is decoder
    assert attention.has_adapters(adapted) and not attention.has_adapters(tiny_decoder())
    layer = next(module for module in adapted.modules() if isinstance(module, LoraLayer))
    assert isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = layer.get_base_layer().weight.clone()
    with attention.merged(adapted):
        assert layer.merged and not torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged and torch.equal(layer.get_base_layer().weight, before)


def test_target_parameters_tell_that_peft_took_a_name_for_experts():
    assert LoraConfig(target_modules=["q_proj"]).target_parameters is None
    assert get_peft_model(tiny_decoder(), LoraConfig(target_modules=["q_proj"])).peft_config["default"].target_modules
