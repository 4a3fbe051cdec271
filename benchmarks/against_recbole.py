"""SASRec and GRU4Rec beside RecBole's, on the same sequences: quality on one dataset, seconds per epoch on another.

    python -m venv other && other/bin/pip install torch==2.13.0 "numpy<2" "pandas<3" tqdm scipy scikit-learn pyyaml \\
        tensorboard thop tabulate texttable psutil colorlog==4.7.2 colorama==0.4.4
    other/bin/pip install --no-deps recbole==1.2.1
    python benchmarks/against_recbole.py quality --python other/bin/python --dataset beauty
    python benchmarks/against_recbole.py speed --python other/bin/python --dataset ml-1m

RecBole runs in that environment (`recbole/theirs.py`), never in ours. Equal on both sides: widths, layers, heads,
dropout, cross-entropy over all items, every position a target, newest items kept, Adam at a constant rate, about as
many targets per step, and for quality the epoch with the best NDCG@10 on validation, with patience. RecBole makes one
sample of each target; here a user's targets share one history. Test ranks of both are in the full ranking, with seen
items masked. For speed, steps of both are measured in turn, `--repeats` times; an epoch is the median step times the
steps.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import check_dataset, command_line, count, run_main
from benchmarks.llm_step import ours_loss, training_step
from models.sr import MODELS
from utils.assets import dataset_folder
from utils.checked import load_tensors, read_json
from utils.cli import ROOT
from utils.data import Sequences, shuffled_batches, training_examples
from utils.experiments import pack, unpack
from utils.files import write_json
from utils.metrics import RANKS_FILE, metrics_from_ranks, paired_bootstrap
from utils.report import environment, markdown_table

THEIRS = Path(__file__).parent / "recbole" / "theirs.py"
LENGTH = {"quality": 20, "speed": 200}
TARGETS = 512  # of one step, on average
# what is read is scaled here, normalised there
OURS = {"item_dim": 64, "num_layers": 2, "num_heads": 2, "dropout": 0.5, "scale_items": True}
THEIR_SASREC = {"hidden_size": 64, "inner_size": 64, "n_layers": 2, "n_heads": 2}
THEIR_SASREC |= {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5}
SETTINGS = {  # our model and its flags, RecBole's
    "SASRec": ("sasrec", OURS, "SASRec", THEIR_SASREC),
    "SASRec as MTandHJ computes it": ("sasrec_original", OURS, "SASRec", THEIR_SASREC),
    "GRU4Rec": (
        "gru4rec",
        {"item_dim": 64, "hidden_dim": 64, "num_layers": 1, "dropout": 0.3},
        "GRU4Rec",
        {"embedding_size": 64, "hidden_size": 64, "num_layers": 1, "dropout_prob": 0.3},
    ),
}
LEARNING_RATE, EPOCHS, PATIENCE, STEPS = 0.001, 100, 10, 3
KNOWN: dict[str, dict] = {}  # RecBole's trained models of this run: two of ours may stand beside one of them


def theirs(args: argparse.Namespace, name: str, data: Sequences, folder: Path) -> dict:
    """RecBole's result: see `recbole/theirs.py`."""
    _, _, model, own = SETTINGS[name]
    if args.part == "quality" and model in KNOWN:
        return KNOWN[model]
    sequences = [data.items[data.offsets[user] : data.offsets[user + 1]].tolist() for user in data.users]
    write_json(sequences, folder / "sequences.json")
    settings = own | {
        "MAX_ITEM_LIST_LENGTH": LENGTH[args.part],
        "train_batch_size": TARGETS,
        "learning_rate": LEARNING_RATE,
        "epochs": EPOCHS,
        "stopping_step": PATIENCE,
        "seed": args.seed,
        "steps": STEPS,
    }
    mode = {"quality": "train", "speed": "time"}[args.part]
    # RecBole writes logs into the directory where it runs
    subprocess.run([args.python, THEIRS, mode, folder, model, json.dumps(settings)], check=True, cwd=folder)
    KNOWN[model] = read_json(folder / "result.json", "RecBole wrote no result")
    return KNOWN[model]


def users_per_step(data: Sequences, part: str) -> int:
    """So many that their targets are as many as RecBole's of a step."""
    examples = training_examples(data, "all", LENGTH[part])
    return max(1, round(TARGETS / float(examples.num_targets.mean())))


