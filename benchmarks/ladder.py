"""From the paper's way to the best that was found, one switch at a time, over seeds: the ladder of docs/results.md.

    python benchmarks/ladder.py --dataset beauty --seeds 1 2 3
    python benchmarks/ladder.py --dataset beauty --seeds 42 --rows SASRec teacher student

Each row is a run of a script with the dataset's recipe and a few flags, in outputs/<dataset>/ladder/; a run that is
finished is left alone, one that was interrupted goes on, and one of other flags is refused. The record holds flags,
commit and metrics of every run, and for pairs of rows the difference over the users of test with its interval.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.same_metrics import over_seeds
from utils.cli import ROOT
from utils.files import load_tensors, read_json, write_json
from utils.metrics import SPLITS, paired_bootstrap
from utils.report import environment, markdown_table

STILL = {"item_dropout": 0, "state_dropout": 0, "lambda_kl": 0}
PAPER = STILL | {"read_out": "response", "train_targets": "last"}
# the terms of the student's loss, one after the other; L_ms needs no teacher
NONE = {"lambda_cos": 0, "lambda_norm": 0, "lambda_ms": 0, "lambda_kl": 0}
TERMS = {
    "without any teacher": NONE,
    "L_ms alone": NONE | {"lambda_ms": 0.1},
    "hidden states and L_ms": {"lambda_cos": 1, "lambda_norm": 0.01, "lambda_ms": 0.1, "lambda_kl": 0},
    "logits alone": NONE | {"lambda_kl": 1},
}
# one switch beside the recipe's "teacher"; how the recipe's own values were chosen: docs/log.md
SWITCHES = {
    "normalize_items": {"normalize_items": "true"},
    "input_map mlp": {"input_map": "mlp"},
    "item_output residual": {"item_output": "residual"},
    "item_output trained": {"item_output": "trained"},
    "weight_decay .1": {"weight_decay": 0.1},
    "LoRA on all linear maps": {"lora_target_modules": "all-linear"},
    "LoRA on down_proj alone": {"lora_target_modules": "down_proj"},
}


@dataclass(frozen=True)
class Row:
    """A run: its script, the rows whose runs it reads, and flags beside the recipe's."""

    script: str
    reads: tuple[str, ...] = ()
    flags: dict[str, object] = field(default_factory=dict)


ROWS = {
    "SASRec": Row("train_sr_trad"),
    "item table": Row("extract_emb", ("SASRec",)),
    "teacher, the paper's way": Row("finetune", ("item table",), PAPER),
    "student, the paper's way": Row("distill", ("teacher, the paper's way",)),
    "teacher, read at items": Row("finetune", ("item table",), PAPER | {"read_out": "item"}),
    "teacher, at every position": Row("finetune", ("item table",), STILL),
    "teacher": Row("finetune", ("item table",)),
    "teacher without SASRec's logits": Row("finetune", ("item table",), {"lambda_kl": 0}),
    **{f"teacher, {name}": Row("finetune", ("item table",), flags) for name, flags in SWITCHES.items()},
    "student": Row("distill", ("teacher",)),
    **{f"student, {name}": Row("distill", ("teacher",), flags) for name, flags in TERMS.items()},
    "student, logits of SASRec": Row("distill", ("teacher", "SASRec")),
    "student + SASRec": Row("evaluate", ("student", "SASRec")),
    "table of titles": Row("extract_emb", (), {"text": "titles"}),
    "teacher with titles": Row("finetune", ("item table", "table of titles")),
    "student with titles": Row("distill", ("teacher with titles",)),
    "student with titles + SASRec": Row("evaluate", ("student with titles", "SASRec")),
    "SASRec from titles": Row("train_sr_trad", ("table of titles",)),
    "item table from titles": Row("extract_emb", ("SASRec from titles",)),
    "teacher from titles": Row("finetune", ("item table from titles",)),
    "student from titles": Row("distill", ("teacher from titles",)),
    "student + SASRec, from titles": Row("evaluate", ("student from titles", "SASRec from titles")),
}
READS = {"train_sr_trad": ["--init_items"], "extract_emb": ["--sr_dir"], "finetune": ["--item_embeddings"]}
READS |= {"distill": ["--teacher", "--kl_teacher"], "evaluate": ["--run", "--fuse"]}
PAIRS = [("teacher", "SASRec"), ("student", "SASRec"), ("student", "teacher")]
PAIRS += [("student", "student, without any teacher"), ("student with titles + SASRec", "SASRec")]
PAIRS += [("student, logits of SASRec", "SASRec"), ("teacher", "teacher without SASRec's logits")]
PAIRS += [(f"{name} from titles", "SASRec from titles") for name in ("teacher", "student")]
PAIRS += [("student from titles", "teacher from titles"), ("student + SASRec, from titles", "SASRec from titles")]


