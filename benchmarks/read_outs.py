"""Every position of a history as a target: read after response tokens and at items, in one alternating run.

    python benchmarks/read_outs.py

8 layers on histories with Beauty's lengths: targets per second in training, users per second in inference, beside the
released computation, which has one target per user and pads every history to 30 items. All do the same number of
passes in turn, and medians are reported. The two read-outs are different models: only their speed is compared.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import command_line, count, run_main
from benchmarks.llm_step import MAX_ITEMS, Workload, alternate, make_model, ours_loss, released_loss, training_step
from utils.candidates import draw_negatives
from utils.data import shuffled_batches, training_examples
from utils.files import write_json
from utils.report import environment, markdown_table

READ_OUTS = ("response", "item")


def measure(work: Workload, num_layers: int, repeats: int) -> list[dict]:
    """Rows of kind, batch and "released", "response" and "item" per second."""
    models = {
        kind: make_model("smollm2-135m", num_layers, work.data.num_items, work.device, torch.float32, read_out=kind)
        for kind in READ_OUTS
    }
    released = models["response"]
    examples = training_examples(work.data, "all", MAX_ITEMS)
    index = shuffled_batches(len(examples), work.batch_size, seed=0, epoch=0)[:4]
    batches = [{k: v.to(work.device) for k, v in examples.batch(part).items()} for part in index]
    targets = int(examples.num_targets[np.concatenate(index)].sum())
    steps = {kind: (training_step(model, ours_loss, batches), targets) for kind, model in models.items()}
    one = training_step(released, released_loss, work.batches(work.index()[:1]))
    drawn = draw_negatives(work.ranked, "test")
    ranks = {kind: (lambda model=model: work.rank(model, drawn), len(work.tests)) for kind, model in models.items()}
    slow = (lambda: work.released_rank(released), work.infer_batch_size)
    rows = []
    for kind, run in (
        ("training, targets", {"released": (one, work.batch_size)} | steps),
        ("inference, users", {"released": slow} | ranks),
    ):
        speeds = alternate(repeats, **run)
        rows.append({"kind": kind, "batch": work.batch_size} | speeds)
        print(f"batch {work.batch_size}, {kind} per second: {speeds}", flush=True)
    return rows


def table(record: dict) -> str:
    header = ["per second", "batch", "released, one target", "response", "item", "item / response", "item / released"]
    rows = []
    for r in record["rows"]:
        speeds = [r["released"], r["response"], r["item"]]
        ratios = [r["item"] / r["response"], r["item"] / r["released"]]
        rows.append([r["kind"], str(r["batch"]), *(f"{speed:.1f}" for speed in speeds), *(f"{x:.1f}" for x in ratios)])
    return markdown_table(header, rows)


def main() -> None:
    parser = command_line(__doc__, "read_outs")
    parser.add_argument("--num_layers", type=count, default=8)
    parser.add_argument("--batch_sizes", type=count, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=count, default=3)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    works = [Workload(None, size, accelerator.device, users=2048) for size in args.batch_sizes]
    rows = [row for work in works for row in measure(work, args.num_layers, args.repeats)]
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    write_json({"rows": rows, "settings": settings, "environment": environment(accelerator)}, args.out)
    print(table({"rows": rows}))


if __name__ == "__main__":
    run_main(main)
