"""Do the fast computations move a metric? Teacher and student with everything on, and with everything off.

    python benchmarks/same_metrics.py                          the default pipeline, dropout off; step 2 must be done
    python benchmarks/same_metrics.py --num_epochs 1
    python benchmarks/same_metrics.py --lora_dropout 0.05 --seeds 1 2 3

Off: every sample is padded to its full length and has the prompt of its own, padding runs through all layers, every
position through the whole top layer, adapters stay apart at inference, losses and ranks are computed in one piece.
Batches, seeds and candidates are the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import finetune
from models import llm_rec, losses
from models.llm_rec import LLMRec
from utils import cli, metrics
from utils.checkpoint import write_json
from utils.cli import ROOT
from utils.report import environment


def switch_off() -> None:
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
    LLMRec.for_inference = nullcontext
    llm_rec.tokens_there = all_tokens
    llm_rec.read_only_some = lambda layer, adapted: []
    losses.LOGITS_AT_ONCE = metrics.SCORES_AT_ONCE = 2**62


def train(place: Path, off: bool, flags: list[str]) -> dict[str, dict]:
    """Both steps in a process each; returns their metrics by name."""
    found = {}
    for name in ("finetune", "distill"):
        more = ["--teacher", str(place / "finetune")] if name == "distill" else []
        command = [sys.executable, __file__, "--run", name, *(["--off"] if off else []), "--"]
        subprocess.run([*command, *flags, *more, "--output_dir", str(place / name)], check=True)
        found[name] = json.loads((place / name / "metrics.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--num_epochs", type=float, help="default: the recipe's")
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "same_metrics.json")
    parser.add_argument("--run", choices=("finetune", "distill"), help=argparse.SUPPRESS)
    parser.add_argument("--off", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        if args.off:
            switch_off()
        section = {"finetune": "teacher", "distill": "student"}[args.run]
        cli.run({"finetune": finetune, "distill": distill}[args.run].main, section=section, argv=args.flags)
        return
    runs = []
    for seed in args.seeds:
        flags = ["--dataset", args.dataset, "--seed", str(seed), "--lora_dropout", str(args.lora_dropout)]
        flags += ["--num_epochs", str(args.num_epochs)] if args.num_epochs else []
        with tempfile.TemporaryDirectory() as folder:
            on, off = (train(Path(folder) / str(kind), kind, flags) for kind in (False, True))
        for name in on:
            differences = {
                f"{split} {kind} {metric}": value - off[name][split][kind][metric]
                for split in ("valid", "test")
                for kind in ("sampled", "full")
                for metric, value in on[name][split][kind].items()
            }
            largest = max(differences.values(), key=abs)
            runs.append({"seed": seed, "step": name, "largest_difference": largest, "differences": differences})
            runs[-1] |= {"on": on[name]["test"], "off": off[name]["test"]}
            print(f"seed {seed}, {name}: largest difference of a metric {largest:+.6f}", flush=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "run", "off", "flags")}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    write_json({"runs": runs, "settings": settings, "environment": environment(accelerator)}, args.out)


if __name__ == "__main__":
    main()
