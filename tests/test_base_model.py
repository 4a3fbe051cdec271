"""The base model: which decoders are computed right, which are refused in one line, and what tells bases apart."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma2 import modeling_gemma2

from models.llm import decoder as decoders
from models.llm import storage
from models.llm.decoder import base_config, base_shape
from models.llm.influence import explicit_selection
from models.llm.recommender import LLMRec
from models.llm.storage import build_llm_rec, load_base, load_llm_rec, save_llm_rec
from utils import assets
from utils.errors import UserError
from utils.files import write_json

SMALL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
SMALL |= {"sliding_window": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL["initializer_range"] = 0.3  # attention looks at some positions more than at others
# taken by configurations that have such an entry
EXPERTS = dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4)
EXPERTS |= dict.fromkeys(("num_experts_per_tok", "first_k_dense_replace", "n_group", "topk_group"), 1)
EXPERTS |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 8)
EXPERTS |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"), 8)
EXPERTS |= dict.fromkeys(
    ("linear_value_head_dim", "linear_num_value_heads", "linear_num_key_heads", "mamba_n_heads"), 8
)
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
EXTRA = {"qwen2_vl_text": MROPE, "qwen2_5_vl_text": MROPE, "hunyuan_vl_text": MROPE}
EXTRA |= {"deepseek_v3": {"num_key_value_heads": 4}, "mamba2": {"num_heads": 8}}
EXTRA |= {"falcon_h1": {"mamba_d_ssm": 64}, "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8}}
EXTRA |= {"llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2}}

EQUAL = """
afmoe apertus arcee aria_text bitnet cohere cohere2 cohere2_moe cwm ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo
gemma gemma3_text gemma4_unified_text glm glm4 glm4_moe granite helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax
internlm3 iquestcoder jais2 llama mellum minimax_m2 ministral ministral3 mistral mixtral molmo2_text muse_glimmer_text
nanochat olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3
qwen3_moe qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 starcoder2
""".split()  # noqa: SIM905
REFUSED = """
bamba bart bert biogpt bloom codegen deepseek_v3 diffllama doge falcon falcon_h1 falcon_mamba gemma2 gpt2 gpt_bigcode
gpt_neox gpt_oss gptj granitemoe granitemoehybrid jamba jetmoe lfm2 llama4_text longcat_flash mamba mamba2 minimax
modernbert-decoder mpt nemotron nemotron_h olmo_hybrid opt qwen3_5_text qwen3_next recurrent_gemma roberta rwkv
stablelm t5 vaultgemma xglm
""".split()  # noqa: SIM905


def tiny_config(family: str, **options):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    kind = CONFIG_MAPPING[family]
    usual = SMALL | {name: value for name, value in EXPERTS.items() if getattr(kind(), name, None) is not None}
    usual |= EXTRA.get(family, {})
    if family == "falcon":
        del usual["head_dim"]
    return kind(**usual | options)


def save_base(folder: Path, model: torch.nn.Module | None, post_processor=None, reverse: bool = False) -> Path:
    """`model`, if any, with a tokenizer of one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if post_processor:
        tokenizer.post_processor = post_processor
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    if model is not None:
        model.save_pretrained(folder)
    return folder


