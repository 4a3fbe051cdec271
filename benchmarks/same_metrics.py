"""Do the fast computations move a metric? The four steps with everything on, and with everything off.

    python benchmarks/same_metrics.py                          the default pipeline without dropout
    python benchmarks/same_metrics.py --dropout --seeds 1 2 3 --out FILE
    python benchmarks/same_metrics.py --dropout --seeds 1 2 3 --teacher outputs/seed{}/teacher-8 --out FILE

Off: each target has a copy of its history, padded to its full length between prompt and response, which runs through
all layers as transformers computes it (`LLMRec.plain_states`); adapters stay apart at inference; losses, ranks and
SASRec's batches are computed in one piece. Batches, seeds and candidates are the same: without dropout only
rounding differs, and what training makes of it. With dropout (SASRec's as in the recipe, the adapters' 0.05), off is
torch's own dropout too: other noise, so only means over seeds can be compared. All pipelines together use the CPU's
cores, --jobs of them at a time. With --teacher the student alone is compared: both of a seed learn from that trained
teacher ({} stands for the seed), whose kept states they share.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import extract_emb
import finetune
import train_sr_trad
from models import losses
from models.dropout import Dropout
from models.llm.recommender import PLAIN, LLMRec
from models.sr import MODELS, objectives
from models.sr.sasrec import SASRec
from utils import cli, metrics
from utils.cli import ROOT
from utils.files import read_json, write_json
from utils.metrics import SPLITS
from utils.report import environment, flatten, markdown_table

STEPS = {
    "train_sr_trad": (train_sr_trad, "sr"),
    "extract_emb": (extract_emb, "extract"),
    "finetune": (finetune, "teacher"),
    "distill": (distill, "student"),
}


def switch_off(with_dropout: bool) -> ExitStack:
    """Replace each fast computation by the plain one, until what is returned (a context manager) is closed."""
    trimmed = SASRec.states

    def sasrec_states(self: SASRec, histories: torch.Tensor) -> torch.Tensor:
        missing = self.max_length - histories.shape[1]
        return trimmed(self, F.pad(histories, (missing, 0)))[:, missing:]

    plain = [(SASRec, "states", sasrec_states), (LLMRec, "fast", PLAIN)]
    plain += [(losses, "LOGITS_AT_ONCE", 2**62), (metrics, "SCORES_AT_ONCE", 2**62), (objectives, "GROUP", 2**62)]
    if with_dropout:
        plain += [(Dropout, "forward", nn.Dropout.forward)]
    with ExitStack() as replaced:
        for owner, name, by in plain:
            replaced.enter_context(patch.object(owner, name, by))
        return replaced.pop_all()


def run_pipeline(
    steps: list[str], off: bool, dropout: bool, seed: int, threads: int, teacher: str | None
) -> dict[str, dict]:
    """Each step in a process of its own; returns the metrics of those that train."""
    how = (["--off"] if off else []) + (["--dropout"] if dropout else [])
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        dropouts = ["--lora_dropout", "0.05" if dropout else "0"]
        dropouts += [] if dropout else ["--item_dropout", "0", "--state_dropout", "0"]
        wiring = {
            "train_sr_trad": [] if dropout else ["--dropout", "0"],
            "extract_emb": ["--sr_dir", place / "train_sr_trad"],
            "finetune": ["--item_embeddings", place / "extract_emb", *dropouts],
            "distill": ["--teacher", teacher or place / "finetune", *dropouts],
        }
        for step in steps:
            more = wiring[step] + ([] if step == "extract_emb" else ["--seed", seed])
            command = [sys.executable, __file__, "--run", step, *how, "--", *more, "--output_dir", place / step]
            subprocess.run([str(part) for part in command], check=True, env=env)
        return {step: read_json(place / step / "metrics.json", "") for step in steps if step != "extract_emb"}


def compare(on: dict, off: dict) -> dict[str, float]:
    """Differences of all metrics of two runs, by split, kind of ranking and name."""
    on, off = ({split: run[split] for split in SPLITS} for run in (on, off))
    return {name: value - flatten(off)[name] for name, value in flatten(on).items()}


def table(record: dict) -> str:
    """NDCG@10, mean and standard deviation over the seeds, and the largest difference (on - off) of any metric."""
    kinds = {"test": "test/sampled", "test, full": "test/full", "valid": "valid/sampled", "valid, full": "valid/full"}
    header = ["NDCG@10", "test, on", "off", *(f"{name}: on - off" for name in kinds), "differs most"]
    rows = []
    for step in dict.fromkeys(run["step"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["step"] == step]
        cells = [over_seeds([run[how]["sampled"]["NDCG@10"] for run in runs], "") for how in ("on", "off")]
        cells += [over_seeds([run["differences"][f"{kind}/NDCG@10"] for run in runs], "+") for kind in kinds.values()]
        largest = max((d for run in runs for d in run["differences"].items()), key=lambda d: abs(d[1]))
        rows.append([step, *cells, f"{largest[0]} {largest[1]:+.1e}"])
    return markdown_table(header, rows)


def over_seeds(values: list[float], sign: str) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dropout", action="store_true", help="with dropout, over several seeds")
    parser.add_argument("--until", choices=STEPS, default="distill", help="the last step that is run")
    parser.add_argument("--teacher", help="folder of a trained teacher, {} for the seed: compare distill.py alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "same_metrics.json")
    parser.add_argument("--jobs", type=int, default=2, help="pipelines at a time; the CPU's cores are shared out")
    parser.add_argument("--run", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--off", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        step, section = STEPS[args.run]
        with switch_off(args.dropout) if args.off else nullcontext():
            cli.run(step.main, section=section, argv=args.flags, models=MODELS)
        return
    if args.flags:
        parser.error(f"unknown: {' '.join(args.flags)}")
    steps, runs = list(STEPS)[: list(STEPS).index(args.until) + 1], []
    teachers = {seed: args.teacher and args.teacher.format(seed) for seed in args.seeds}
    if args.teacher:
        steps = ["distill"]
        lacking = [folder for folder in teachers.values() if not Path(folder, "metrics.json").exists()]
        if lacking:
            parser.error(f"--teacher: {lacking[0]} holds no finished teacher; make it with finetune.py")
    threads = max(1, torch.get_num_threads() // args.jobs)
    found_here = environment(Accelerator(cpu=not torch.accelerator.is_available())) | {"threads": threads}
    pool = ThreadPoolExecutor(args.jobs)
    try:
        started = [
            [
                pool.submit(run_pipeline, steps, off, args.dropout, seed, threads, teachers[seed])
                for off in (False, True)
            ]
            for seed in args.seeds
        ]
        for seed, pair in zip(args.seeds, started, strict=True):
            on, off = (pipeline.result() for pipeline in pair)
            for step in on:
                both = {"on": on[step]["test"], "off": off[step]["test"]}
                differences = compare(on[step], off[step])
                runs.append({"seed": seed, "step": step, "differences": differences, **both})
                largest = max(differences, key=lambda metric: abs(differences[metric]))
                print(f"seed {seed}, {step}: {largest} differs most, {differences[largest]:+.2e}", flush=True)
            write_json({"runs": runs, "dropout": args.dropout, "environment": found_here}, args.out)
    finally:
        pool.shutdown(cancel_futures=True)
    print(table(read_json(args.out, "")))


if __name__ == "__main__":
    main()
