"""Candidates, full ranking and the loss over large catalogues: ours beside the plain way, in one run.

python benchmarks/catalogue.py                      sizes of Beauty and, for the loss, of Cloth
python benchmarks/catalogue.py --step plain --target plain.npz    one training step alone: memory, loss, gradients
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import command_line, count, run_main
from benchmarks.llm_step import make_data
from models.interface import Recommender
from models.losses import catalogue_cross_entropy
from utils.candidates import draw_negatives
from utils.data import Sequences, sorted_batches, split_examples
from utils.files import write_json
from utils.memory import peak_extra_bytes
from utils.metrics import rank_users
from utils.report import environment

CLOTH_ITEMS = 376_858  # the paper's table 1


def released_candidates(data: Sequences) -> None:
    """One pass over the users in the released way: a set difference and a sample for each."""
    for user in data.users:
        seen = set(data.items[data.offsets[user] : data.offsets[user + 1]].tolist())
        random.sample(list(set(range(1, data.num_items + 1)) - seen), 999)


class LastItem(Recommender):
    """User vectors that cost nothing, so that ranking is what is timed."""

    def __init__(self, num_items: int):
        super().__init__(None, None)
        self.table = torch.randn(num_items + 1, 128)

    def user_vectors(self, histories: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.table[histories[:, -1]]

    def item_vectors(self) -> torch.Tensor:
        return self.table


def plain_ranks(model: LastItem, data: Sequences) -> np.ndarray:
    """Full ranking of the test users with all scores (users, V + 1) in memory."""
    examples = split_examples(data, "test", 30)
    vectors = torch.empty(len(examples), 128)
    for index in sorted_batches(examples.lengths, 512):
        vectors[torch.from_numpy(index)] = model.user_vectors(examples.batch(index)["histories"])
    scores = vectors @ model.table.T
    target = torch.from_numpy(data.items[examples.end]).long()
    positive = scores.gather(1, target[:, None])
    scores[:, 0] = -torch.inf
    for row, user in enumerate(data.users):
        scores[row, torch.from_numpy(data.items[data.offsets[user] : examples.end[row]]).long()] = -torch.inf
    scores.scatter_(1, target[:, None], -torch.inf)
    return (scores >= positive).sum(1).numpy()


def plain_cross_entropy(vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(vectors @ items[1:].T, targets - 1)


def step(kind: str, target: Path) -> None:
    """Print peak extra bytes and seconds of a step with 376,858 items, d = 128 and 256 examples.

    The loss and its gradients, those of the items at every 97th one and at the targets, are written to `target`.
    """
    torch.manual_seed(0)
    vectors = torch.randn(256, 128).requires_grad_()
    items = (torch.randn(CLOTH_ITEMS + 1, 128) * 0.1).requires_grad_()
    targets = torch.randint(1, CLOTH_ITEMS + 1, (256,))
    loss_of = plain_cross_entropy if kind == "plain" else catalogue_cross_entropy
    warm = torch.randn(256, 128).requires_grad_(), torch.randn(9000, 128).requires_grad_(), targets % 8999 + 1
    loss_of(*warm).backward()  # what the libraries keep for themselves
    found = []

    def work() -> None:
        begun = time.perf_counter()
        loss = loss_of(vectors, items, targets)
        loss.backward()
        found.extend((loss.detach(), time.perf_counter() - begun))

    peak = peak_extra_bytes(work, "cpu")
    loss, taken = found
    np.savez(target, loss=loss, vectors=vectors.grad, items=items.grad[::97], targets=items.grad[targets])
    print(peak, taken)


def compare_steps() -> dict[str, float]:
    """Both computations in a process each: memory, seconds, and the largest relative difference of what they found."""
    with tempfile.TemporaryDirectory() as folder:
        figures, found = {}, {}
        for kind in ("plain", "ours"):
            target = Path(folder) / f"{kind}.npz"
            command = [sys.executable, __file__, "--step", kind, "--target", str(target)]
            out = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
            figures[kind], found[kind] = [float(x) for x in out.split()], dict(np.load(target))
    differences = [
        float(np.linalg.norm(found["ours"][name] - value) / np.linalg.norm(value))
        for name, value in found["plain"].items()
    ]
    (peak, seconds), (plain_peak, plain_seconds) = figures["ours"], figures["plain"]
    return {
        "loss_peak_bytes": peak,
        "loss_plain_peak_bytes": plain_peak,
        "loss_peak_share": peak / plain_peak,
        "loss_seconds": seconds,
        "loss_plain_seconds": plain_seconds,
        "loss_and_gradient_difference": max(differences),
    }


def timed(function, *arguments) -> float:
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def main() -> None:
    parser = command_line(__doc__, "catalogue")
    parser.add_argument("--users", type=count, default=22_363)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--step", choices=("plain", "ours"), help="only this")
    parser.add_argument("--target", type=Path, help="where --step writes loss and gradients (npz)")
    args = parser.parse_args()
    if bool(args.step) != bool(args.target):
        parser.error("--step and --target go together")
    if args.step:
        step(args.step, args.target)
        return
    data, model = make_data(None, args.users), LastItem(12_101)
    negatives = draw_negatives(data, "test")

    def ours() -> None:
        rank_users(model, data, "test", negatives, max_length=30, batch_size=512)

    ranks, _ = rank_users(model, data, "test", negatives, max_length=30, batch_size=512)
    same = float((ranks["full"] == plain_ranks(model, data)).mean())
    times: dict[str, list[float]] = {"draw": [], "rank": [], "plain_rank": []}
    for _ in range(args.repeats):
        times["draw"].append(timed(draw_negatives, data, "test"))
        times["rank"].append(timed(ours))
        times["plain_rank"].append(timed(plain_ranks, model, data))
    median = {name: statistics.median(values) for name, values in times.items()}
    released = timed(released_candidates, data)
    summary = {
        "candidates_seconds": median["draw"],
        "candidates_released_seconds_each_pass": released,
        "rank_seconds": median["rank"],
        "rank_plain_seconds": median["plain_rank"],
        "full_ranks_that_are_the_same": same,
    }
    summary |= compare_steps()
    for name, value in summary.items():
        print(f"{name:40s} {value:.6g}")
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "step", "target")}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    write_json({"summary": summary, "settings": settings, "environment": environment(accelerator)}, args.out)


if __name__ == "__main__":
    run_main(main)