def quality(args: argparse.Namespace, name: str, data: Sequences, folder: Path) -> dict:
    """NDCG@10 of the test users in the full ranking, ours and RecBole's."""
    batch_size = users_per_step(data, "quality")
    steps = math.ceil(len(training_examples(data, "all", LENGTH["quality"])) / batch_size)
    model, own, *_ = SETTINGS[name]
    flags = own | {
        "dataset": args.dataset,
        "model": model,
        "loss": "ce",
        "num_negatives": 0,
        "train_targets": "all",
        "max_seq_length": LENGTH["quality"],
        "batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "num_epochs": EPOCHS,
        "eval_steps": steps,
        "patience": PATIENCE,
        "select_by": "full/NDCG@10",
        "seed": args.seed,
        "output_dir": folder / "ours",
    }
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    subprocess.run([sys.executable, ROOT / "train_sr_trad.py", *words], check=True)
    ours = read_json(folder / "ours" / "metrics.json", "training wrote no metrics")
    result = theirs(args, name, data, folder)
    of_both = [
        {"ours": ours[split]["full"]["NDCG@10"], "recbole": metrics_from_ranks(np.array(result[split]))["NDCG@10"]}
        for split in ("valid", "test")
    ]
    ranks = {"ours": load_tensors(folder / "ours" / RANKS_FILE)["test_full"].numpy(), "recbole": result["test"]}
    packed = {side: pack(np.array(found)) for side, found in ranks.items()}
    run = {"seed": args.seed, "valid": of_both[0], "test": of_both[1], "ranks": packed}
    return run | {"recbole_epochs": result["epochs"]}


def speed(args: argparse.Namespace, name: str, data: Sequences, folder: Path) -> dict:
    """Seconds per epoch, ours and RecBole's, from single steps of both in turn."""
    examples, batch_size = training_examples(data, "all", LENGTH["speed"]), users_per_step(data, "speed")
    torch.manual_seed(args.seed)
    kind, own = MODELS[SETTINGS[name][0]], SETTINGS[name][1]
    model = kind(kind.Config(max_seq_length=LENGTH["speed"], **own), data.training_part())
    index = shuffled_batches(len(examples), batch_size, args.seed, 0)
    seconds: dict[str, list[float]] = {"ours": [], "recbole": []}
    for repeat in range(args.repeats):
        for part in index[repeat * STEPS : (repeat + 1) * STEPS]:
            step = training_step(model, ours_loss, [model.batch(examples, part, np.random.default_rng(0))])
            if not seconds["ours"]:
                step()  # the first use of memory is not measured, nor RecBole's
            began = time.perf_counter()
            step()
            seconds["ours"].append(time.perf_counter() - began)
        result = theirs(args, name, data, folder)
        seconds["recbole"] += result["seconds"]
    steps = {"ours": len(index), "recbole": result["batches"]}
    epochs = {side: statistics.median(values) * steps[side] for side, values in seconds.items()}
    return {"epoch_seconds": epochs, "steps": steps, "batch_size": {"ours": batch_size, "recbole": TARGETS}}


def table(record: dict) -> str:
    rows = []
    for name in SETTINGS:
        if runs := record["quality"].get(name):
            values = {side: [run["test"][side] for run in runs] for side in ("ours", "recbole")}
            ours, other = (statistics.mean(of) for of in values.values())
            spread = [f" ± {statistics.stdev(of):.4f}" if len(of) > 1 else "" for of in values.values()]
            cells = [f"{statistics.mean(of):.4f}{plus}" for of, plus in zip(values.values(), spread, strict=True)]
            seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            what = f"{name}, full NDCG@10 on {record['datasets']['quality']}, {seeds}"
            ranks = [np.concatenate([unpack(run["ranks"][side]) for run in runs]) for side in ("ours", "recbole")]
            mean, low, high = paired_bootstrap(*ranks, clusters=len(runs))
            beside = f"{100 * (ours / other - 1):+.1f} %: {mean:+.4f}, interval {low:+.4f} to {high:+.4f}"
            rows.append([what, *cells, beside])
        for run in record["speed"].get(name, []):
            ours, other = (run["epoch_seconds"][side] for side in ("ours", "recbole"))
            cells = [f"{ours:,.1f}", f"{other:,.1f}", f"{other / ours:.0f} times as fast"]
            rows.append([f"{name}, seconds per epoch on {record['datasets']['speed']}", *cells])
    return markdown_table(["", "ours", "RecBole 1.2.1", "ours beside it"], rows)


def main() -> None:
    parser = command_line(__doc__, "against_recbole")
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("--python", required=True, help="of the environment that has RecBole")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--repeats", type=count, default=3, help="for speed")
    args = parser.parse_args()
    if (python := shutil.which(args.python)) is None:
        parser.error(f"--python {args.python}: no program of that name")
    args.python = Path(python).absolute()
    check_dataset(args, lambda record: record["datasets"].get(args.part, args.dataset))
    data, measure = Sequences.load(dataset_folder(args.dataset)), {"quality": quality, "speed": speed}[args.part]
    subprocess.run([args.python, "-c", "import recbole"], check=True, capture_output=True, encoding="utf-8")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            run = measure(args, name, data, Path(folder)) | {"environment": environment(Accelerator(cpu=True))}
        found = read_json(args.out, "") if args.out.exists() else {"quality": {}, "speed": {}, "datasets": {}}
        runs = [old for old in found[args.part].get(name, []) if args.part == "quality" and old["seed"] != args.seed]
        found[args.part][name] = [*runs, run]
        found["datasets"][args.part] = args.dataset
        write_json(found, args.out)
        print(table(found), flush=True)


if __name__ == "__main__":
    run_main(main)