def folder_of(dataset: str, row: str, seed: int) -> Path:
    return Path("outputs") / dataset / "ladder" / f"{re.sub('[^a-z0-9]+', '-', row.lower()).strip('-')}-seed{seed}"


def run_row(dataset: str, name: str, seed: int) -> Path:
    """Run a row, and before it the rows that it reads; returns its folder."""
    row, folder = ROWS[name], folder_of(dataset, name, seed)
    command = [f"{row.script}.py", "--dataset", dataset, "--output_dir", folder]
    if row.script not in ("extract_emb", "evaluate"):
        command += ["--seed", seed, "--resume", "auto"]
    read = [str(run_row(dataset, other, seed)) for other in row.reads]
    if row.script == "finetune":  # several tables side by side
        read = [",".join(read)]
    command += [word for pair in zip(READS.get(row.script, []), read, strict=False) for word in pair]
    command += [word for flag, value in row.flags.items() for word in (f"--{flag}", value)]
    if row.script != "evaluate" or not is_of(folder, read):  # the others know themselves what is finished
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    return folder


def is_of(folder: Path, parts: list[str]) -> bool:
    """Whether a fusion is there, of these runs as they are now."""
    if not (ROOT / folder / "metrics.json").exists():
        return False
    ids = [read_json(ROOT / part / "config.json", "")["run_id"] for part in parts]
    return read_json(ROOT / folder / "config.json", "")["run_ids"] == ids


def differences(dataset: str, seeds: list[int]) -> list[dict]:
    """Of each pair of rows the mean difference of NDCG@10 over all users of all seeds that both have, with interval."""
    found = []
    for pair in PAIRS:
        gains = []
        for seed in seeds:
            files = [ROOT / folder_of(dataset, name, seed) / "ranks.safetensors" for name in pair]
            if all(path.exists() for path in files):
                ours, theirs = (load_tensors(path) for path in files)
                gains.append({kind: (ours[f"test_{kind}"], theirs[f"test_{kind}"]) for kind in ("sampled", "full")})
        for kind in ("sampled", "full") if gains else ():
            a, b = (torch.cat([gain[kind][side] for gain in gains]).numpy() for side in (0, 1))
            mean, low, high = paired_bootstrap(a, b, clusters=len(gains))
            found.append({"pair": pair, "ranking": kind, "seeds": len(gains), "mean": mean, "low": low, "high": high})
    return found


def table(record: dict) -> str:
    """NDCG@10 of each row, mean and standard deviation over its seeds."""
    rows: dict[str, list[dict]] = {}
    for run in record["runs"]:
        rows.setdefault(run["row"], []).append(run)
    header = ["NDCG@10", "seeds", "valid, full", "test, full", "test, sampled", "full HR@10", "s/epoch"]
    cells = []
    for name, runs in rows.items():
        figures = [
            [run[split][kind]["NDCG@10"] for run in runs] for split, kind in (("valid", "full"), ("test", "full"))
        ]
        figures += [[run["test"]["sampled"]["NDCG@10"] for run in runs], [run["test"]["full"]["HR@10"] for run in runs]]
        seconds = [run["seconds"]["train_epoch"] for run in runs if "train_epoch" in run["seconds"]]
        seconds = f"{np.mean(seconds):.0f}" if seconds else "-"
        cells.append([name, str(len(runs)), *(over_seeds(values, "") for values in figures), seconds])
    return markdown_table(header, cells)


def difference_table(record: dict) -> str:
    """Differences between pairs of rows, with intervals of 95 % over users."""
    cells = [
        [
            " - ".join(d["pair"]),
            d["ranking"],
            str(d["seeds"]),
            f"{d['mean']:+.4f}",
            f"{d['low']:+.4f} .. {d['high']:+.4f}",
        ]
        for d in record["differences"]
    ]
    return markdown_table(["test NDCG@10", "ranking", "seeds", "difference", "95 % interval"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="beauty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    out = ROOT / "results" / "benchmarks" / f"ladder-{args.dataset}.json"
    for seed in args.seeds:
        for name in args.rows:
            run_row(args.dataset, name, seed)
    runs = []
    folders = ROOT / "outputs" / args.dataset / "ladder"
    for name in ROWS:
        for path in sorted(folders.glob(f"{folder_of(args.dataset, name, 0).name[:-1]}*/metrics.json")):
            run = read_json(path, "")
            kept = {part: run[part] for part in ("environment", "seconds", "parameters", *SPLITS)}
            config = read_json(path.parent / "config.json", "")
            runs.append({"row": name, "seed": int(path.parent.name.rpartition("seed")[2]), "config": config, **kept})
    seeds = sorted({run["seed"] for run in runs})
    measured = environment(Accelerator(cpu=not torch.accelerator.is_available()))
    record = {"runs": runs, "differences": differences(args.dataset, seeds), "environment": measured}
    write_json(record, out)
    print(table(record), difference_table(record), out, sep="\n\n")


if __name__ == "__main__":
    main()