def tiny_base(folder: Path, family: str = "llama", seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    return save_base(folder, AutoModel.from_config(tiny_config(family, **options)))


def flags(**changes) -> dict:
    """What a run records that matters here."""
    config = {"train_strategy": "lora", "dtype": "float32", "num_layers": 4, "layer_selection": "first"}
    config |= {"max_seq_length": 8, "lora_r": 2, "lora_alpha": 4.0, "lora_dropout": 0.0}
    config |= {"read_out": "response", "input_map": "linear", "item_output": "frozen", "item_dropout": 0.0}
    return config | {"state_dropout": 0.0, "lora_target_modules": "q_proj"} | changes


def build(base: Path | str, **changes) -> LLMRec:
    config = flags(**changes)
    torch.manual_seed(1)
    model = build_llm_rec(config, load_base(config, base), torch.randn(41, 8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which PEFT starts at 0
            torch.nn.init.normal_(parameter, std=0.3)
    return model


PROMPT = {"PREFIX": "Below is a history:\n", "RESPONSE": "\nNext:"}


@pytest.fixture(autouse=True)
def short_prompt(monkeypatch):
    for name, text in PROMPT.items():
        monkeypatch.setattr(decoders, name, text)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def pad(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def plain_model_states(decoder: torch.nn.Module, model: LLMRec, histories: list[list[int]]) -> torch.Tensor:
    """(B, layers, h) at the last position, by transformers' own forward pass of left-padded rows, eager attention."""
    decoder.set_attn_implementation("eager")
    padded = torch.tensor([[0] * (model.max_length - len(h)) + h for h in histories])
    embed = decoder.get_input_embeddings()
    prefix, response = (embed(ids).expand(len(padded), -1, -1) for ids in (model.prefix_ids, model.response_ids))
    inputs = torch.cat([prefix, model.input_proj(model.table[padded]), response], dim=1)
    there = F.pad(padded != 0, (prefix.shape[1], response.shape[1]), value=True).long()
    how = {"attention_mask": there, "use_cache": False, "output_hidden_states": True}
    return torch.stack([layer[:, -1] for layer in decoder(inputs_embeds=inputs, **how).hidden_states[1:]], dim=1)


def check_equal(model: LLMRec, decoder: torch.nn.Module) -> None:
    """States of all layers, and the gradient of the map from items, against `decoder`, a plain copy of the base."""
    model.eval()
    histories = [[7], [3, 4, 5, 6, 7], list(range(11, 19))]
    target_mask = torch.zeros(3, 8, dtype=torch.bool)
    target_mask[:, -1] = True
    expected = plain_model_states(decoder.eval(), model, histories)
    found = model.states(pad(histories), target_mask, list(range(1, model.num_layers + 1)))
    with model.for_inference(), torch.no_grad():
        inside = model.states(pad(histories), target_mask, list(range(1, model.num_layers + 1)))
    weigh = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((s * weigh).sum(), model.input_proj.weight)[0] for s in (found, expected)]
    for k in range(model.num_layers):
        assert relative(found[:, k], expected[:, k]) < 1e-4 and relative(inside[:, k], expected[:, k]) < 1e-4, k
    assert relative(*gradients) < 1e-3


@pytest.mark.parametrize("family", EQUAL)
def test_accepted_decoders_equal_the_plain_computation(family, tmp_path):
    base = tiny_base(tmp_path, family)
    check_equal(build(base, train_strategy="frozen"), AutoModel.from_pretrained(base, dtype=torch.float32))


@pytest.mark.parametrize("family", EQUAL)
def test_vectors_read_at_items_equal_one_copy_of_the_history_per_item(family, tmp_path):
    """Each copy is cut after its item, and runs alone through transformers' own forward pass, without padding."""
    base = tiny_base(tmp_path, family)
    model = build(base, train_strategy="frozen", read_out="item").eval()
    decoder = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    histories = [[7], [3, 4, 5, 6, 7], list(range(11, 19))]
    P, first, copies = len(PROMPT["PREFIX"]), [8 - len(h) for h in histories], []
    for history, start in zip(histories, first, strict=True):
        for length in range(1, len(history) + 1):
            items = model.input_proj(model.table[history[:length]])[None]
            inputs = torch.cat([decoder.get_input_embeddings()(model.prefix_ids), items], dim=1)
            position = torch.cat([torch.arange(P), P + start + torch.arange(length)])[None]
            # with a mask, as transformers takes a row with a gap in its positions for two samples
            how = {"attention_mask": torch.ones_like(position), "position_ids": position, "use_cache": False}
            copies.append(decoder(inputs_embeds=inputs, **how).last_hidden_state[0, -1])
    expected = torch.stack(copies)
    found = model.states(pad(histories), pad(histories) != 0, [4])[:, 0]
    weigh = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((s * weigh).sum(), model.input_proj.weight)[0] for s in (found, expected)]
    assert relative(found, expected) < 1e-4 and relative(*gradients) < 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_decoders_of_another_kind_are_refused_in_one_line(family, tmp_path):
    refused(tiny_base(tmp_path, family), "--base_model", "choose another base|no decoder-only", train_strategy="frozen")


def refused(base: Path | str, start: str, words: str, **changes) -> None:
    with pytest.raises(UserError) as error:
        build(base, **changes)
    message = str(error.value)
    assert message.startswith(start) and re.search(words, message) and "\n" not in message, message


# --- what layers and models want beside weights ---


def test_soft_capping_is_refused_where_transformers_says_that_sdpa_would_do(tmp_path, monkeypatch):
    """As its releases before this one did."""
    monkeypatch.setattr(modeling_gemma2.Gemma2PreTrainedModel, "_supports_sdpa", True)
    refused(tiny_base(tmp_path, "gemma2"), "--base_model", "wants softcap")


TURNED = {"muse_glimmer_text": {"layer_rope_theta": [1e4, 0.0, 1e4, 1e4]}, "smollm3": {"no_rope_layers": [1, 1, 0, 1]}}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "exaone4", "afmoe", *TURNED])
@pytest.mark.parametrize(("selection", "layers"), [("interval", [0, 2]), ("0,3", [0, 3]), ("1,2,3", [1, 2, 3])])
def test_selected_layers_take_along_what_the_configuration_lists_for_them(selection, layers, family, tmp_path):
    """They may differ in window and rotation; against a model of their weights alone."""
    if family == "afmoe" and layers[0]:
        pytest.skip("its first layer is dense, so that the model of the others alone is another one")
    base = tiny_base(tmp_path / "base", family, **TURNED.get(family, {}))
    whole = AutoModel.from_pretrained(base, dtype=torch.float32)
    config = AutoConfig.from_pretrained(base).to_dict()
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 4:
            config[name] = [value[index] for index in layers]
    alone = AutoModel.from_config(CONFIG_MAPPING[family].from_dict(config | {"num_hidden_layers": len(layers)}))
    for layer, index in zip(alone.layers, layers, strict=True):
        layer.load_state_dict(whole.layers[index].state_dict())
    alone.embed_tokens, alone.norm = whole.embed_tokens, whole.norm
    how = {"num_layers": len(layers), "layer_selection": selection}
    check_equal(build(base, train_strategy="frozen", **how), alone)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("eurobert", {}),
        # prompt and history turn otherwise than the prompt alone
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 30}),
    ],
)
def test_layers_that_look_ahead_or_back_differently_are_refused(family, options, tmp_path):
    base = tiny_base(tmp_path, family, **options)
    refused(base, "--base_model", "packed, they give states that differ by", train_strategy="frozen")


