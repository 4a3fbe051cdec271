"""What file order instead of time order does to SASRec: the same interactions in both, three seeds each.

    python benchmarks/order.py --gift Gift_Cards_5.json.gz --cds interactions.tsv.gz

The released notebook keeps the order of the file, and raw Amazon files are ordered by item. --gift is such a file.
--cds is a TSV (user_id, asin, timestamp, rating) that is ordered by user and time; its lines are sorted by item too.
The order decides what is held out as well: only the figures in time order are those of a next item.
"""

import csv
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import command_line, count, run_main
from utils.checked import check_file
from utils.cli import ROOT
from utils.errors import UserError
from utils.files import write_json
from utils.report import environment, markdown_table

METRICS = {"HR@10": ("sampled", "HR@10"), "NDCG@10": ("sampled", "NDCG@10")}
METRICS |= {"full HR@10": ("full", "HR@10"), "full NDCG@10": ("full", "NDCG@10")}
TRAINING = [
    "--train_targets",
    "all",
    "--batch_size",
    "64",
    "--max_steps",
    "400",
    "--learning_rate",
    "0.002",
    "--dropout",
    "0.3",
]


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_item(source: Path, target: Path) -> Path:
    """The same TSV with its lines sorted by item, as raw files are."""
    try:
        with gzip.open(source, "rt", encoding="utf-8") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        rows.sort(key=lambda row: row[header.index("asin")])
    except (EOFError, OSError, ValueError, IndexError, csv.Error, zlib.error) as error:
        raise UserError(f"{source} is no whole gzip file of tab-separated rows with an asin each ({error})") from error
    with open(target, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return target


def table(record: dict) -> str:
    header = ["data", "order", "users in time order", *METRICS]
    rows = []
    for run in record["runs"]:
        figures = [f"{v['mean']:.4f} ± {v['std']:.4f}" for v in run["test"].values()]
        rows.append([run["data"], run["order"], f"{run['chronological_users']:.0%}", *figures])
    return markdown_table(header, rows)


def chronological(folder: Path) -> float:
    """Share of users whose timestamps never go back."""
    offsets, times = (np.load(folder / f"{name}.npy") for name in ("offsets", "timestamps"))
    back = np.concatenate([[False], np.diff(times) < 0])
    back[offsets[:-1]] = False  # from one user to the next
    return float((np.add.reduceat(back, offsets[:-1]) == 0).mean())


def main() -> None:
    parser = command_line(__doc__, "order")
    parser.add_argument("--gift", type=Path, required=True, help="raw reviews, 2018")
    parser.add_argument("--cds", type=Path, required=True, help="TSV of interactions")
    parser.add_argument("--seeds", type=count, default=3)
    args = parser.parse_args()
    for path in (args.gift, args.cds):
        check_file(path)
    runs, done = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tsv = ["--item", "asin", "--timestamp", "timestamp", "--repeats", "first", "--output", place]
        gift = ["amazon2018", "--input", args.gift, "--filter", "kcore", "--output", place]
        cds = ["interactions", "--input", args.cds, *tsv]
        sorted_cds = ["interactions", "--input", by_item(args.cds, place / "by_item.tsv"), *tsv]
        for data, order, how in (
            ("Gift Cards", "time", [*gift, "--order", "time"]),
            ("Gift Cards", "file", [*gift, "--order", "file"]),
            ("CDs", "time", [*cds, "--order", "time"]),
            ("CDs", "file", [*cds, "--order", "file"]),
            ("CDs, lines by item", "file", [*sorted_cds, "--order", "file"]),
        ):
            name = f"{data}-{order}".replace(" ", "_").replace(",", "")
            call("datasets/process.py", *how, "--name", name)
            info = json.loads((place / name / "dataset.json").read_text(encoding="utf-8"))
            if info["fingerprint"] not in done:
                reports = []
                for seed in range(args.seeds):
                    folder = place / "runs" / f"{name}-{seed}"
                    flags = ["--dataset", place / name, "--seed", seed, "--output_dir", folder, *TRAINING]
                    call("train_sr_trad.py", *flags)
                    reports.append(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
                values = {
                    column: [report["test"][kind][metric] for report in reports]
                    for column, (kind, metric) in METRICS.items()
                }
                done[info["fingerprint"]] = {
                    column: {"mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else 0.0, "seeds": v}
                    for column, v in values.items()
                }
            counts = {key: info[key] for key in ("users", "items", "interactions", "timestamp_ties", "fingerprint")}
            same = chronological(place / name)
            found = {"data": data, "order": order, "chronological_users": same, "test": done[info["fingerprint"]]}
            runs.append(found | {"dataset": counts})
            print(table({"runs": runs[-1:]}).splitlines()[-1], flush=True)
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"} | {"training": TRAINING}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    record = {"runs": runs, "settings": settings, "environment": environment(accelerator)}
    print(table(record))
    write_json(record, args.out)


if __name__ == "__main__":
    run_main(main)
