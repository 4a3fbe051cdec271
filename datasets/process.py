"""Turn a file of interactions into a dataset folder that every step reads without parsing.

    python datasets/process.py download --category Gift_Cards
    python datasets/process.py amazon2018 --input Gift_Cards_5.json.gz --meta meta_Gift_Cards.json.gz --name gift
    python datasets/process.py interactions --input ratings.csv --name mine --user userId --item movieId
    python datasets/process.py sequences --input Beauty.txt.gz --titles titles.tsv.gz --name beauty
    python datasets/process.py lists --input user2item.tsv.gz --titles item2title.tsv.gz --name clothing2014
    python datasets/process.py prepared --input cloths.csv --name cloth
    python datasets/process.py stats beauty clothing2014
    python datasets/process.py export beauty > beauty.tsv

Stand-alone: it imports nothing of this project, and nothing imports it. datasets/README.md describes what it writes.
"""

import argparse
import ast
import csv
import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from gzip import BadGzipFile
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
from isal import igzip, isal_zlib
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BLOCK = 2**23  # bytes read at once
HOME_PAGE = "https://nijianmo.github.io/amazon/index.html"
MIRRORS = (
    "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2",
    "https://jmcauley.ucsd.edu/data/amazon_v2",
)


class BadInput(Exception):
    """Ends the program with this one line and exit code 2; nothing is written."""


@dataclass(frozen=True)
class Interactions:
    """Rows as read: user and item are codes into user_ids and item_ids, which hold the source's own ids."""

    user: np.ndarray  # (rows,) int32
    item: np.ndarray  # (rows,) int32
    user_ids: list[str]
    item_ids: list[str]
    time: np.ndarray | None = None  # (rows,) int64
    rating: np.ndarray | None = None  # (rows,) float32
    titles: dict[str, str] = field(default_factory=dict)  # by item id
    bad_lines: int = 0

    def take(self, rows: np.ndarray) -> "Interactions":
        """The same with the rows of a mask or an index array."""
        parts = {name: getattr(self, name) for name in ("user", "item", "time", "rating")}
        return replace(self, **{name: None if part is None else part[rows] for name, part in parts.items()})


# --- reading ---


def open_bytes(path: Path) -> io.BufferedIOBase:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return igzip.open(path, "rb") if packed else open(path, "rb")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give an existing file") from error


def blocks(path: Path) -> Iterator[bytes]:
    """Blocks of whole lines of a plain or gzip file; a second thread decompresses the next block meanwhile."""
    with open_bytes(path) as file, ThreadPoolExecutor(1) as ahead:
        rest, future = b"", ahead.submit(file.read, BLOCK)
        while True:
            try:
                block = future.result()
            except (EOFError, BadGzipFile, isal_zlib.error) as error:
                raise BadInput(f"{path} is damaged or cut off ({error}); fetch it again") from error
            if not block:
                break
            future = ahead.submit(file.read, BLOCK)
            whole, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
            rest = tail if newline else rest + block
        if rest:
            yield rest


def in_parallel(parse: Callable, path: Path) -> Iterator:
    """parse(block) of every block of a file, in order; blocks are parsed by one process a core, the first one here."""
    source = blocks(path)
    first, second = next(source, None), next(source, None)
    if first is not None:
        yield parse(first)
    if second is None:
        return
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers) as pool:
        waiting = deque([pool.submit(parse, second)])
        for block in source:
            waiting.append(pool.submit(parse, block))
            if len(waiting) > workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def text_of(path: Path) -> str:
    """A whole plain or gzip file as text."""
    try:
        return b"".join(blocks(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} cannot be read ({error}); give a text file in UTF-8") from error


@dataclass
class Parsed:
    """What the lines of a block hold."""

    lines: int
    user: list[str] = field(default_factory=list)
    item: list[str] = field(default_factory=list)
    time: array = field(default_factory=lambda: array("q"))
    rating: array = field(default_factory=lambda: array("f"))
    titles: dict[str, str] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)  # place of a line that cannot be used, and why


