"""evaluate.py --layers: direct inference from each layer (the paper's Figure 2) against a plain loop."""

import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences, tiny_llm_rec
from kills import contents, step
from test_fusion import refused
from test_kill import sources  # noqa: F401
from test_llm_rec import plain_states
from test_logit_distillation import SMALL
from transformers import AutoModel, LlamaConfig

import distill
import evaluate
import finetune
import recommend
import train_sr_trad
from utils import cli, metrics
from utils.candidates import draw_negatives
from utils.checked import read_json
from utils.data import Sequences, split_examples
from utils.files import write_json
from utils.metrics import rank_each, rank_users
from utils.report import closing_table, flatten

LENGTH = 6
BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def place(sources, tmp_path_factory) -> Path:  # noqa: F811
    """Two teachers of four layers, one per read-out, a student of one of them, and SASRec."""
    place = tmp_path_factory.mktemp("outputs") / "kill"
    shutil.copytree(sources / "base", place / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
    base = AutoModel.from_config(LlamaConfig(vocab_size=8, **sizes))
    torch.nn.init.normal_(base.norm.weight)  # with ones, as it starts, the final norm would move no rank
    base.save_pretrained(place / "base")
    flags = ["--base_model", place / "base", "--item_embeddings", sources / "table", "--num_layers", 4]
    flags += ["--lora_r", 2, "--max_seq_length", LENGTH, "--learning_rate", 0.05, "--warmup_steps", 0]
    for read_out in ("response", "item"):
        step(finetune, "teacher", sources, *flags, "--read_out", read_out, "--output_dir", place / read_out)
    alone = [word for name in ("cos", "norm", "ms") for word in (f"--lambda_{name}", 0)]
    flags = ["--teacher", place / "item", "--num_layers", 2, "--num_blocks", 1, *alone]
    step(distill, "student", sources, *flags, "--output_dir", place / "student")
    step(train_sr_trad, "sr", sources, *SMALL, "--output_dir", place / "sasrec")
    return place


def run(*words: object) -> None:
    cli.run(evaluate.main, None, [str(word) for word in words])


def by_layer(place: Path, sources: Path, name: str, *more) -> tuple[dict, dict]:  # noqa: F811
    folder = place / f"{name}-layers"
    run("--run", place / name, "--dataset", sources / "data", "--output_dir", folder, *more)
    return tuple(read_json(folder / f"{name}.json", "") for name in ("config", "metrics"))


def plain_metrics(ranks: list[int]) -> dict[str, float]:
    found = {f"HR@{k}": sum(rank < k for rank in ranks) for k in (1, 5, 10)}
    found |= {f"NDCG@{k}": sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) for k in (5, 10)}
    found["MRR"] = sum(1 / (rank + 1) for rank in ranks)
    return {name: value / len(ranks) for name, value in found.items()}


@pytest.mark.parametrize(("name", "split"), [("response", "test"), ("item", "valid")])
def test_the_metrics_of_each_layer_are_those_of_transformers_hidden_states(name, split, place, sources):  # noqa: F811
    """One user after the other, left-padded, adapters not merged, scores in float64 on NumPy."""
    how = ["--split", split, "--negatives", 9, "--candidate_seed", 5, "--eval_batch_size", 7]
    config, found = by_layer(place, sources, name, "--layers", "all", *how)
    assert list(found["layers"]) == ["1", "2", "3", "4"] and config["layers"] == [1, 2, 3, 4]
    data, model = Sequences.load(sources / "data"), recommend.load(place / name).model
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    negatives, back = draw_negatives(data, split, 9, 5), {"valid": 2, "test": 1}[split]
    score, table = model.score.weight.detach().double().numpy(), model.table.double().numpy()
    ranks = {(layer, kind): [] for layer in range(1, 5) for kind in ("sampled", "full")}
    for row, user in enumerate(data.users):
        whole = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        seen, target = whole[:-back], whole[-back]
        with torch.no_grad():
            states = plain_states(model, [seen[-LENGTH:]], LENGTH)
        for layer in range(1, 5):
            scores = table @ (score @ states[layer][0, -1].double().numpy())
            others = set(range(1, data.num_items + 1)) - set(seen) - {target}
            ranks[layer, "full"].append(sum(scores[item] >= scores[target] for item in others))
            ranks[layer, "sampled"].append(sum(scores[item] >= scores[target] for item in negatives[row] if item))
    for (layer, kind), values in ranks.items():
        assert found["layers"][str(layer)][kind] == pytest.approx(plain_metrics(values)), (layer, kind)
    assert len({str(layer) for layer in found["layers"].values()}) == 4, "layers differ"


