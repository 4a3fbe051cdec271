"""Do the fast computations move a metric? Teacher and student with everything on, and with everything off.

    python benchmarks/same_metrics.py                          the default pipeline, dropout off; step 2 must be done
    python benchmarks/same_metrics.py --steps finetune --num_epochs 0.25
    python benchmarks/same_metrics.py --steps finetune --num_epochs 0.25 --lora_dropout 0.05 --seeds 1 2 3

Off: every history is padded to its full length and has the prompt of its own, padding runs through all layers, every
position through the whole top layer, adapters stay apart at inference, losses and ranks are computed in one piece.
Several targets of a user share their history in both. Batches, seeds and candidates are the same: without dropout
only rounding differs, and what training makes of it. With dropout, off is torch's own dropout and batches of any
lengths too: other noise, so only means over seeds can be compared.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import finetune
from models import llm_rec, losses
from models.dropout import Dropout
from models.llm_rec import LLMRec
from utils import cli, metrics, train
from utils.checkpoint import read_json, write_json
from utils.cli import ROOT
from utils.metrics import SPLITS
from utils.report import environment
from utils.train import flatten

STEPS = {"finetune": (finetune, "teacher"), "distill": (distill, "student")}


def switch_off(with_dropout: bool) -> None:
    """Replace each fast computation by the plain one, in this process."""
    fast = LLMRec.states

    def states(self: LLMRec, histories: torch.Tensor, asked: torch.Tensor, ends: list[int]) -> torch.Tensor:
        missing = self.max_length - histories.shape[1]
        ids = self.prefix_ids
        self.prefix_ids = ids.expand(len(histories), -1)
        self.kept_prefix = self.prefix_keys_values()
        self.prefix_ids = ids
        found = fast(self, F.pad(histories, (missing, 0)), F.pad(asked, (missing, 0)), ends)
        self.kept_prefix = None
        return found

    def all_tokens(histories: torch.Tensor, after: torch.Tensor, R: int) -> torch.Tensor:
        return torch.arange(len(histories) * (histories.shape[1] + after.shape[1] * R), device=histories.device)

    LLMRec.states = states
    LLMRec.for_inference = LLMRec.for_accumulation = nullcontext
    llm_rec.tokens_there = all_tokens
    llm_rec.read_only_some = lambda layer, adapted: []
    losses.LOGITS_AT_ONCE = metrics.SCORES_AT_ONCE = 2**62
    if with_dropout:
        Dropout.forward = nn.Dropout.forward
        by_length = train.shuffled_batches
        train.shuffled_batches = lambda lengths, *rest: by_length(np.zeros(len(lengths)), *rest)


def run_steps(steps: list[str], place: Path, off: bool, lora_dropout: float, flags: list[str]) -> dict[str, dict]:
    """Each step in a process of its own; returns their metrics by the step's name."""
    found = {}
    for name in steps:
        more = ["--teacher", str(place / "finetune")] if name == "distill" else []
        command = [sys.executable, __file__, "--run", name, "--lora_dropout", str(lora_dropout)]
        command += ["--off"] if off else []
        subprocess.run([*command, "--", *flags, *more, "--output_dir", str(place / name)], check=True)
        found[name] = read_json(place / name / "metrics.json", "")
    return found


def compare(on: dict, off: dict) -> dict[str, float]:
    """Differences of all metrics of two runs, by split, kind of ranking and name."""
    on, off = ({split: run[split] for split in SPLITS} for run in (on, off))
    return {name: value - flatten(off)[name] for name, value in flatten(on).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--num_epochs", type=float, help="default: the recipe's")
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="finetune, or both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "same_metrics.json")
    parser.add_argument("--run", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--off", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        if args.off:
            switch_off(args.lora_dropout > 0)
        step, section = STEPS[args.run]
        cli.run(step.main, section=section, argv=[*args.flags, "--lora_dropout", str(args.lora_dropout)])
        return
    if args.flags:
        parser.error(f"unknown: {' '.join(args.flags)}")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "run", "off", "flags")}
    found_here = environment(Accelerator(cpu=not torch.accelerator.is_available()))
    runs = []
    for seed in args.seeds:
        flags = ["--dataset", args.dataset, "--seed", str(seed)]
        flags += ["--num_epochs", str(args.num_epochs)] if args.num_epochs else []
        with tempfile.TemporaryDirectory() as folder:
            on, off = (run_steps(args.steps, Path(folder) / str(k), k, args.lora_dropout, flags) for k in (False, True))
        for name in args.steps:
            differences = compare(on[name], off[name])
            both = {"on": on[name]["test"], "off": off[name]["test"]}
            runs.append({"seed": seed, "step": name, "differences": differences, **both})
            largest = max(differences, key=lambda metric: abs(differences[metric]))
            print(f"seed {seed}, {name}: {largest} differs most, {differences[largest]:+.6f}", flush=True)
        write_json({"runs": runs, "settings": settings, "environment": found_here}, args.out)
    for name in args.steps:
        for kind in ("on", "off"):
            found = [run[kind]["sampled"]["NDCG@10"] for run in runs if run["step"] == name]
            spread = f" +- {statistics.stdev(found):.4f}" if len(found) > 1 else ""
            print(f"{name}, everything {kind}: test NDCG@10 {statistics.mean(found):.4f}{spread}")


if __name__ == "__main__":
    main()