class BadLines:
    """Counts lines that cannot be used; more than the share `limit` of all stops the program."""

    def __init__(self, path: Path, limit: float):
        self.path, self.limit, self.count, self.lines, self.first = path, limit, 0, 0, ""

    def add(self, part: Parsed) -> None:
        if part.bad and not self.count:
            place, reason = part.bad[0]
            self.first = f"line {self.lines + place + 1} ({reason})"
        self.count += len(part.bad)
        self.lines += part.lines

    def check(self) -> int:
        if not self.count:
            return 0
        text = f"{self.path}: {self.count} of {self.lines} lines cannot be used, the first is {self.first}"
        if self.count > self.limit * self.lines:
            raise BadInput(f"{text}; allow more with --max_bad_lines")
        print(f"{text}; they are left out", file=sys.stderr)
        return self.count


def lines_of(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def parse_reviews(block: bytes) -> Parsed:
    """Reviews as Amazon Review Data 2014 and 2018 have them, one JSON object a line."""
    lines = lines_of(block)
    part = Parsed(len(lines))
    user, item, time, rating = part.user, part.item, part.time, part.rating
    for place, line in enumerate(lines):
        try:
            row = orjson.loads(line)
            when, stars, who, what = row["unixReviewTime"], row["overall"], row["reviewerID"], row["asin"]
            if type(who) is not str or type(what) is not str or not who or not what:
                raise ValueError("reviewerID or asin is no text")
            rating.append(stars)
        except (ValueError, KeyError, TypeError) as error:
            if line.strip():
                part.bad.append((place, f"{type(error).__name__}: {error}"))
            continue
        try:
            time.append(when)
        except (TypeError, OverflowError) as error:
            rating.pop()
            part.bad.append((place, f"{type(error).__name__}: {error}"))
            continue
        user.append(who)
        item.append(what)
    return part


def parse_titles(block: bytes) -> Parsed:
    """Titles from metadata. The 2014 files hold Python literals where the 2018 ones hold JSON."""
    lines = lines_of(block)
    part = Parsed(len(lines))
    for place, line in enumerate(lines):
        try:
            row = orjson.loads(line)
        except ValueError as error:
            if not line.strip():
                continue
            try:
                row = ast.literal_eval(line.decode())
            except (ValueError, SyntaxError):
                part.bad.append((place, f"{type(error).__name__}: {error}"))
                continue
        if isinstance(row, dict):
            item, title = row.get("asin"), row.get("title")
            if isinstance(item, str) and isinstance(title, str):
                part.titles.setdefault(item, title)
    return part


def read_amazon(args: argparse.Namespace) -> Interactions:
    """Reviews as Amazon Review Data 2014 and 2018 have them, one JSON object a line, and their metadata."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user, item, time, rating = array("i"), array("i"), array("q"), array("f")
    bad = BadLines(args.input, args.max_bad_lines)
    shown = {"unit": " lines", "unit_scale": True, "mininterval": 1, "disable": None}
    with tqdm(desc=args.input.name, **shown) as bar:
        for part in in_parallel(parse_reviews, args.input):
            user.extend([users.setdefault(who, len(users)) for who in part.user])
            item.extend([items.setdefault(what, len(items)) for what in part.item])
            time.extend(part.time)
            rating.extend(part.rating)
            bad.add(part)
            bar.update(part.lines)
    unusable = bad.check()
    titles: dict[str, str] = {}
    if args.meta:
        bad = BadLines(args.meta, args.max_bad_lines)
        with tqdm(desc=args.meta.name, **shown) as bar:
            for part in in_parallel(parse_titles, args.meta):
                for item_id, title in part.titles.items():
                    if item_id in items:
                        titles.setdefault(item_id, title)  # the first of an item that stands twice
                bad.add(part)
                bar.update(part.lines)
        bad.check()
    return Interactions(
        user=np.array(user, np.int32),
        item=np.array(item, np.int32),
        time=np.array(time, np.int64),
        rating=np.array(rating, np.float32),
        user_ids=list(users),
        item_ids=list(items),
        titles=titles,
        bad_lines=unusable,
    )


def read_table(path: Path, columns: dict[str, str | None]) -> pd.DataFrame:
    """Columns of a CSV or TSV as text, renamed to the keys of `columns`; RecBole's `name:type` headers are understood.

    columns: wanted name -> name in the file, or None where the file has no such column.
    """
    text = text_of(path)
    header = text.partition("\n")[0].rstrip("\r")
    if not header:
        raise BadInput(f"{path} is empty; it needs a header line and one row a line")
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
            table = pd.read_csv(io.StringIO(text), index_col=False, **how)
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise BadInput(f"{path} cannot be parsed: {error}") from error
    if not len(table):
        raise BadInput(f"{path} holds no row below its header")
    return pd.DataFrame({wanted: table[name] for wanted, name in columns.items() if name}).fillna("")


def numbers(column: pd.Series, path: Path, what: str, limit: float = 2**63) -> np.ndarray:
    """A text column as float64; BadInput with the line of the first that is no finite number."""
    values = pd.to_numeric(column, errors="coerce")
    bad = np.flatnonzero(~(values.abs().to_numpy(float) < limit))
    if len(bad):
        raise BadInput(f"{path}, line {bad[0] + 2}: {what} {column.iloc[bad[0]]!r} is no number")
    return values.to_numpy()


def from_columns(user: np.ndarray, item: np.ndarray, **rest) -> Interactions:
    """Codes from columns of ids, numbered by first appearance."""
    user_codes, user_ids = pd.factorize(user)
    item_codes, item_ids = pd.factorize(item)
    codes = {"user": user_codes.astype(np.int32), "item": item_codes.astype(np.int32)}
    return Interactions(**codes, user_ids=list(map(str, user_ids)), item_ids=list(map(str, item_ids)), **rest)


def read_titles(args: argparse.Namespace) -> dict[str, str]:
    if not args.titles:
        return {}
    table = read_table(args.titles, {"item": args.titles_item, "title": args.titles_title})
    return dict(zip(table["item"], table["title"], strict=True))


def read_interactions(args: argparse.Namespace) -> Interactions:
    """CSV or TSV, one interaction a line; columns are named by flags."""
    names = {"user": args.user, "item": args.item, "time": args.timestamp, "rating": args.rating, "title": args.title}
    table = read_table(args.input, names)
    empty = np.flatnonzero(((table["user"] == "") | (table["item"] == "")).to_numpy())
    if len(empty):
        raise BadInput(f"{args.input}, line {empty[0] + 2}: user or item is empty")
    time = numbers(table["time"], args.input, "timestamp").astype(np.int64) if args.timestamp else None
    rating = numbers(table["rating"], args.input, "rating").astype(np.float32) if args.rating else None
    titles = read_titles(args) | (dict(zip(table["item"], table["title"], strict=True)) if args.title else {})
    return from_columns(table["user"].to_numpy(), table["item"].to_numpy(), time=time, rating=rating, titles=titles)


def from_sequences(rows: list[tuple[int, str, list[str], list[str] | None]], path: Path, **rest) -> Interactions:
    """One row a user: (line number, user, items, times or None)."""
    seen: dict[str, int] = {}
    for number, user, items, times in rows:
        if user in seen:
            raise BadInput(f"{path}, line {number}: user {user} stands in line {seen[user]} already")
        seen[user] = number
        if not items:
            raise BadInput(f"{path}, line {number}: user {user} has no items")
        for text in (*items, *(times or ())):
            if not text.removeprefix("-").isdigit():
                raise BadInput(f"{path}, line {number}: {text!r} is no whole number")
        if times is not None and len(times) != len(items):
            raise BadInput(f"{path}, line {number}: {len(items)} items but {len(times)} timestamps")
    if not rows:
        raise BadInput(f"{path} is empty")
    user = np.repeat([user for _, user, _, _ in rows], [len(items) for _, _, items, _ in rows])
    item = np.array([item for _, _, items, _ in rows for item in items])
    timed = rows[0][3] is not None
    time = np.array([int(t) for row in rows for t in row[3]], np.int64) if timed else None
    return from_columns(user, item, time=time, **rest)


def read_sequences(args: argparse.Namespace) -> Interactions:
    """One user a line, `user item item ...`, oldest first, whole numbers (S3-Rec, E4SRec)."""
    lines = text_of(args.input).splitlines()
    rows = [(n, *part[:1], part[1:], None) for n, line in enumerate(lines, 1) if (part := line.split())]
    return from_sequences(rows, args.input, titles=read_titles(args))


def read_lists(args: argparse.Namespace) -> Interactions:
    """A TSV with columns user_id, item_ids, timestamps (the latter two space-separated lists); what `export` writes."""
    table = read_table(args.input, {"user": "user_id", "items": "item_ids", "times": "timestamps"})
    columns = (table["user"], table["items"].str.split(), table["times"].str.split())
    rows = [(n, *row) for n, row in enumerate(zip(*columns, strict=True), 2)]
    return from_sequences(rows, args.input, titles=read_titles(args))


def read_prepared(args: argparse.Namespace) -> Interactions:
    """The authors' CSV: reviewerID, asin (a JSON list of integer ids from 0, oldest first), title (a list too)."""
    table = read_table(args.input, {"user": "reviewerID", "items": "asin"})
    rows = []
    for number, (user, text) in enumerate(zip(table["user"], table["items"], strict=True), 2):
        try:
            items = json.loads(text)
            rows.append((number, user, [str(int(item)) for item in items if int(item) == item], None))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{args.input}, line {number}: asin is no list of whole numbers") from error
    titles = {}
    if "title" in text_of(args.input).partition("\n")[0]:
        for (_, _, items, _), text in zip(rows, read_table(args.input, {"title": "title"})["title"], strict=True):
            try:
                names = json.loads(text)
            except ValueError:
                continue
            if isinstance(names, list) and len(names) == len(items):
                titles |= dict(zip(items, map(str, names), strict=True))
    return from_sequences(rows, args.input, titles=titles)


# --- order, filters, funnel ---


def in_order(found: Interactions, order: str) -> Interactions:
    """Rows by user, then by time with ties in file order, or in file order alone (the released notebook's)."""
    keys = (found.time, found.user) if order == "time" and found.time is not None else (found.user,)
    return found.take(np.lexsort(keys))  # stable, the last key sorts first


def first_of_each_pair(found: Interactions) -> np.ndarray:
    """Mask of the rows where a user meets an item for the first time."""
    key = found.user.astype(np.int64) * len(found.item_ids) + found.item
    mask = np.zeros(len(key), bool)
    mask[np.unique(key, return_index=True)[1]] = True
    return mask


def distinct(codes: np.ndarray) -> int:
    """How many different codes occur."""
    return int(np.count_nonzero(np.bincount(codes)))


def at_least(codes: np.ndarray, k: int) -> np.ndarray:
    """Mask of the rows whose code occurs at least k times."""
    return (np.bincount(codes) >= k)[codes] if len(codes) else np.zeros(0, bool)


class Funnel:
    """What is left after each step."""

    def __init__(self, found: Interactions):
        self.found, self.steps = found, []
        self.note("read")

    def note(self, step: str) -> None:
        found = self.found
        counts = {"rows": len(found.user), "users": distinct(found.user), "items": distinct(found.item)}
        self.steps.append({"step": step} | counts | {"interactions": int(first_of_each_pair(found).sum())})

    def keep(self, step: str, mask: np.ndarray) -> None:
        self.found = self.found.take(mask)
        self.note(step)

    def table(self) -> str:
        header = list(self.steps[0])
        rows = [header] + [[f"{v:,}" if isinstance(v, int) else v for v in step.values()] for step in self.steps]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join(
            row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )


def apply_filters(found: Interactions, args: argparse.Namespace) -> Funnel:
    """The released notebook's steps in its order, or k-core until nothing changes, or none; then repeats."""
    funnel = Funnel(found)
    if args.filter == "paper":
        if found.rating is not None:
            funnel.keep("rating >= 3", found.rating >= 3)
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
        funnel.keep("items with >= 20", at_least(funnel.found.item, 20))
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
    if args.repeats == "first":
        funnel.keep("first of repeated items", first_of_each_pair(funnel.found))
    if args.filter == "paper":
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
    if args.filter == "kcore":
        while True:
            mask = at_least(funnel.found.user, args.k) & at_least(funnel.found.item, args.k)
            if mask.all():
                break
            funnel.keep(f"users and items with >= {args.k}", mask)
    return funnel


# --- writing ---


def tie_share(time: np.ndarray, offsets: np.ndarray) -> float:
    """Share of neighbours within a user's sequence that have the same timestamp."""
    inner = np.ones(len(time), bool)
    inner[offsets[:-1]] = False
    same = np.concatenate([[False], time[1:] == time[:-1]]) & inner
    return float(same.sum() / max(1, inner.sum()))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_dataset(args: argparse.Namespace) -> None:
    """Read, order, filter, and write the folder beside its place, which it takes only when complete."""
    read = in_order(args.read(args), args.order)
    funnel = apply_filters(read, args)
    print(funnel.table())
    found = funnel.found
    if not len(found.user):
        raise BadInput(f"{args.input}: nothing is left after --filter {args.filter}; no dataset is written")
    users, user_codes = np.unique(found.user, return_inverse=True)
    items, item_codes = np.unique(found.item, return_inverse=True)
    item_ids = [found.item_ids[code] for code in items]
    arrays = {
        "items": (item_codes + 1).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(user_codes))]).astype(np.int64),
        "timestamps": np.zeros(len(found.user), np.int64) if found.time is None else found.time,
    }
    offsets, count = arrays["offsets"], len(found.user)
    ties = None if found.time is None else tie_share(found.time, offsets)
    order = "file" if found.time is None or args.order == "file" else "time, ties in file order"
    contents = arrays["items"].tobytes() + offsets.tobytes() + str(len(items)).encode()
    sources = [path for path in (args.input, getattr(args, "meta", None), getattr(args, "titles", None)) if path]
    info = {
        "name": args.name,
        "users": len(users),
        "items": len(items),
        "interactions": count,
        "density": count / (len(users) * len(items)),
        "history_length_quantiles": {
            str(q): float(np.quantile(np.diff(offsets), q)) for q in (0, 0.25, 0.5, 0.75, 0.95, 1)
        },
        "order": order,
        "timestamp_ties": ties,
        "items_with_title": sum(1 for name in item_ids if found.titles.get(name)),
        "titles_before_filtering": sum(1 for name in found.item_ids if found.titles.get(name)),
        "bad_lines": found.bad_lines,
        "funnel": funnel.steps,
        "sources": {path.name: sha256(path) for path in sources},
        "flags": {name: str(value) for name, value in vars(args).items() if name not in ("read", "do")},
        "fingerprint": hashlib.sha256(contents).hexdigest(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    place = args.output / args.name
    part = Path(tempfile.mkdtemp(prefix=f".{args.name}.", suffix=".part", dir=args.output))
    try:
        for name, values in arrays.items():
            np.save(part / f"{name}.npy", values, allow_pickle=False)
        (part / "user_ids.txt").write_text("".join(f"{found.user_ids[code]}\n" for code in users), encoding="utf-8")
        rows = (f"{' '.join(name.split())}\t{' '.join(found.titles.get(name, '').split())}\n" for name in item_ids)
        (part / "items.tsv").write_text("item_id\ttitle\n" + "".join(rows), encoding="utf-8")
        (part / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
        part.chmod(0o755)
        old = Path(f"{part}.old")
        if place.exists():
            os.replace(place, old)
        os.replace(part, place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    tied = "no timestamps" if ties is None else f"{ties:.1%} timestamp ties"
    print(f"{place}: {len(users):,} users, {len(items):,} items, {count:,} interactions, {tied}, order: {order}")


# --- the other commands ---


def load_info(name: str) -> tuple[Path, dict]:
    for folder in (HERE / name, Path(name)):
        if (folder / "dataset.json").is_file():
            return folder, json.loads((folder / "dataset.json").read_text())
    raise BadInput(f"{name}: no dataset of that name in {HERE}, and no such folder")


def export(args: argparse.Namespace) -> None:
    """A TSV on standard output that other tools read, and `lists` reads back."""
    folder, _ = load_info(args.name)
    items, offsets, times = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("items", "offsets", "timestamps"))
    users = (folder / "user_ids.txt").read_text(encoding="utf-8").splitlines()
    rows = (folder / "items.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ids = np.array([""] + [row.split("\t")[0] for row in rows], object)
    spaced = next((name for name in ids if " " in name), None)
    if spaced:
        raise BadInput(f"item id {spaced!r} holds a space, which this format has no place for")
    print("user_id\titem_ids\ttimestamps")
    for user, low, high in zip(users, offsets[:-1], offsets[1:], strict=True):
        print(user, " ".join(ids[items[low:high]]), " ".join(map(str, times[low:high])), sep="\t")


def stats(args: argparse.Namespace) -> None:
    """Table 1 of the paper for processed datasets, with the paper's own rows below."""
    rows = [["dataset", "users", "items", "interactions", "density %"]]
    for name in args.names:
        _, info = load_info(name)
        counts = [f"{info[key]:,}" for key in ("users", "items", "interactions")]
        rows.append([info["name"], *counts, f"{100 * info['density']:.3f}"])
    paper = HERE.parent / "results" / "paper_tables.json"
    if paper.is_file():
        for name, values in json.loads(paper.read_text())["table_1"]["rows"].items():
            rows.append([f"{name} (paper)", *(f"{v:,}" for v in values[:3]), f"{values[3]:.3f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print(row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)))


def fetch(url: str, target: Path, timeout: float) -> None:
    """Fetch `url`, going on where an earlier transfer broke off; raises OSError when it breaks off again."""
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is the whole, or longer than what is there now
            part.unlink()
            raise OSError("the partial file did not fit; it is fetched anew") from error
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("a web page came instead of the file")
        resumed = answer.status == 206
        total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total or None, initial=have if resumed else 0, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := answer.read1(2**20):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise OSError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
    try:
        with igzip.open(part, "rb") as file:
            while file.read(BLOCK):
                pass
    except (EOFError, BadGzipFile, isal_zlib.error) as error:
        part.unlink()
        raise OSError(f"what came is no whole gzip file ({error})") from error
    os.replace(part, target)


def download(args: argparse.Namespace) -> None:
    """The 2018 5-core reviews and the metadata of a category, from the first mirror that serves them whole."""
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = {
        f"{args.category}_5.json.gz": f"categoryFilesSmall/{args.category}_5.json.gz",
        f"meta_{args.category}.json.gz": f"metaFiles2/meta_{args.category}.json.gz",
    }
    for name, path in wanted.items():
        target = args.output / name
        failures = []
        for mirror in [] if target.exists() else (args.mirror or MIRRORS):
            for _ in range(args.tries):
                try:
                    fetch(f"{mirror.rstrip('/')}/{path}", target, args.timeout)
                    break
                except (OSError, http.client.HTTPException) as error:
                    failures.append(f"{mirror}: {error}")
            if target.exists():
                break
        if not target.exists():
            raise BadInput(
                f"{name} could not be fetched ({failures[-1]}); try again, a broken transfer goes on where it stopped; "
                f"pass --mirror URL, or fetch it by hand from {HOME_PAGE}"
            )
        print(f"{target}: {target.stat().st_size:,} bytes, whole")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    def source(name: str, read, repeats: str, filters: str = "none") -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=read.__doc__.splitlines()[0], description=read.__doc__)
        one.set_defaults(read=read, do=make_dataset)
        one.add_argument("--input", type=Path, required=True, help="plain or gzip")
        one.add_argument("--name", required=True, help="the dataset is written to datasets/NAME")
        one.add_argument("--output", type=Path, default=HERE, help="write to OUTPUT/NAME instead")
        one.add_argument("--filter", choices=("paper", "kcore", "none"), default=filters, help="default: %(default)s")
        one.add_argument("--k", type=int, default=5, help="of --filter kcore (default: %(default)s)")
        one.add_argument("--order", choices=("time", "file"), default="time", help="default: %(default)s")
        one.add_argument(
            "--repeats", choices=("first", "all"), default=repeats, help="of a user's items (default: %(default)s)"
        )
        return one

    def titles(one: argparse.ArgumentParser) -> None:
        one.add_argument("--titles", type=Path, help="CSV or TSV with a title for each item")
        one.add_argument("--titles_item", default="item_id", help="its column of the item (default: %(default)s)")
        one.add_argument("--titles_title", default="title", help="its column of the title (default: %(default)s)")

    one = source("amazon2018", read_amazon, "first", "paper")
    one.add_argument("--meta", type=Path, help="the category's metadata, for titles")
    one.add_argument("--max_bad_lines", type=float, default=0.001, help="share of lines (default: %(default)s)")
    one = source("interactions", read_interactions, "all")
    for name, default in (("user", "user_id"), ("item", "item_id")):
        one.add_argument(f"--{name}", default=default, help=f"column of the {name} (default: %(default)s)")
    for name in ("timestamp", "rating", "title"):
        one.add_argument(f"--{name}", help=f"column of the {name} (default: none)")
    titles(one)
    for name, read in (("sequences", read_sequences), ("lists", read_lists)):
        titles(source(name, read, "all"))
    source("prepared", read_prepared, "all")
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
    one.add_argument("--timeout", type=float, default=60, help="seconds without a byte (default: %(default)s)")
    one.add_argument("--tries", type=int, default=3, help="of each mirror (default: %(default)s)")
    args = parser.parse_args(argv)
    name = getattr(args, "name", "x")
    if args.do is make_dataset and (
        not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == "."
    ):
        raise BadInput(f"--name {name!r}: use letters, digits, '-', '_' and '.'")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        args.do(args)
    except BrokenPipeError:  # `export NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BrokenProcessPool:
        print("process.py: a process that parses was killed, most likely for want of memory", file=sys.stderr)
        raise SystemExit(2) from None
    except (BadInput, OSError) as error:
        print(f"process.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
