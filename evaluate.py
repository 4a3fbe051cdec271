"""Measure a saved run again, without training.

python evaluate.py                                              the default student on test
python evaluate.py --run outputs/ml-100k/sasrec --split valid
python evaluate.py --negatives 99                               another number of sampled candidates
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from pathlib import Path
from typing import Literal

import numpy as np

from recommend import load
from utils import assets, cli
from utils.data import Sequences, check_same_dataset
from utils.metrics import CANDIDATE_SEED, NUM_NEGATIVES, draw_negatives, evaluate
from utils.report import markdown_table, metric_row


def main(
    *,
    run: str = "outputs/ml-100k/student-4from8",
    dataset: str | None = None,
    split: Literal["valid", "test"] = "test",
    negatives: int = NUM_NEGATIVES,
    candidate_seed: int = CANDIDATE_SEED,
    eval_batch_size: int = 512,
) -> None:
    trained = load(run)
    data = Sequences.load(assets.dataset_folder(dataset or trained.config["dataset"]))
    check_same_dataset(data, trained.config["dataset_fingerprint"], Path(run))
    drawn = draw_negatives(data, split, negatives, candidate_seed)
    options = {"max_length": trained.config["max_seq_length"], "batch_size": eval_batch_size, "progress": True}
    metrics, seconds = evaluate(
        trained.model, data, split, drawn, device=trained.device, autocast=trained.autocast, **options
    )
    rows = [metric_row(f"{split}, {kind}", values) for kind, values in metrics.items()]
    print(markdown_table(["split, candidates", *metrics["full"]], rows))
    counts = np.count_nonzero(drawn, axis=1)
    print(f"{len(data.users):,} users, {counts.min()} to {counts.max()} negatives, {seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main, section=None)
