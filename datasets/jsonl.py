"""JSON lines of any source, with the names of its fields; a line may be a Python literal instead of JSON."""

import argparse
import ast
import json
import re
import warnings
from array import array
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
import times
from interactions import Interactions, add_titles, as_lines, check_roles
from sources import in_parallel, json_blocks
from tqdm import tqdm

from utils.errors import UserError

PRESETS = {  # user, item, timestamp and rating of a line; item and title of a line of the metadata
    "amazon2018": ("reviewerID", "asin", "unixReviewTime", "overall", "asin", "title"),
    "amazon2023": ("user_id", "parent_asin", "timestamp", "rating", "parent_asin", "title"),
    "yelp": ("user_id", "business_id", "date", "stars", "business_id", "name"),
    "steam": ("username", "product_id", "date", None, "id", "app_name"),
}
FIRST_LINES = 1000  # of which one must have a field, or its name is taken for wrong
NO_PRESET = ("user_id", "item_id", None, None, "item_id", "title")
FIELDS = ("user", "item", "timestamp", "rating", "meta_item", "meta_title")
WHOLE = re.compile(r"-?[0-9]+")
INT64 = range(-(2**63), 2**63)


@dataclass
class Parsed:
    """What the lines of a block hold."""

    lines: int
    user: list[str] = field(default_factory=list)
    item: list[str] = field(default_factory=list)
    time: array | list[Decimal] = field(default_factory=list)  # int64 where all are whole
    kinds: dict[str, int] = field(default_factory=dict)  # of the times, with the place of the first line of each
    rating: array = field(default_factory=lambda: array("d"))
    titles: list[tuple[str, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the fields of the first line
    bad: list[tuple[int, str]] = field(default_factory=list)  # place of a line that cannot be used, and why


class BadLines:
    """Counts lines that cannot be used; more than the share `limit` of all stops the program."""

    def __init__(self, path: Path, limit: float):
        self.path, self.limit, self.count, self.lines, self.first = path, limit, 0, 0, ""

    def add(self, part: Parsed) -> None:
        if part.bad and not self.count:
            index, reason = part.bad[0]
            self.first = f"line {self.lines + index + 1} ({reason})"
        self.count += len(part.bad)
        self.lines += part.lines

    def notes(self) -> list[str]:
        if not self.count:
            return []
        text = f"{self.path}: {self.count} of {self.lines} lines cannot be used, the first is {self.first}"
        if self.count > self.limit * self.lines:
            raise UserError(f"{text}; allow more with --max_bad_lines")
        return [f"{text}; they are left out"]


def lines_of(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def load(line: bytes) -> dict:
    """The object of a line: JSON, JSON that only Python's lenient reader takes (NaN), or a Python literal."""
    try:
        row = orjson.loads(line)
    except ValueError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            try:
                row = ast.literal_eval(line.decode().strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise ValueError(f"neither JSON nor a Python literal: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("no object with fields")
    return row


def digits(line: bytes, name: str) -> str:
    """The number of a field as it is written, before a float rounds it."""
    try:
        return json.loads(line, parse_float=str, parse_int=str, parse_constant=str)[name]
    except ValueError:
        text = line.decode().strip()
        fields = ast.parse(text, mode="eval").body
        return next(
            ast.get_source_segment(text, value)
            for key, value in zip(fields.keys, fields.values, strict=True)
            if ast.literal_eval(key) == name
        )


def as_id(value: object, name: str, line: bytes) -> str:
    if type(value) is str and value.strip():
        return value
    if type(value) is float:  # or an integer beyond 64 bits
        value = digits(line, name)
        value = int(value) if WHOLE.fullmatch(value) else None
    if type(value) is not int:
        raise ValueError(f"{name} is no text and no whole number")
    return str(value)


def as_rating(value: object, name: str) -> float:
    if type(value) is str and times.NUMBER.fullmatch(value.strip()):
        value = float(value)
    if type(value) not in (int, float) or not abs(value) < 2**63:
        raise ValueError(f"{name} is no number")
    return value


def as_moment(value: object, name: str, line: bytes) -> tuple[str, int | Decimal]:
    if type(value) is int and value in INT64:
        return "number", value
    if type(value) not in (int, float, str):
        raise ValueError(f"{name} is neither number nor text")
    kind, exact = times.moment(value if type(value) is str else digits(line, name))
    return kind, int(exact) if exact == exact.to_integral_value() else exact


def check_fields(path: Path, wanted: dict[str, str | None], named: bool) -> None:
    """UserError where the first lines hold no object, or none with a field of this name: told before all are read.

    wanted: flag -> name of its field, or None for one that is not read. named: whether the flags can name another.
    """
    rows, first = [], None
    warnings.simplefilter("ignore", SyntaxWarning)
    block = next(json_blocks(path), b"")
    for number, line in enumerate(islice(lines_of(block), FIRST_LINES), 1):
        try:
            rows.append(load(line))
        except ValueError as error:
            first = first or (line.strip() and f"line {number}: {error}")
    if first and (not rows or block.split(maxsplit=1)[0] == b"["):  # an array may be spread over lines
        raise UserError(f"{path} is to hold a JSON object with fields in each line, and has none; {first}")
    for flag, name in wanted.items():
        if rows and name and not any(name in row for row in rows):
            advice = f"name yours with --{flag}" if named else "give one of this kind, or name its fields with `jsonl`"
            wrong = f"none of the first {len(rows)} lines has a field {name!r}; one has {', '.join(map(str, rows[0]))}"
            raise UserError(f"{path}: {wrong}: {advice}")


def parse_rows(block: bytes, user: str, item: str, timestamp: str | None, rating: str | None) -> Parsed:
    lines = lines_of(block)
    part = Parsed(len(lines))
    warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a Python literal
    for index, line in enumerate(lines):
        try:
            row = load(line)
            who, what = as_id(row[user], user, line), as_id(row[item], item, line)
            kind, when = as_moment(row[timestamp], timestamp, line) if timestamp else (None, None)
            stars = as_rating(row[rating], rating) if rating else 0.0
        except (ValueError, KeyError) as error:
            if line.strip():
                part.bad.append((index, f"no field {error}" if isinstance(error, KeyError) else str(error)))
            continue
        part.user.append(who)
        part.item.append(what)
        if timestamp:
            part.time.append(when)
            part.kinds.setdefault(kind, index)
        if rating:
            part.rating.append(stars)
        part.names = part.names or list(row)
    if all(type(when) is int for when in part.time):
        part.time = array("q", part.time)
    return part


def parse_titles(block: bytes, item: str, title: str) -> Parsed:
    """Titles from metadata, where a line may lack one."""
    lines = lines_of(block)
    part = Parsed(len(lines))
    warnings.simplefilter("ignore", SyntaxWarning)
    for index, line in enumerate(lines):
        try:
            row = load(line)
            name = row.get(title)
            if type(name) in (str, int) and item in row:
                part.titles.append((as_id(row[item], item, line), str(name)))
        except ValueError as error:
            if line.strip():
                part.bad.append((index, str(error)))
    return part


def progress(path: Path) -> tqdm:
    return tqdm(desc=path.name, unit=" lines", unit_scale=True, mininterval=1, disable=None)


def read_jsonl(args: argparse.Namespace) -> Interactions:
    """JSON lines of any source; --preset or flags name the fields, --meta a file of the same kind with titles."""
    names = dict(zip(FIELDS, PRESETS.get(args.preset, NO_PRESET), strict=True))
    names |= {flag: value for flag in FIELDS if (value := getattr(args, flag, None))}
    check_roles(names)
    if args.order == "time" and not names["timestamp"]:
        raise UserError("--order time needs times; name their field with --timestamp")
    wanted = {flag: names[flag] for flag in ("user", "item", "timestamp", "rating")}
    named = hasattr(args, "user")
    check_fields(args.input, wanted, named)
    if args.meta:
        check_fields(args.meta, {flag: names[flag] for flag in ("meta_item", "meta_title")}, named)
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user, item, when, rating = array("i"), array("i"), array("q"), array("d")
    kind, fields = None, []
    bad = BadLines(args.input, args.max_bad_lines)
    with progress(args.input) as bar:
        for part in in_parallel(partial(parse_rows, **wanted), args.input):
            user.extend([users.setdefault(who, len(users)) for who in part.user])
            item.extend([items.setdefault(what, len(items)) for what in part.item])
            for other, index in part.kinds.items():
                kind = kind or other
                if other != kind:
                    wrong = f"{names['timestamp']} is a {other} where the lines before hold {kind}s"
                    raise UserError(f"{args.input}, line {bad.lines + index + 1}: {wrong}; write all in one way")
            if type(when) is array and type(part.time) is list:
                when = when.tolist()  # from here on there are fractions
            when.extend(part.time)
            rating.extend(part.rating)
            fields = fields or part.names
            bad.add(part)
            bar.update(part.lines)
    notes = bad.notes()
    if not names["timestamp"]:
        notes += times.unread(fields, args.input)
    if not names["timestamp"] or not len(when):
        time = None
    elif type(when) is array:
        time = times.Times(np.array(when, np.int64), times.UNITS[kind])
    else:
        time = times.as_times([Decimal(value) for value in when], kind)
    found = Interactions(
        user=np.array(user, np.int32),
        item=np.array(item, np.int32),
        time=time,
        rating=np.array(rating) if names["rating"] else None,
        user_ids=as_lines(users),
        item_ids=as_lines(items),
        bad_lines=bad.count,
        notes=notes,
    )
    return read_meta(args, names["meta_item"], names["meta_title"], items, found) if args.meta else found


def read_meta(args: argparse.Namespace, item: str, title: str, items: dict, found: Interactions) -> Interactions:
    """The same with the titles of its items."""
    titles: dict[str, str] = {}
    bad = BadLines(args.meta, args.max_bad_lines)
    with progress(args.meta) as bar:
        for part in in_parallel(partial(parse_titles, item=item, title=title), args.meta):
            add_titles(titles, ((item_id, title) for item_id, title in part.titles if item_id in items))
            bad.add(part)
            bar.update(part.lines)
    return replace(found, titles=titles, notes=found.notes + bad.notes())