@pytest.mark.parametrize("name", ["response", "item", "student"])
def test_the_last_layer_is_the_run_itself_and_all_come_from_one_pass(name, place, sources, capsys, monkeypatch):  # noqa: F811
    depth, passes, load = 2 if name == "student" else 4, [], recommend.load

    def counted(folder):
        trained = load(folder)
        trained.model.base.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
        return trained

    monkeypatch.setattr(evaluate, "load", counted)
    batches = ["--eval_batch_size", 8]
    run("--run", place / name, "--dataset", sources / "data", *batches)
    alone, own = len(passes), read_json(place / name / "metrics.json", "")["test"]
    capsys.readouterr()
    config, found = by_layer(place, sources, name, "--layers", f"1,{depth}", *batches)
    printed = capsys.readouterr().out.splitlines()
    assert len(passes) == 2 * alone and found["layers"][str(depth)] == own != found["layers"]["1"]
    assert config["layers"] == [1, depth] and [row.split()[1] for row in printed[2:4]] == ["1", str(depth)]
    values = [own[kind][metric] for kind in ("sampled", "full") for metric in ("HR@10", "NDCG@10", "MRR")]
    assert printed[3].replace("|", " ").split() == [str(depth), *(f"{value:.4f}" for value in values)]
    assert printed[0].replace("|", " ").split()[:3] == ["test,", "layer", "HR@10"]


@pytest.mark.parametrize("autocast", [nullcontext, BFLOAT16])
def test_in_blocks_of_users_and_in_bfloat16_the_ranks_are_the_models_own(autocast, monkeypatch):
    data, model, sizes = make_sequences(users=100), tiny_llm_rec(num_layers=3).eval(), []
    negatives = draw_negatives(data, "test", num=19)
    options = {"max_length": 30, "batch_size": 100, "autocast": autocast}
    own, _ = rank_users(model, data, "test", negatives, **options)
    rank_block = metrics.rank_block
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(metrics, "rank_block", lambda *a: sizes.append(len(a[0])) or rank_block(*a))
    blocks = partial(model.layer_score_blocks, [1, 3])
    (first, last), _ = rank_each(model, blocks, 2, data, "test", negatives, **options)
    assert sizes == [16] * 12 + [4] * 2
    assert all((last[kind] == own[kind]).all() and (first[kind] != own[kind]).any() for kind in own)
    batch = split_examples(data, "test", 30).batch(np.arange(100))
    with torch.inference_mode(), autocast():
        _, scores = next(model.layer_score_blocks([2], batch["histories"], batch["users"], 5))
        assert {(tuple(of_layer.shape), of_layer.dtype) for of_layer in scores} == {((5, 41), torch.float32)}


