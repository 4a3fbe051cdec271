"""Turn a file of interactions into a dataset folder that every step reads without parsing.

    python datasets/process.py interactions --input ratings.csv --name my-data --user userId --item movieId

Stand-alone: it imports nothing of this project, and nothing imports it. datasets/README.md describes what it writes.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd


class BadInput(Exception):
    """Ends the program with this one line and exit code 2; nothing is written."""


def read_table(path: Path, columns: dict[str, str | None]) -> pd.DataFrame:
    """Columns of a CSV or TSV as text, renamed to the keys of `columns`; RecBole's `name:type` headers are understood.

    columns: wanted name -> name in the file, or None where the file has no such column.
    """
    try:
        with open(path, encoding="utf-8") as file:
            header = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); give a CSV or TSV file in UTF-8") from error
    if not header:
        raise BadInput(f"{path} is empty; it needs a header line and one interaction a line")
    separator, quoting = ("\t", csv.QUOTE_NONE) if "\t" in header else (",", csv.QUOTE_MINIMAL)
    names = [name.split(":")[0] for name in next(csv.reader([header], delimiter=separator, quoting=quoting))]
    missing = [name for name in columns.values() if name and name not in names]
    if missing:
        raise BadInput(f"{path} has no column {missing[0]!r}; it has {', '.join(names)}: name yours with the flags")
    if len(set(names)) < len(names):
        raise BadInput(f"{path} has two columns of one name: {', '.join(names)}")
    how = {"sep": separator, "quoting": quoting, "names": names, "skiprows": 1, "dtype": str, "keep_default_na": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more fields than columns: data would be lost
            table = pd.read_csv(path, index_col=False, **how)
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be parsed: {error}") from error
    return pd.DataFrame({wanted: table[name] for wanted, name in columns.items() if name})


def interactions(args: argparse.Namespace) -> dict:
    """Users, items and times of an interaction file, in time order; ties and files without times keep file order."""
    table = read_table(args.input, {"user": args.user, "item": args.item, "timestamp": args.timestamp})
    if not len(table):
        raise BadInput(f"{args.input} holds no interaction below its header")
    empty = np.flatnonzero(((table["user"] == "") | (table["item"] == "")).to_numpy())
    if len(empty):
        raise BadInput(f"{args.input}, line {empty[0] + 2}: user or item is empty")
    if args.timestamp:
        time = pd.to_numeric(table["timestamp"], errors="coerce")
        bad = np.flatnonzero(~(time.abs().to_numpy(float) < 2**63))
        if len(bad):
            raise BadInput(f"{args.input}, line {bad[0] + 2}: timestamp {table['timestamp'][bad[0]]!r} is no number")
        time = time.to_numpy().astype(np.int64)
    else:
        time = np.zeros(len(table), np.int64)
    user, user_ids = pd.factorize(table["user"])
    item, item_ids = pd.factorize(table["item"])
    order = np.lexsort((np.arange(len(table)), time, user))  # the last key sorts first
    titles = {}
    if args.titles:
        found = read_table(args.titles, {"item": args.titles_item, "title": args.titles_title})
        titles = dict(zip(found["item"], found["title"], strict=True))
    return {
        "user_ids": list(user_ids),
        "item_ids": list(item_ids),
        "titles": [titles.get(name, "") for name in item_ids],
        "items": (item[order] + 1).astype(np.int32),
        "timestamps": time[order],
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64),
    }


def tie_share(timestamps: np.ndarray, offsets: np.ndarray) -> float:
    """Share of neighbours within a user's sequence that have the same timestamp."""
    inner = np.ones(len(timestamps), bool)
    inner[offsets[:-1]] = False
    same = np.concatenate([[False], timestamps[1:] == timestamps[:-1]]) & inner
    return float(same.sum() / max(1, inner.sum()))


def write_dataset(found: dict, args: argparse.Namespace) -> Path:
    """Write the folder beside its place and move it there when complete; says what it holds."""
    items, offsets = found["items"], found["offsets"]
    users, num_items = len(offsets) - 1, len(found["item_ids"])
    fingerprint = hashlib.sha256(items.tobytes() + offsets.tobytes() + str(num_items).encode()).hexdigest()
    sources = [path for path in (args.input, args.titles) if path]
    info = {
        "name": args.name,
        "users": users,
        "items": num_items,
        "interactions": len(items),
        "density": len(items) / (users * num_items),
        "history_length_quantiles": {
            str(q): float(np.quantile(np.diff(offsets), q)) for q in (0, 0.25, 0.5, 0.75, 0.95, 1)
        },
        "order": "time, ties in file order" if args.timestamp else "file",
        "timestamp_ties": tie_share(found["timestamps"], offsets) if args.timestamp else None,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "flags": {name: str(value) for name, value in vars(args).items() if name != "read"},
        "fingerprint": fingerprint,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    place = args.output / args.name
    part = Path(tempfile.mkdtemp(prefix=f".{args.name}.", suffix=".part", dir=args.output))
    try:
        for name in ("items", "offsets", "timestamps"):
            np.save(part / f"{name}.npy", found[name], allow_pickle=False)
        (part / "user_ids.txt").write_text("".join(f"{name}\n" for name in found["user_ids"]), encoding="utf-8")
        rows = zip(found["item_ids"], found["titles"], strict=True)
        clean = ["\t".join(" ".join(text.split()) for text in row) for row in rows]
        (part / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{row}\n" for row in clean), encoding="utf-8")
        (part / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
        part.chmod(0o755)
        old = Path(f"{part}.old")
        if place.exists():
            os.replace(place, old)
        os.replace(part, place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    ties = "no timestamps" if info["timestamp_ties"] is None else f"{info['timestamp_ties']:.1%} timestamp ties"
    print(f"{place}: {users:,} users, {num_items:,} items, {len(items):,} interactions, {ties}")
    return place


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(required=True, metavar="format")
    one = formats.add_parser("interactions", help="CSV or TSV, one interaction a line (RecBole .inter too)")
    one.set_defaults(read=interactions)
    one.add_argument("--input", type=Path, required=True)
    one.add_argument("--name", required=True, help="the dataset is written to datasets/NAME")
    one.add_argument("--output", type=Path, default=Path(__file__).parent, help="write to OUTPUT/NAME instead")
    one.add_argument("--user", default="user_id", help="column of the user (default: %(default)s)")
    one.add_argument("--item", default="item_id", help="column of the item (default: %(default)s)")
    one.add_argument("--timestamp", help="column of the time, a number (default: none, file order is time order)")
    one.add_argument("--titles", type=Path, help="CSV or TSV with a title for each item")
    one.add_argument("--titles_item", default="item_id", help="its column of the item (default: %(default)s)")
    one.add_argument("--titles_title", default="title", help="its column of the title (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or args.name.startswith("."):
        raise BadInput(f"--name {args.name!r}: use letters, digits, '-', '_' and '.'")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        write_dataset(args.read(args), args)
    except (BadInput, OSError) as error:
        print(f"process.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
