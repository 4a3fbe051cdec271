"""What a dataset folder holds, for other tools and for table 1: `export` and `stats`."""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from filters import aligned
from interactions import ARRAYS, in_list, on_line
from times import written

from utils.checked import INFO, read_array, read_json, read_text
from utils.errors import UserError
from utils.files import is_plain_name

HERE = Path(__file__).resolve().parent


def load_info(name: str) -> tuple[Path, dict]:
    for folder in (HERE / name, Path(name)) if is_plain_name(name) else (Path(name), HERE / name):
        if (folder / "dataset.json").is_file():
            return folder, read_json(folder / "dataset.json", "", INFO)
    raise UserError(f"{name}: no dataset of that name in {HERE}, and no such folder")


def ids_in(path: Path) -> list[str]:
    """The first column of a file of ids."""
    return [on_line(line.partition("\t")[0]) for line in read_text(path).split("\n")[:-1]]


def export(args: argparse.Namespace) -> None:
    """A TSV on standard output that other tools read, and `lists` reads back."""
    folder, info = load_info(args.name)
    try:
        items, offsets, moments = (read_array(folder / f"{name}.npy", "make the dataset anew") for name in ARRAYS)
        users, names = ids_in(folder / "user_ids.txt"), ids_in(folder / "items.tsv")
        timed, decimals = info["timestamp_ties"] is not None, int(info.get("timestamp_decimals") or 0)
        fit = all(part.ndim == 1 and part.dtype.kind == "i" and len(part) for part in (items, offsets, moments))
        fit = fit and offsets[0] == 0 and offsets[-1] == len(items) == len(moments) and (np.diff(offsets) >= 0).all()
        if not fit or len(users) != len(offsets) - 1 or items.min() < 1 or items.max() >= len(names):
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({error}); make the dataset anew") from error
    names = np.array([in_list(name) for name in names], object)
    first = np.unique(items, return_index=True)[1]
    # What `lists` does by itself: number items by first appearance, and sort by time.
    numbered = bool((np.diff(first) < 0).any()) or (timed and info.get("order") == "file")
    out = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    out.writerow(["user_id", "item_ids", "timestamps"] + ["item_numbers"] * numbered)
    for user, low, high in zip(users, offsets[:-1], offsets[1:], strict=True):
        mine = items[low:high]
        times = " ".join(written(moments[low:high], decimals)) if timed else ""
        out.writerow([user, " ".join(names[mine]), times] + [" ".join(map(str, mine))] * numbered)


def stats(args: argparse.Namespace) -> None:
    """Table 1 of the paper for processed datasets, with the paper's own rows below."""
    rows = [["dataset", "users", "items", "interactions", "density %"]]
    for name in args.names:
        _, info = load_info(name)
        counts = [f"{info[key]:,}" for key in ("users", "items", "interactions")]
        rows.append([info["name"], *counts, f"{100 * info['density']:.3f}"])
    paper = HERE.parent / "results" / "paper_tables.json"
    if paper.is_file():
        for name, values in json.loads(paper.read_text(encoding="utf-8"))["table_1"]["rows"].items():
            rows.append([f"{name} (paper)", *(f"{v:,}" for v in values[:3]), f"{values[3]:.3f}"])
    print(aligned(rows))
