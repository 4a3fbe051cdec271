"""How the cost grows, at four sizes each: with depth, history length, catalogue size and users.

    python benchmarks/growth.py

Depth and history length: a training step and inference of the language model, batch 32, ours beside the released
computation. Catalogue: a SASRec training step with the whole softmax and with 2,048 sampled negatives. Users:
drawing candidates, and ranking by vectors that cost nothing.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.catalogue import LastItem
from benchmarks.llm_step import Workload, make_data, make_model, ours_loss, released_loss, seconds, training_step
from models.sr.sasrec import SASRec
from utils.checkpoint import write_json
from utils.cli import ROOT
from utils.data import Sequences
from utils.metrics import draw_negatives, rank_users
from utils.report import environment

DEPTHS, LENGTHS = (2, 4, 8, 16), (4, 8, 16, 30)
CATALOGUES, USERS = (1_000, 10_000, 100_000, 376_858), (5_000, 20_000, 80_000, 320_000)
BATCH = 32


def median(work, repeats: int) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(repeats))


def language_model(num_layers: int, length: int | None, repeats: int, device) -> dict[str, float]:
    """Milliseconds a sample; length None: Beauty's histories."""
    work = Workload(None, BATCH, device)
    if length:
        users = len(work.data.users)
        items = np.random.default_rng(0).integers(1, work.data.num_items + 1, users * (length + 3)).astype(np.int32)
        offsets = np.arange(users + 1) * (length + 3)
        data = Sequences("fixed", items, offsets, work.data.num_items, np.arange(users), "0" * 64)
        work = Workload(None, BATCH, device, data)
    model = make_model("smollm2-135m", num_layers, work.data.num_items, device, torch.float32)
    batches = work.batches(work.index())
    samples = BATCH * len(batches)
    return {
        "training, ours": 1e3 * median(training_step(model, ours_loss, batches), repeats) / samples,
        "training, released": 1e3 * median(training_step(model, released_loss, batches[:1]), repeats) / BATCH,
        "inference, ours": 1e3 * median(lambda: work.rank(model), repeats) / len(work.tests),
        "inference, released": 1e3 * median(lambda: work.released_rank(model), repeats) / BATCH,
    }


def catalogue(num_items: int, repeats: int, device) -> dict[str, float]:
    """Milliseconds of a SASRec step of 256 users with three targets each, optimiser left out."""
    histories = torch.randint(1, num_items + 1, (256, 10), device=device)
    targets = torch.randint(1, num_items + 1, (256, 10), device=device) * (torch.arange(10, device=device) >= 7)
    found = {}
    for name, negatives in (("whole softmax", 0), ("2,048 negatives", 2048)):
        options = {"dim": 128, "max_length": 30, "num_layers": 2, "num_heads": 2, "dropout": 0.2}
        counts = torch.ones(num_items + 1)
        model = SASRec(num_items, num_negatives=negatives, counts=counts, **options).to(device)

        def step(model=model) -> None:
            model.zero_grad(set_to_none=True)
            ours_loss(model, {"histories": histories, "targets": targets}).backward()

        found[name] = 1e3 * median(step, repeats)
    return found


def users(number: int, repeats: int) -> dict[str, float]:
    """Seconds for everybody, 12,101 items."""
    data, model = make_data(None, number), LastItem(12_101)
    found = {"candidates": median(lambda: draw_negatives(data, "test"), 1)}
    negatives = draw_negatives(data, "test")
    how = {"max_length": 30, "batch_size": 512}
    return found | {"ranking": median(lambda: rank_users(model, data, "test", negatives, **how), min(repeats, 3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "growth.json")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    device, repeats = accelerator.device, args.repeats
    panels = {
        "layers, ms a sample": {n: language_model(n, None, repeats, device) for n in DEPTHS},
        "items of history (8 layers), ms a sample": {n: language_model(8, n, repeats, device) for n in LENGTHS},
        "items in the catalogue, ms a SASRec step": {n: catalogue(n, repeats, device) for n in CATALOGUES},
        "users, seconds": {n: users(n, repeats) for n in USERS},
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (title, sizes), panel in zip(panels.items(), axes.flat, strict=True):
        for name in next(iter(sizes.values())):
            values = [found[name] for found in sizes.values()]
            panel.loglog(list(sizes), values, marker="o", label=name)
            print(f"{title}: {name:20s}", "  ".join(f"{n:,}: {v:.3g}" for n, v in zip(sizes, values, strict=True)))
        panel.set(xlabel=title.split(",")[0], ylabel=title.split(", ")[1])
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    figure.savefig(args.out.parent / f"{args.out.stem}.png", dpi=100)
    write_json({"panels": panels, "repeats": repeats, "environment": environment(accelerator)}, args.out)


if __name__ == "__main__":
    main()
