"""Turn a file of interactions into a dataset folder that every step reads without parsing.

    python datasets/process.py download --category Gift_Cards
    python datasets/process.py amazon2018 --input Gift_Cards_5.json.gz --meta meta_Gift_Cards.json.gz --name gift
    python datasets/process.py jsonl --preset amazon2023 --input Gift_Cards.jsonl.gz --name gift2023
    python datasets/process.py interactions --input ratings.csv --name mine --user uid --item iid --timestamp time
    python datasets/process.py interactions --input u.data --name ml --header none --columns user,item,rating,timestamp
    python datasets/process.py pairs --input Video.txt --name video
    python datasets/process.py sequences --input Beauty.txt.gz --attributes item2attributes.json.gz --name beauty
    python datasets/process.py lists --input user2item.tsv.gz --titles item2title.tsv.gz --name clothing2014
    python datasets/process.py prepared --input cloths.csv --name cloth
    python datasets/process.py stats beauty clothing2014
    python datasets/process.py export beauty > beauty.tsv

Of the rest of the project it imports utils.files, utils.checked and utils.errors alone, and nothing imports it.
datasets/README.md describes what it reads and writes.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np
from attributes import SHAPE, number_attributes, read_attributes
from download import download
from export import export, stats
from filters import apply_filters, check_effect, in_order, tie_share
from interactions import ARRAYS, Interactions
from jsonl import PRESETS, read_jsonl
from readers import read_interactions, read_lists, read_pairs, read_prepared, read_sequences
from sources import open_bytes
from times import RANK

from utils.checked import attributes_fingerprint, fingerprint_of, ids_fingerprint
from utils.errors import Parser, UserError, cut_short, told_in_one_line
from utils.files import atomic_folder, check_replaceable, is_plain_name, locked, sha256

TEXTS = ("user_ids.txt", "items.tsv", "attribute_ids.txt")
FILES = ["dataset.json", *(f"{name}.npy" for name in (*ARRAYS, "attributes")), *TEXTS]


def check_target(target: Path, inputs: list[Path]) -> None:
    """UserError unless `target` may be written: it is absent, empty, or a dataset, and no input lies in it."""
    check_replaceable(target, FILES, "the dataset folder")
    for path in inputs:
        for folder in (path.parent.resolve(), path.resolve().parent):  # of a link, and of what it points to
            if target.exists() and any(parent.samefile(target) for parent in (folder, *folder.parents)):
                raise UserError(f"{path} lies in {target}, which is to be replaced; move it, or choose another --name")
    strange = next((name for name in FILES if (target / name).is_dir()), None)
    if strange:
        raise UserError(f"{target} holds something else (a folder {strange}); choose another --name, or move it away")


def make_dataset(args: argparse.Namespace) -> None:
    """Read, order, filter, and write the folder beside its place, which it takes only when complete."""
    target = Path(os.path.realpath(args.output / args.name))
    inputs = [getattr(args, name, None) for name in ("input", "meta", "titles", "attributes")]
    inputs = [path for path in inputs if path]
    for path in inputs:
        open_bytes(path).close()
    check_target(target, inputs)
    listed = read_attributes(args.attributes) if args.attributes else {}
    read = args.read(args)
    if not len(read.user):
        raise UserError(f"{args.input} holds no line that can be used; no dataset is written")
    order = args.order or ("file" if read.time is None or read.keep_order else "time")
    funnel = apply_filters(in_order(read, order), args)
    print(funnel.table())
    found = funnel.found
    if not len(found.user):
        raise UserError(f"{args.input}: nothing is left after --filter {args.filter}; no dataset is written")
    users, user_codes = np.unique(found.user, return_inverse=True)
    items, item_codes = np.unique(found.item, return_inverse=True)
    arrays = {
        "items": (item_codes + 1).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(user_codes))]).astype(np.int64),
        "timestamps": found.time.values if found.time else np.zeros(len(found.user), np.int64),
    }
    user_ids, item_ids = [found.user_ids[code] for code in users], [found.item_ids[code] for code in items]
    texts = {"user_ids.txt": user_ids, "items.tsv": item_lines(item_ids, found.titles or {})}
    info = describe(args, found, arrays, item_ids, order)
    check_titles(args, found, item_ids)
    if args.attributes:
        pairs, names = number_attributes(args.attributes, listed, item_ids)
        arrays["attributes"], texts["attribute_ids.txt"] = pairs, names
        info |= {"attributes": len(names), "items_with_attributes": len(np.unique(pairs[:, 0]))}
        info["attributes_fingerprint"] = attributes_fingerprint(pairs)
    info |= {"funnel": funnel.steps, "sources": {name: sha256(path) for name, path in by_name(inputs).items()}}
    info["flags"] = {name: str(value) for name, value in vars(args).items() if name not in ("read", "do")}
    with ExitStack() as held, atomic_folder(target) as part:
        write(part, arrays, texts | {"dataset.json": [json.dumps(info, indent=2)]})
        held.enter_context(locked(target))  # until the folder has its place
        check_target(target, inputs)
    notes = list(found.notes)
    if found.time is not None and found.time.unit == RANK:
        notes.append(f"{args.input}: timestamps are stored as {RANK}")
    if args.filter == "paper" and read.rating is None:
        flag = "; name their column with --rating" if hasattr(args, "rating") else ""
        notes.append(f"{args.input}: no ratings are read, so --filter paper goes without its step rating >= 3{flag}")
    if args.filter != "paper" and getattr(args, "rating", None):
        notes.append(f"{args.input}: ratings are read and not used, as --filter paper alone has a step for them")
    for note in notes:
        print(f"process.py: {note}", file=sys.stderr)
    ties = "no timestamps" if info["timestamp_ties"] is None else f"{info['timestamp_ties']:.1%} timestamp ties"
    more = "" if found.titles is None else f", {info['items_with_title']:,} of {len(items):,} items with a title"
    if args.attributes:
        more += f", {info['items_with_attributes']:,} of {len(items):,} items with attributes"
        more += f" ({info['attributes']:,} different ones)"
    counts = f"{len(users):,} users, {len(items):,} items, {len(found.user):,} interactions"
    print(f"{args.output / args.name}: {counts}, {ties}, order: {info['order']}{more}")


def by_name(inputs: list[Path]) -> dict[str, Path]:
    """Inputs by name, or by path where two have one name."""
    names = [path.name for path in inputs]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in inputs}


def check_titles(args: argparse.Namespace, found: Interactions, item_ids: list[str]) -> None:
    """UserError where --meta has no title of these items, or --titles has titles of others alone."""
    meta, other = (getattr(args, name, None) for name in ("meta", "titles"))
    if (meta or (other and found.titles)) and not any(name in found.titles for name in item_ids):
        flag = next((f"--{name}" for name in ("meta_item", "titles_item") if hasattr(args, name)), None)
        named = f", or name what holds their ids with {flag} and their titles with {flag[:-4]}title" if flag else ""
        wrong = f"{meta or other} has a title of no item that is left, such as {item_ids[0]!r:.60}"
        raise UserError(f"{wrong}; give the file of these items{named}")


def describe(args: argparse.Namespace, found: Interactions, arrays: dict, item_ids: list[str], order: str) -> dict:
    """What dataset.json tells of the dataset itself."""
    offsets, count, titles = arrays["offsets"], len(found.user), found.titles or {}
    users = len(offsets) - 1
    quantiles = {str(q): float(np.quantile(np.diff(offsets), q)) for q in (0, 0.25, 0.5, 0.75, 0.95, 1)}
    return {
        "name": args.name,
        "users": users,
        "items": len(item_ids),
        "interactions": count,
        "density": count / (users * len(item_ids)),
        "history_length_quantiles": quantiles,
        "order": "time, ties in file order" if order == "time" else "file",
        "timestamp_ties": tie_share(found.time.values, offsets) if found.time else None,
        "timestamp_unit": found.time.unit if found.time else None,
        "timestamp_decimals": found.time.decimals if found.time else None,
        "items_with_title": sum(name in titles for name in item_ids),
        "titles_before_filtering": sum(name in titles for name in found.item_ids),
        "bad_lines": found.bad_lines,
        "fingerprint": fingerprint_of(arrays["items"], offsets, len(item_ids)),
        "ids_fingerprint": ids_fingerprint(item_ids),
    }


def item_lines(item_ids: list[str], titles: dict[str, str]) -> list[str]:
    return ["item_id\ttitle", *(f"{name}\t{titles.get(name, '')}" for name in item_ids)]


def write(folder: Path, arrays: dict[str, np.ndarray], texts: dict[str, list[str]]) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    for name, lines in texts.items():
        with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)


# --- flags ---


def number_from(low: float, kind: type = float, to: float = math.inf) -> Callable[[str], float]:
    """A number of that kind, from `low` to `to`, for a flag."""

    def number(text: str) -> float:
        if not low <= kind(text) <= to:
            wanted = f">= {low}" if to == math.inf else f"from {low} to {to}"
            raise argparse.ArgumentTypeError(f"{text}: expected a number {wanted}")
        return kind(text)

    return number


def source(commands, name: str, read, repeats: str = "all", filters: str = "none") -> Parser:
    """The command of a format, with the flags that all have."""
    one = commands.add_parser(name, help=read.__doc__.splitlines()[0], description=read.__doc__)
    one.set_defaults(read=read, do=make_dataset, usual_repeats=repeats)
    one.add_argument("--input", type=Path, required=True, help="plain, gzip, bz2, xz or zip")
    one.add_argument("--name", required=True, help="the dataset is written to datasets/NAME")
    one.add_argument("--output", type=Path, default=HERE, help="write to OUTPUT/NAME instead")
    one.add_argument("--attributes", type=Path, help=f"of items, which --model s3rec learns from: JSON, {SHAPE}")
    one.add_argument("--filter", choices=("paper", "kcore", "none"), default=filters, help="default: %(default)s")
    one.add_argument("--k", type=number_from(1, int), default=5, help="of --filter kcore (default: %(default)s)")
    one.add_argument("--order", choices=("time", "file"), help="default: time where the source has times")
    one.add_argument(
        "--repeats",
        choices=("first", "all"),
        help=f"of a user's items (default: first with --filter paper, else {repeats})",
    )
    return one


def layout_flags(one: Parser, prefix: str = "", whole: bool = True) -> None:
    """How a file of text is written; `whole` adds what only a table has."""
    what = "of --titles" if prefix else "of --input"
    one.add_argument(f"--{prefix}encoding", default="utf-8", help=f"{what}, such as utf-16 (default: %(default)s)")
    if whole:
        one.add_argument(f"--{prefix}separator", help=f"{what}, such as ';' or '|' (default: as found)")
        one.add_argument(f"--{prefix}header", choices=("first", "none"), default="first", help=f"line {what}")
        example = "item_id,title,genres" if prefix else "user,item,rating,timestamp"
        one.add_argument(f"--{prefix}columns", help=f"{what} with --{prefix}header none: names of all, {example}")


def title_flags(one: Parser) -> None:
    one.add_argument("--titles", type=Path, help="table with a title for each item")
    one.add_argument("--titles_item", default="item_id", help="its column of the item (default: %(default)s)")
    one.add_argument("--titles_title", default="title", help="its column of the title (default: %(default)s)")
    layout_flags(one, "titles_")


def json_flags(one: Parser) -> None:
    one.add_argument("--meta", type=Path, help="JSON lines with titles")
    one.add_argument(
        "--max_bad_lines", type=number_from(0, to=1), default=0.001, help="share of lines (default: %(default)s)"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="process.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    one = source(commands, "amazon2018", read_jsonl, "first", "paper")
    one.set_defaults(preset="amazon2018")
    json_flags(one)
    one = source(commands, "jsonl", read_jsonl)
    one.add_argument("--preset", choices=tuple(PRESETS), help="names of the fields in files of this source")
    for name, default in (("user", "user_id"), ("item", "item_id"), ("timestamp", "none"), ("rating", "none")):
        one.add_argument(f"--{name}", help=f"field of the {name} (default: the preset's, or {default})")
    one.add_argument("--meta_item", help="field of the item in --meta (default: the preset's, or item_id)")
    one.add_argument("--meta_title", help="field of the title in --meta (default: the preset's, or title)")
    json_flags(one)
    one = source(commands, "interactions", read_interactions)
    for name, default in (("user", "user_id"), ("item", "item_id")):
        one.add_argument(f"--{name}", help=f"column of the {name} (default: {default}, or {name} of --columns)")
    for name in ("timestamp", "rating", "title"):
        one.add_argument(f"--{name}", help=f"column of the {name} (default: none, or {name} of --columns)")
    layout_flags(one)
    title_flags(one)
    for name, read, table in (
        ("pairs", read_pairs, False),
        ("sequences", read_sequences, False),
        ("lists", read_lists, True),
    ):
        one = source(commands, name, read)
        layout_flags(one, whole=table)
        title_flags(one)
    layout_flags(source(commands, "prepared", read_prepared))
    one = commands.add_parser("stats", help=stats.__doc__, description=stats.__doc__)
    one.set_defaults(do=stats)
    one.add_argument("names", nargs="+", metavar="NAME")
    one = commands.add_parser("export", help=export.__doc__, description=export.__doc__)
    one.set_defaults(do=export)
    one.add_argument("name", metavar="NAME")
    one = commands.add_parser("download", help=download.__doc__, description=download.__doc__)
    one.set_defaults(do=download)
    one.add_argument("--category", required=True, help="such as Clothing_Shoes_and_Jewelry")
    one.add_argument("--mirror", action="append", metavar="URL", help="instead of the known ones; may be repeated")
    one.add_argument("--output", type=Path, default=HERE / "raw", help="default: %(default)s")
    one.add_argument(
        "--timeout", type=number_from(0.1), default=60, help="seconds without a byte (default: %(default)s)"
    )
    one.add_argument("--tries", type=number_from(1, int), default=3, help="of each mirror (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.do is make_dataset and not is_plain_name(args.name):
        raise UserError(f"--name {args.name!r}: use letters, digits, '-', '_' and '.'")
    if args.do is make_dataset:
        check_effect(args, sys.argv[1:] if argv is None else argv)
        usual = vars(args).pop("usual_repeats")
        args.repeats = args.repeats or ("first" if args.filter == "paper" else usual)
    return args


def main(argv: list[str] | None = None) -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(encoding="utf-8")  # whatever the locale
    with told_in_one_line("process.py", "no dataset was changed; give the same command again"):
        with cut_short():
            args = parse(argv)
        try:
            with cut_short() if args.do in (stats, export) else nullcontext():
                args.do(args)
        except (BrokenProcessPool, MemoryError):
            raise UserError("memory ran out, or a process that parses was killed") from None


if __name__ == "__main__":
    main()
