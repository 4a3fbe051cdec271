"""A kill before every file-system event of a small run: the next start ends as if nothing had happened."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences
from kills import contents, snapshots
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

import finetune
import train_sr_trad
from models.sr import MODELS
from utils import cli, files, report
from utils.errors import UserError

TITLES = {1: 'The "quoted", one; with\u2028a line', 2: "Ünïcödé\u0085", 3: ""}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A dataset, an item table and a base model, all tiny."""
    place = tmp_path_factory.mktemp("kill")
    data = make_sequences(users=30)
    (place / "data").mkdir()
    np.save(place / "data" / "items.npy", data.items)
    np.save(place / "data" / "offsets.npy", data.offsets)
    info = {"name": "kill", "items": data.num_items, "fingerprint": data.fingerprint}
    (place / "data" / "dataset.json").write_text(json.dumps(info))
    rows = ["item_id\ttitle", *(f"id{n}\t{TITLES.get(n, f'Film {n}')}" for n in range(1, data.num_items + 1))]
    (place / "data" / "items.tsv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (place / "table").mkdir()
    table = torch.randn(data.num_items + 1, 8)
    save_file({"item_table": table}, place / "table" / "item_embeddings.safetensors")
    config = {"kind": "item_embeddings", "dataset_fingerprint": data.fingerprint, "item_dim": 8}
    config["table_sha256"] = files.sha256(place / "table" / "item_embeddings.safetensors")
    (place / "table" / "config.json").write_text(json.dumps(config))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    AutoModel.from_config(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(place / "base")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "a": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place / "base")
    return place


def step(script, section: str, sources: Path, *flags: object) -> None:
    common = ["--dataset", sources / "data", "--max_steps", 4, "--eval_steps", 2, "--batch_size", 8]
    main = script.main
    main(**cli.resolve(main, section, [str(word) for word in (*common, *flags)], models=MODELS))


EARLY = "--max_steps 6 --patience 1 --learning_rate 1 --warmup_steps 0"  # too high a rate: it stops after 4 steps
STEPS = {
    "train_sr_trad": (train_sr_trad, "sr", f"--item_dim 8 --num_layers 1 {EARLY}"),
    "finetune": (finetune, "teacher", "--base_model {0}/base --item_embeddings {0}/table --num_layers 2 --lora_r 2"),
}


def outcome(folder: Path) -> tuple:
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}
    return {split: metrics[split] for split in ("valid", "test")}, weights


@pytest.fixture(params=STEPS)
def start(request, sources, monkeypatch) -> Callable:
    """start(place, seed, resume): one of the steps, its run in place/run."""
    script, section, own = STEPS[request.param]
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda self, path, **how: Path(path).write_bytes(b"a figure"))

    def one(place: Path, seed: int, resume: str) -> None:
        flags = [*own.format(sources).split(), "--seed", seed, "--resume", resume, "--output_dir", place / "run"]
        step(script, section, sources, *flags)
        assert json.loads((place / "run" / "metrics.json").read_text())["stopped_early"] == (EARLY in own)

    return one


def test_a_kill_at_any_moment_of_a_fresh_run_is_survived(start, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    copies = snapshots(place, tmp_path / "copies", lambda: start(place, 2, "auto"))
    assert len(copies) > 25
    for copy in copies:
        start(copy, 2, "auto")
        assert outcome(copy / "run") == outcome(place / "run"), copy
        assert set(contents(copy)) == set(contents(place)), copy


def test_a_kill_at_any_moment_of_a_replacement_is_survived(start, tmp_path):
    start(tmp_path / "alone", 2, "never")
    wanted = outcome(tmp_path / "alone" / "run")
    place = tmp_path / "place"
    start(place, 1, "never")
    earlier, earlier_files = outcome(place / "run"), contents(place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(place, 2, "never"))
    assert outcome(place / "run") == wanted != earlier and len(copies) > 30
    untouched = 0
    for number, copy in enumerate(copies):
        try:
            start(copy, 2, "never" if number % 8 == 7 else "auto")
        except UserError as error:  # not replaced yet: the earlier run is there, whole, and says how to go on
            assert "--resume never to replace it" in str(error)
            assert earlier_files.items() <= contents(copy).items()
            untouched += 1
            start(copy, 2, "never")
        assert outcome(copy / "run") == wanted, copy
        assert set(contents(copy)) == set(contents(place)), copy
    assert 1 <= untouched <= 3
