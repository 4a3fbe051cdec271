"""What seeds do to the results, and whether a change of recipe or code moves them: the four steps, seed after seed.

    python benchmarks/seeds.py --seeds 1 2 3
    python benchmarks/seeds.py --checkouts . ../before --seeds 1 2 3 42

Each checkout of this repository runs its own scripts with its own recipe, in its own outputs/seedSEED/; runs that
are finished are taken as they are. Give different commits: rows are told apart by them. The record keeps what it has of
other commits, so a change is compared with what was measured before it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.same_metrics import over_seeds
from utils.cli import ROOT
from utils.files import read_json, write_json
from utils.metrics import SPLITS
from utils.report import environment, markdown_table

COLUMNS = {f"{split}, {kind}": (split, kind) for split in reversed(SPLITS) for kind in ("sampled", "full")}


def run_steps(checkout: Path, seed: int) -> list[dict]:
    """One record for each of the three models of a checkout's four steps."""
    place = Path("outputs") / f"seed{seed}"
    models = {"train_sr_trad": place / "sasrec", "finetune": place / "teacher-8", "distill": place / "student-4from8"}
    items = place / "item_embeddings"
    training = ["--seed", seed, "--resume", "auto", "--output_dir"]
    for command in (
        ["train_sr_trad.py", *training, models["train_sr_trad"]],
        ["extract_emb.py", "--sr_dir", models["train_sr_trad"], "--output_dir", items],
        ["finetune.py", "--item_embeddings", items, *training, models["finetune"]],
        ["distill.py", "--teacher", models["finetune"], *training, models["distill"]],
    ):
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=checkout)
    found = []
    for step, folder in models.items():
        run = read_json(checkout / folder / "metrics.json", "")
        kept = {name: run[name] for name in ("environment", "seconds", *SPLITS)}
        found.append({"commit": run["environment"]["git_commit"], "step": step, "seed": seed, **kept})
    return found


def table(record: dict) -> str:
    """NDCG@10 of each step of each commit, mean and standard deviation over the seeds."""
    rows = {}
    for run in record["runs"]:
        rows.setdefault((run["commit"][:7], run["step"]), []).append(run)
    cells = [
        [
            *name,
            str(len(runs)),
            *(over_seeds([run[split][kind]["NDCG@10"] for run in runs], "") for split, kind in COLUMNS.values()),
        ]
        for name, runs in rows.items()
    ]
    return markdown_table(["commit", "NDCG@10", "seeds", *COLUMNS], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[ROOT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "seeds.json")
    args = parser.parse_args()
    found_here = environment(Accelerator(cpu=True))
    runs = []
    for checkout in args.checkouts:
        for seed in args.seeds:
            runs += run_steps(checkout, seed)
    measured = {run["commit"] for run in runs}
    before = read_json(args.out, "")["runs"] if args.out.exists() else []
    record = {"runs": [run for run in before if run["commit"] not in measured] + runs, "environment": found_here}
    write_json(record, args.out)
    print(table(record))


if __name__ == "__main__":
    main()