def test_the_record_says_what_was_measured_and_is_no_run(place, sources, capsys):  # noqa: F811
    fingerprint = read_json(sources / "data/dataset.json", "")["fingerprint"]
    before = closing_table(place, fingerprint)
    config, found = by_layer(place, sources, "item", "--layers", "2,3", "--split", "valid", "--candidate_seed", 5)
    folder, measured = place / "item-layers", read_json(place / "item/config.json", "")
    assert set(contents(folder)) == {"config.json", "metrics.json"}
    assert config == {
        "kind": "layers",
        "title": "Teacher-4, by layer",
        "run": str(place / "item"),
        "layers": [2, 3],
        "output_dir": str(folder),
        **{name: measured[name] for name in ("run_id", "dataset", "dataset_fingerprint")},
    }
    assert set(found) == {"layers", "split", "protocol", "environment", "seconds", "run_id"}
    assert found["split"] == "valid" and found["seconds"] > 0 and found["environment"]["git_commit"]
    assert found["protocol"]["sampled"].endswith("seed 5") and found["protocol"]["max_seq_length"] == LENGTH
    assert len(flatten(found["layers"])) == 2 * 2 * 6 and list(found["layers"]) == ["2", "3"]
    again, _ = by_layer(place, sources, "item", "--layers", "4")
    assert again["layers"] == [4], "a record replaces an earlier one"
    assert closing_table(place, fingerprint) == before and "layers" not in before


REFUSED = [
    *((f"--layers {text}", "expected all, or numbers of layers from 1, as in 1,2,4") for text in ("x", "1-3", "-1")),
    *((f"--layers={text}", "numbers of layers from 1") for text in ("-1", "1.5", "1,,2", "first", "1;2", "²")),
    *((f"--layers {text}", "has 4 layers; choose from 1..4, as in 1,2,4, or all") for text in ("0", "5", "0,1", "1,9")),
    ("--layers 1,1", "layers ascend, each once, as in 1"),
    ("--layers 4,1", "layers ascend, each once, as in 1,4"),
    ("--layers 99999999999", "numbers of layers from 1"),
    ("--layers", "--layers needs a value"),
    ("--layers= ", "numbers of layers from 1"),
    ("--layers all --run {0}/sasrec", "{0}/sasrec is no run of finetune.py or distill.py"),
    ("--layers all --run {0}/fusion", "{0}/fusion is no run of finetune.py or distill.py"),
    ("--layers all --run {0}/none", "{0}/none holds no finished run"),
    ("--layers all --run {0}/unfinished", "{0}/unfinished holds no finished run"),
    ("--layers all --run {0}/record", "{0}/record is no run of finetune.py or distill.py"),
    ("--run {0}/record", "{0}/record is what evaluate.py --layers measured of {0}/item: give that"),
    ("--fuse {0}/record", "is a layers: give a run of a training script"),
    ("--layers all --fuse {0}/sasrec", "leave one of them out"),
    ("--layers 9 --fuse {0}/sasrec --split valid", "leave one of them out"),
    ("--output_dir {0}/new", "add --fuse or --layers"),
    ("--layers all --output_dir {0}/item", "holds something else"),
    ("--layers all --output_dir {0}/fusion", "holds something else"),
    ("--layers all --output_dir {0}/strange", "holds something else (config.json)"),
    ("--layers all --output_dir {0}/notes", "holds something else"),
    ("--layers all --output_dir {0}/item/log.jsonl", "is a file"),
    ("--layers all --dataset {0}/none", "{0}/none"),
    ("--layers all --eval_batch_size 0", ">= 1"),
    ("--fuse {0}/sasrec --output_dir {0}/record", "holds something else"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(words, told, place, sources, capsys):  # noqa: F811
    kinds = {"fusion": "fusion", "record": "layers", "strange": "teacher", "unfinished": "teacher"}
    for name, kind in kinds.items():
        (place / name).mkdir(exist_ok=True)
        config = read_json(place / "item/config.json", "")
        config |= {"kind": kind, "run_ids": [], "run": str(place / "item")}
        write_json(config, place / name / "config.json")
        if name in ("fusion", "record"):
            shutil.copy(place / "item/metrics.json", place / name)
    shutil.copy(place / "item/items.jsonl", place / "fusion")
    (place / "notes").mkdir(exist_ok=True)
    (place / "notes/notes.txt").touch()
    argv = words.format(place).split(" ") if words != "--layers= " else [words]
    refused(place, sources, capsys, argv, "item", told.format(place))