def test_what_only_a_later_layer_has_is_refused_only_where_it_is_kept(tmp_path):
    mixed = ["full_attention"] * 3 + ["linear_attention"]
    base = tiny_base(tmp_path, "qwen3_next", layer_types=mixed)
    refused(base, "--base_model", "layer 4 has no self_attn", train_strategy="frozen")
    build(base, train_strategy="frozen", num_layers=3)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"max_position_embeddings": 33}, "positions of 33; choose at most 7"),
        ("llama", {"max_position_embeddings": 20}, "positions of 20; choose another base"),
        ("mistral", {"sliding_window": 33}, "window of 33; choose at most 7"),
        ("gemma3_text", {"sliding_window": 33}, "window of 33"),
    ],
)
def test_histories_and_prompts_that_the_base_cannot_look_back_on_are_refused(family, options, words, tmp_path):
    base = tiny_base(tmp_path, family, **options)  # prompt: 20 bytes and 6
    refused(base, "--max_seq_length 8: ", words)
    if "7" in words:
        build(base, max_seq_length=7)


def test_a_window_of_layers_that_are_not_kept_does_not_matter(tmp_path):
    base = tiny_base(
        tmp_path, "gemma3_text", sliding_window=9, layer_types=["full_attention"] * 3 + ["sliding_attention"]
    )
    refused(base, "--max_seq_length", "window of 9", train_strategy="frozen")
    build(base, train_strategy="frozen", num_layers=3)


