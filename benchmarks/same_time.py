"""Users whose last two items have the same timestamp, apart from the others, for every recorded run of a dataset.

    python benchmarks/same_time.py --dataset clothing2014

The order of these two, the items of validation and test, is that of the file: which of them is held out says nothing of
time. The dataset's folder has the timestamps, the records have the test users' ranks: nothing is trained here.
"""

import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import check_dataset, command_line, run_main
from utils.assets import dataset_folder
from utils.checked import read_array
from utils.data import Sequences
from utils.experiments import records, unpack
from utils.files import write_json
from utils.metrics import metrics_from_ranks
from utils.report import environment, markdown_table

METRICS = ("NDCG@10", "HR@10")  # full ranking


def same_time(data: Sequences, times: np.ndarray) -> np.ndarray:
    """(users,) bool: whether a user's last two items have the same timestamp; times are those of `data.items`."""
    last = data.offsets[data.users + 1] - 1
    return times[last] == times[last - 1]


def measure(found: dict, same: np.ndarray) -> list[dict]:
    """Metrics of both kinds of users, same (users,) bool, for each run and seed that keeps ranks."""
    rows = []
    for (protocol, name, seed), run in sorted(found.items()):
        if name == run["experiment"]["name"] and "test_full" in run["ranks"]:  # a run may stand under several names
            ranks, row = unpack(run["ranks"]["test_full"]), {"protocol": protocol, "run": name, "seed": seed}
            for kind, users in (("same", same), ("others", ~same)):
                row[kind] = {metric: metrics_from_ranks(ranks[users])[metric] for metric in METRICS}
            rows.append(row)
    return rows


def table(record: dict) -> str:
    share = record["same_users"] / record["users"]
    header = [f"{record['dataset']}, full ranking", "seed", *(f"{m}, same time" for m in METRICS)]
    header += [f"{m}, others" for m in METRICS]
    rows = [
        [r["run"], str(r["seed"]), *(f"{r[kind][metric]:.4f}" for kind in ("same", "others") for metric in METRICS)]
        for r in record["rows"]
    ]
    users = f"{record['same_users']:,} of {record['users']:,} users have the same time ({share:.0%})."
    return f"{users}\n\n{markdown_table(header, rows)}"


def main() -> None:
    parser = command_line(__doc__, "same_time")
    parser.add_argument("--dataset", required=True)
    args = parser.parse_args()
    check_dataset(args, lambda record: record["dataset"])
    folder = dataset_folder(args.dataset)
    data, found = Sequences.load(folder), records(args.dataset)
    times = read_array(folder / "timestamps.npy", "make the dataset anew")
    if len(times) != len(data.items) or not times.any():
        parser.error(f"--dataset {args.dataset} has no timestamps")
    if any(run["config"]["dataset_fingerprint"] != data.fingerprint for run in found.values()):
        parser.error(f"--dataset {args.dataset} is not what the records of {args.dataset} were made of")
    same = same_time(data, times)
    record = {"dataset": args.dataset, "users": len(same), "same_users": int(same.sum())}
    record |= {"rows": measure(found, same), "environment": environment(Accelerator(cpu=True))}
    write_json(record, args.out)
    print(table(record))


if __name__ == "__main__":
    run_main(main)
