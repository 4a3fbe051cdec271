"""Tiny random models and synthetic data for unit tests; the real ones are in test_pipeline.py."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

# tiny models are faster on one thread, and results do not depend on how busy the machine is
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from models.llm.decoder import keep_layers
from models.llm.recommender import LLMRec
from models.sr.sasrec import SASRec
from utils import experiments, files, paper_runs
from utils.checked import attributes_fingerprint, fingerprint_of
from utils.data import Sequences
from utils.experiments import Experiment

ROOT = Path(__file__).resolve().parent.parent
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def tiny_decoder(num_layers: int = 4, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return AutoModel.from_config(config)


def tiny_llm_rec(num_layers: int = 4, max_length: int = 30, seed: int = 0, **kwargs) -> LLMRec:
    decoder = tiny_decoder(num_layers, seed)
    table = torch.randn(41, 8)
    table[0] = 0
    options = {"train_strategy": "lora", "lora": LORA} | kwargs
    model = LLMRec(
        keep_layers(decoder, list(range(num_layers))),
        table,
        prefix_ids=list(range(3, 14)),
        response_ids=[5, 6, 7],
        max_length=max_length,
        **options,
    )
    for name, parameter in model.named_parameters():  # PEFT starts lora_B at 0, where half of the gradients vanish
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def forget() -> None:
    """What reproduce.py has read of recipes/, where a test writes its own."""
    cached = (paper_runs.book, paper_runs.recipe, Experiment.fingerprint, Experiment.configuration, Experiment.equals)
    for function in (*cached, experiments.tell_left_out):
        function.cache_clear()


def sasrec(data: Sequences, **flags) -> SASRec:
    torch.manual_seed(0)
    small = {"item_dim": 16, "max_seq_length": 30, "num_layers": 2, "num_heads": 2, "dropout": 0.5}
    return SASRec(SASRec.Config(**(small | flags)), data.training_part())


def make_sequences(users: int = 60, num_items: int = 40, seed: int = 0, low: int = 3, high: int = 12) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, users)
    items = np.concatenate([rng.permutation(num_items)[:n] + 1 for n in lengths]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    attributes = np.array([[i, a] for i in range(1, num_items + 1) for a in range(1, 6) if i % (a + 1) == 1], np.int32)
    return Sequences("synthetic", items, offsets, num_items, np.arange(users), "0" * 64, attributes=attributes)


def control_groups(root: Path, groups: str, files: dict[str, str]) -> None:
    """What Linux tells a process of its control groups: /proc/self/cgroup, and files under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


TITLES = {1: 'The "quoted", one; with\u2028a line', 2: "Ünïcödé\u0085", 3: ""}


def tiny_sources(place: Path, layers: int = 2) -> Path:
    """A dataset, an item table and a base model, all tiny, in `place`."""
    data = make_sequences(users=30)
    (place / "data").mkdir()
    np.save(place / "data" / "items.npy", data.items)
    np.save(place / "data" / "offsets.npy", data.offsets)
    fingerprint = fingerprint_of(data.items, data.offsets, data.num_items)
    np.save(place / "data" / "attributes.npy", data.attributes)
    info = {"name": "kill", "items": data.num_items, "fingerprint": fingerprint}
    info |= {"attributes": 5, "attributes_fingerprint": attributes_fingerprint(data.attributes)}
    (place / "data" / "dataset.json").write_text(json.dumps(info))
    rows = ["item_id\ttitle", *(f"id{n}\t{TITLES.get(n, f'Film {n}')}" for n in range(1, data.num_items + 1))]
    (place / "data" / "items.tsv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (place / "table").mkdir()
    table = torch.randn(data.num_items + 1, 8)
    save_file({"item_table": table}, place / "table" / "item_embeddings.safetensors")
    config = {"kind": "item_embeddings", "dataset_fingerprint": fingerprint, "item_dim": 8}
    config["table_sha256"] = files.sha256(place / "table" / "item_embeddings.safetensors")
    (place / "table" / "config.json").write_text(json.dumps(config))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": layers}
    AutoModel.from_config(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes)).save_pretrained(place / "base")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "a": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place / "base")
    return place


def last_of_each(words: Iterable) -> list[str]:
    """The words of a command line, each flag once with its last value: scripts refuse a flag that is given twice."""
    flags: dict[str, list[str]] = {}
    for word in map(str, words):
        if word.startswith("--"):
            name = word.partition("=")[0]
            flags[name] = []
        flags[name].append(word)
    return [word for part in flags.values() for word in part]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the checks of records unless -m names them: a -m of the command line replaces one in addopts."""
    if "records" not in config.getoption("markexpr"):
        records = [item for item in items if item.get_closest_marker("records")]
        items[:] = [item for item in items if item not in records]
        config.hook.pytest_deselected(items=records)


@pytest.fixture
def sequences() -> Sequences:
    return make_sequences()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps precision and devices in a process-wide singleton."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