# --- folders that are not a plain decoder with its tokenizer ---


def change_config(base: Path, **changes) -> None:
    config = json.loads((base / "config.json").read_text())
    write_json(config | changes, base / "config.json")


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": QUANTISED}, "quantised .*bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"quantization_config": {"quant_method": "of-tomorrow"}}, "quantised"),
        ({"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}, "custom code"),
        ({"model_type": "of-tomorrow"}, "no model found"),
        ({"hidden_size": 64}, "another shape"),
        ({"vocab_size": 250}, "another shape"),
        ({"num_hidden_layers": 5}, "lack 9 tensors"),
        ({"hidden_size": "wide"}, "no model found|cannot be read"),
        ({"model_type": "vit", "vocab_size": None}, "a vit model is no decoder-only language model"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_and_no_code_is_run(changes, words, tmp_path):
    base = tiny_base(tmp_path / "base")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(base, **changes)
    refused(base, "--base_model", words, num_layers=5 if "num_hidden_layers" in changes else 4)
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_tokenizer_is_run_either(tmp_path):
    base = tiny_base(tmp_path / "base")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    entry = json.loads((base / "tokenizer_config.json").read_text())
    entry |= {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "tokenizer_class": "T"}
    write_json(entry, base / "tokenizer_config.json")
    refused(base, "--base_model", "tokenizer cannot be read")
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_adapters_is_refused(tmp_path):
    base = tiny_base(tmp_path)
    get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(base)
    refused(base, "--base_model", "merge them")


@pytest.mark.parametrize(("owner", "name"), [(decoders.AutoModel, "from_pretrained"), (storage, "LLMRec")])
def test_memory_that_is_short_is_no_fault_of_the_base(owner, name, tmp_path, monkeypatch):
    def short(*arguments, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    base = tiny_base(tmp_path)
    monkeypatch.setattr(owner, name, short)
    with pytest.raises(RuntimeError, match="allocate memory"):
        build(base)


def test_a_tokenizer_larger_than_the_embedding_is_refused_where_the_prompt_needs_what_it_lacks(tmp_path):
    small = tiny_base(tmp_path / "small", vocab_size=60)
    refused(small, "--base_model", "token .* its embedding has 60 rows")
    with pytest.raises(UserError, match="its embedding has 60 rows"):  # which computes with the prompt before that
        explicit_selection({"layer_selection": "influence", "num_layers": 1, "dtype": "float32"}, small)
    build(tiny_base(tmp_path / "enough", vocab_size=250))  # of 256 tokens, as Gemma 3 1B has one more than rows


@pytest.mark.parametrize("template", ["$A", "$A B", "A $A", "A $A B", "A $A A", "A A $A B B", "A B $A"])
def test_the_prompt_is_its_texts_alone_whatever_a_tokenizer_adds(template, tmp_path):
    base = save_base(tmp_path, None, TemplateProcessing(template, special_tokens=[("A", 0), ("B", 1)]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    coded = {"\n": "Ċ", " ": "Ġ"}
    ids = {name: [alphabet.index(coded.get(letter, letter)) for letter in text] for name, text in PROMPT.items()}
    assert decoders.prompt_ids(base) == {"prefix_ids": ids["PREFIX"], "response_ids": ids["RESPONSE"]}


# of SmolLM2
PREFIX_IDS = """
19798 314 354 5785 338 6601 253 3856 28 20054 351 354 3007 338 2433 2030 2468 30 9517 253 2426 338 13674 32873 260
3116 30 198 198 3757 20880 42 198 15423 260 2914 417 99 7131 1463 28 3142 1867 1636 5033 288 325 10610 30 198 198 3757
18100 42 198
"""
RESPONSE_IDS = [198, 3757, 14212, 42, 198]


@pytest.mark.parametrize("template", ["$A", "<|im_start|> $A <|im_end|>"])
def test_the_released_prompt_has_these_tokens_of_smollm2(template, tmp_path, monkeypatch):
    monkeypatch.undo()
    tokenizer = AutoTokenizer.from_pretrained(assets.base_model_path("smollm2-135m"))
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=special)
    tokenizer.save_pretrained(tmp_path)
    found = decoders.prompt_ids(tmp_path)
    assert found == {"prefix_ids": list(map(int, PREFIX_IDS.split())), "response_ids": RESPONSE_IDS}
    texts = [tokenizer.decode(ids) for ids in found.values()]
    assert texts[0].startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert texts[0].endswith(
        "### Instruction:\nGiven the user’s purchase history, predict next possible item to be purchased.\n\n"
        "### Input:\n"
    )
    assert texts[1] == "\n### Response:\n"


# --- multimodal checkpoints ---

TEXT = SMALL | {"layer_types": ["sliding_attention", "full_attention"] * 2}
QWEN = {name: value for name, value in SMALL.items() if name != "head_dim"}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
MULTIMODAL = {
    "gemma3": lambda: Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "llava": lambda: LlavaConfig(
        text_config=SMALL | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"}
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=SMALL | {"model_type": "mistral"}, vision_config=VISION | {"model_type": "pixtral"}
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(text_config=QWEN | MROPE, vision_config=QWEN_VISION),
}


@pytest.mark.parametrize("layout", ["as saved", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_checkpoints_load_their_language_model(family, layout, tmp_path):
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(MULTIMODAL[family]())
    base = save_base(tmp_path, whole)
    if layout != "as saved":
        tensors = load_file(base / "model.safetensors")
        old = r"^(language_model\.model|model\.language_model)\."
        save_file({re.sub(old, layout, name): value for name, value in tensors.items()}, base / "model.safetensors")
    model = build(base, train_strategy="frozen")
    assert not any("vision" in name for name, _ in model.named_parameters())
    check_equal(model, whole.model.language_model)


def test_a_quantised_multimodal_checkpoint_is_refused(tmp_path):
    base = save_base(tmp_path, AutoModelForImageTextToText.from_config(MULTIMODAL["gemma3"]()))
    change_config(base, quantization_config=QUANTISED)
    refused(base, "--base_model", "quantised")


# --- LoRA ---

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("all-linear", LINEAR),
        ("q_proj,k_proj,v_proj,o_proj", LINEAR[:4]),
        ("self_attn.q_proj, mlp.up_proj", ["q_proj", "up_proj"]),
        ("layers.1.self_attn.o_proj", ["o_proj"]),
    ],
)
def test_adapters_on_any_linear_modules_train_save_and_load(targets, adapted, tmp_path):
    base = tiny_base(tmp_path / "base")
    model = saved_run(tmp_path / "run", base, lora_target_modules=targets)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if "lora_" in name}
    assert trained == set(adapted)
    by_peft = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    plain = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=2, lora_alpha=4, target_modules=by_peft))
    plain.load_state_dict(model.decoder.state_dict())
    check_equal(model, plain.get_base_model())
    histories = pad([[3, 4], [5, 6, 7]])
    assert torch.equal(load_llm_rec(tmp_path / "run").user_vectors(histories), model.eval().user_vectors(histories))


def test_routers_get_no_adapters(tmp_path):
    """PhiMoE's inherits from nn.Linear and returns a tuple."""
    model = build(tiny_base(tmp_path, "phimoe"), lora_target_modules="all-linear")
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == set(LINEAR[:4])
    model.user_vectors(pad([[3, 4], [5, 6, 7]]))


@pytest.mark.parametrize(
    ("targets", "family", "words"),
    [
        ("gate_proj,up", "llama", "no linear module named up in .*; they have down_proj, gate_proj, k_proj, o_proj"),
        ("proj", "llama", "named proj"),
        ("norm", "llama", "named norm"),
        ("lm_head", "llama", "named lm_head"),
        ("q_proj,", "llama", "named ''"),
        ("layers.5.self_attn.q_proj", "llama", "named layers.5"),
        ("gate_proj", "mixtral", "named gate_proj .*they have k_proj, o_proj, q_proj, v_proj$"),
        ("all-linear", "ernie4_5_moe", "leave out down_proj, gate_proj, up_proj and name others: k_proj, o_proj"),
        ("gate_proj", "ernie4_5_moe", "gate_proj"),
    ],
)
def test_lora_targets_that_no_kept_layer_has_are_refused_and_those_that_exist_named(targets, family, words, tmp_path):
    refused(tiny_base(tmp_path, family), "--lora_target_modules: ", words, lora_target_modules=targets)


# --- a run belongs to its base ---


def saved_run(folder: Path, base: Path | str, train_strategy: str = "lora", **changes) -> LLMRec:
    """A run folder with one training step, as far as loading knows it; returns the model."""
    config = flags(train_strategy=train_strategy, **changes)
    model = build(base, train_strategy=train_strategy, **changes).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model({"histories": pad([[3, 4], [5, 6, 7]]), "targets": pad([[0, 9], [0, 0, 8]])})["ce"].backward()
    optimizer.step()
    found = load_base(config, base).fingerprint
    config |= {"base_model": str(base), "base_shape": base_shape(base_config(base)), "base_fingerprint": found}
    folder.mkdir()
    save_llm_rec(model, folder)
    write_json(config, folder / "config.json")
    return model


def found(base: Path | str, **changes) -> str:
    return load_base(flags(**changes), base).fingerprint


def change_weight(base: Path, name: str) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[-1] += 0.25
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def test_a_fingerprint_knows_the_weights_that_are_kept_and_no_others(tmp_path):
    base = tiny_base(tmp_path / "base")
    plain = found(base, num_layers=2)
    assert re.fullmatch("[0-9a-f]{64}", plain) and found(base, num_layers=2) == plain
    for name in (
        "embed_tokens.weight",
        "norm.weight",
        "layers.1.mlp.up_proj.weight",
        "layers.0.input_layernorm.weight",
    ):
        other = tmp_path / name
        shutil.copytree(base, other)
        change_weight(other, name)
        assert found(other, num_layers=2) != plain, name
    change_weight(base, "layers.2.mlp.up_proj.weight")
    assert found(base, num_layers=2) == plain
    assert found(base, num_layers=2, layer_selection="interval") != plain


def test_a_fingerprint_is_one_of_weights_tokens_and_rotation_not_of_files(tmp_path):
    base, again, other, turned = (tmp_path / name for name in ("base", "again", "other", "turned"))
    tiny_base(base)
    model = AutoModel.from_pretrained(base)
    plain = found(base)
    save_base(again, model)
    model.save_pretrained(again, max_shard_size="20KB")
    (again / "model.safetensors").unlink()
    assert len(list(again.glob("*.safetensors"))) > 1 and found(again) == plain
    save_base(other, model, TemplateProcessing("A $A", special_tokens=[("A", 0)]))
    assert found(other) == plain  # a start token is none of the prompt's
    save_base(other, model, reverse=True)
    assert found(other) != plain
    shutil.copytree(base, turned)
    change_config(turned, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert found(turned) != plain


def test_a_fingerprint_takes_no_copy_of_the_weights(monkeypatch):
    """Hashed in place: NumPy's view has the tensor's address."""
    weight = torch.randn(64, 64)
    seen = []

    class Digest:
        def update(self, data) -> None:
            seen.append(getattr(data, "ctypes", None) and data.ctypes.data)

        hexdigest = str

    monkeypatch.setattr(decoders.hashlib, "sha256", lambda *args: Digest())
    linear = torch.nn.Linear(1, 1)
    linear.weight.data, linear.config = weight, None
    decoders.fingerprint(linear, {})
    assert weight.data_ptr() in seen


@pytest.mark.parametrize("strategy", ["lora", "full", "frozen"])
def test_a_run_loads_on_its_base_alone(strategy, tmp_path):
    base = tiny_base(tmp_path / "base")
    model = saved_run(tmp_path / "run", base, train_strategy=strategy)
    histories = pad([[3, 4], [5, 6, 7]])
    assert torch.equal(load_llm_rec(tmp_path / "run").user_vectors(histories), model.eval().user_vectors(histories))
    other = tiny_base(tmp_path / "other", seed=1)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["base_fingerprint"]
    with pytest.raises(
        UserError, match=f"{recorded[:16]}, .*other has {found(other, train_strategy=strategy)[:16]}"
    ) as e:
        load_llm_rec(tmp_path / "run", other)
    assert "\n" not in str(e.value) and "bring back the base" in str(e.value)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    assert torch.equal(load_llm_rec(tmp_path / "run", moved).user_vectors(histories), model.user_vectors(histories))
    with pytest.raises(UserError, match="no longer there"):
        load_llm_rec(tmp_path / "run")


def test_a_run_of_a_version_with_another_prompt_is_refused(tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base")
    with monkeypatch.context() as earlier:
        earlier.setattr(decoders, "PREFIX", "Here is a history:\n")
        saved_run(tmp_path / "run", base)
    with pytest.raises(UserError, match=r"or the prompt of an earlier version; .*train it anew$"):
        load_llm_rec(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["base_fingerprint"]  # which the first versions did not record
    write_json(config, tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match=r"run is of an early version, which had another prompt; train it anew$"):
        load_llm_rec(tmp_path / "run")


# --- where a base is ---


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("models/tiny", "{place}/models/tiny"),  # though it looks like a hub id
        ("./models/tiny/", "{place}/models/tiny"),
        ("../{name}/models/tiny", "{place}/models/tiny"),
        ("~/models/tiny", "{place}/models/tiny"),
        ("{place}/models/tiny", "{place}/models/tiny"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_folders_are_recorded_so_that_they_are_found_from_anywhere(given, recorded, tmp_path, monkeypatch):
    for elsewhere in (tmp_path / "elsewhere", tmp_path / "models/tiny"):
        elsewhere.mkdir(parents=True)
    given, recorded = (text.format(place=tmp_path, name=tmp_path.name) for text in (given, recorded))
    monkeypatch.setenv("SLMREC_CACHE", str(assets.cache_folder()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    there = assets.base_model_path(given)
    assert Path(there).is_absolute()
    assert assets.record_base_model(given, there) == recorded
    monkeypatch.chdir("elsewhere")
    again = storage.recorded_base({"base_model": assets.record_base_model(given, there)})
    assert Path(again).samefile(there)


def test_a_folder_inside_the_checkout_is_recorded_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    there = assets.base_model_path("../recipes")
    recorded = assets.record_base_model("../recipes", there)
    assert recorded == "recipes"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()  # another one, which the record does not mean
    assert Path(storage.recorded_base({"base_model": recorded})).samefile(ROOT / "recipes")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub/models--org--tiny"


def publish(hub: Path, commit: str, seed: int) -> None:
    """A new commit on the main branch of org/tiny."""
    tiny_base(hub / "snapshots" / commit, seed=seed)
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs/main").write_text(commit)


def test_a_run_keeps_to_the_commit_of_the_hub_that_it_was_trained_on(hub, tmp_path):
    old, new = "a" * 40, "b" * 40
    publish(hub, old, seed=0)
    base = assets.base_model_path("org/tiny")
    assert base == assets.record_base_model("org/tiny", base) == f"org/tiny@{old}"
    model = saved_run(tmp_path / "run", base).eval()
    publish(hub, new, seed=1)
    assert assets.base_model_path("org/tiny") == f"org/tiny@{new}"
    assert assets.base_model_path(f"org/tiny@{old}") == base and found(base) != found(f"org/tiny@{new}")
    expected = model.user_vectors(pad([[3, 4], [5, 6, 7]]))
    for given in (None, "org/tiny", f"org/tiny@{new}"):
        assert torch.equal(load_llm_rec(tmp_path / "run", given).user_vectors(pad([[3, 4], [5, 6, 7]])), expected)


@pytest.mark.parametrize("given", ["org/none", "org/tiny@cafe", "no such", "/no/such/model", "~nobody-here/x", "a/b/c"])
def test_ids_that_neither_hub_nor_disk_know_are_refused_in_one_line(given, hub):
    publish(hub, "a" * 40, seed=0)
    with pytest.raises(UserError, match="no model found there") as error:
        assets.base_model_path(given)
    assert str(error.value).startswith(f"--base_model {given}: ") and "\n" not in str(error.value)
