"""Evaluation at the size of the paper's Cloth, and evaluation shared by two processes.

python benchmarks/evaluation.py memory     peak memory while all test users are ranked
python benchmarks/evaluation.py processes  seconds of one process and of two, one thread each, alternately
python benchmarks/evaluation.py            both

Sequences are generated, with Beauty's lengths. The model is a SASRec with random weights: evaluation costs the same
whatever they are.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import command_line, count, run_main
from benchmarks.llm_step import make_data
from models.sr.sasrec import SASRec
from utils.candidates import SPLITS, Negatives
from utils.checked import read_json
from utils.data import Sequences
from utils.files import write_json
from utils.memory import peak_extra_bytes
from utils.metrics import rank_users
from utils.report import environment, markdown_table
from utils.run import Run

CLOTH_USERS, CLOTH_ITEMS = 1_219_678, 376_858  # the paper's table 1
LENGTH = 50


def sasrec(data: Sequences, item_dim: int, num_layers: int) -> SASRec:
    torch.manual_seed(0)
    config = SASRec.Config(item_dim=item_dim, max_seq_length=LENGTH, num_layers=num_layers, num_heads=1)
    return SASRec(config, data.training_part()).eval()


def measure_memory(users: int, items: int) -> dict:
    """Peak bytes of drawing candidates and ranking, beyond the sequences and the model, and the seconds it took."""
    data = make_data(None, users, num_items=items)
    model = sasrec(data, 16, 1)
    begun = time.perf_counter()

    def work() -> None:
        rank_users(model, data, "test", Negatives(data, "test"), max_length=LENGTH, batch_size=512, progress=True)

    peak = peak_extra_bytes(work, "cpu")
    data_bytes = sum(array.nbytes for array in (data.items, data.offsets, data.users))
    found = {"users": users, "items": items, "peak_extra_bytes": peak, "data_bytes": data_bytes}
    return found | {"seconds": time.perf_counter() - begun, "all_candidates_bytes": 4 * 999 * users}


def measure_seconds(users: int) -> None:
    """Of one evaluation by as many processes as torchrun started; candidates are there before. Printed by the first."""
    accelerator = Accelerator(cpu=True)
    data = make_data(None, users)
    negatives = {split: Negatives(data, split) for split in SPLITS}
    negatives["test"][slice(None)]
    run = SimpleNamespace(
        accelerator=accelerator,
        data=data,
        negatives=negatives,
        sharded=False,
        config={"max_seq_length": LENGTH, "eval_batch_size": 512},
    )
    model, found = sasrec(data, 64, 2), []
    for _ in range(6):
        accelerator.wait_for_everyone()
        begun = time.perf_counter()
        ranks, _ = Run.rank(run, model, "test")
        found.append(time.perf_counter() - begun)
    if accelerator.is_main_process:
        # the first one warms up; the fastest would be a lucky moment, rarer with two processes than with one
        print(json.dumps({"seconds": statistics.median(found[1:]), "ranks": ranks["full"].tolist()}))


def measure_processes(users: int, repeats: int) -> dict:
    """Medians of alternating runs of one process and two, each with one thread."""
    found: dict[int, list[dict]] = {1: [], 2: []}
    for _ in range(repeats):
        for number, runs in found.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
            command += [__file__, "seconds", "--users", str(users)]
            alone = os.environ | {"OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8", env=alone).stdout
            runs.append(json.loads(out.splitlines()[-1]))
    one, two = (statistics.median(run["seconds"] for run in runs) for runs in found.values())
    alone, shared = (np.array(runs[0]["ranks"]) for runs in found.values())
    apart = {"other_ranks": int((alone != shared).sum()), "ranks_apart": int(np.abs(alone - shared).max())}
    return {"users": users, "one_seconds": one, "two_seconds": two, "share": two / one} | apart


def table(record: dict) -> str:
    memory, processes = record["memory"], record["processes"]
    sizes = f"{memory['users']:,} users, {memory['items']:,} items"
    rows = [
        [f"peak memory beyond data and model, {sizes}, GiB", f"{memory['peak_extra_bytes'] / 2**30:.2f}"],
        ["all candidates at once would be, GiB", f"{memory['all_candidates_bytes'] / 2**30:.2f}"],
        ["seconds of that evaluation", f"{memory['seconds']:,.0f}"],
        [f"seconds of one process, {processes['users']:,} users", f"{processes['one_seconds']:.2f}"],
        ["seconds of two processes", f"{processes['two_seconds']:.2f}"],
        ["two / one", f"{processes['share']:.2f}"],
        ["users whose rank rounding moves by one, of two processes", f"{processes['other_ranks']}"],
    ]
    return markdown_table(["evaluation", ""], rows)


def main() -> None:
    parser = command_line(__doc__, "evaluation")
    parser.add_argument("part", nargs="?", choices=("memory", "processes", "seconds", "both"), default="both")
    parser.add_argument("--users", type=count, help="by default those of Cloth for memory, 22,363 for the others")
    parser.add_argument("--items", type=count, default=CLOTH_ITEMS, help="of the catalogue, for memory")
    parser.add_argument("--repeats", type=count, default=3)
    args = parser.parse_args()
    if args.part == "seconds":
        measure_seconds(args.users or 22_363)
        return
    found = read_json(args.out, "") if args.out.exists() else {}
    about = environment(Accelerator(cpu=True))
    if args.part in ("memory", "both"):
        found["memory"] = measure_memory(args.users or CLOTH_USERS, args.items) | {"environment": about}
    if args.part in ("processes", "both"):
        found["processes"] = measure_processes(args.users or 22_363, args.repeats) | {"environment": about}
    write_json(found, args.out)
    print(
        json.dumps({part: {k: v for k, v in of.items() if k != "environment"} for part, of in found.items()}, indent=1)
    )


if __name__ == "__main__":
    run_main(main)
