"""One reader per format of text: interactions, pairs, sequences, lists, prepared."""

import argparse
import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pandas as pd
import times
from interactions import Interactions, add_titles, check_roles, from_columns, is_header
from sources import text_of
from table import Layout, Table, numbers, read_table

from utils.errors import UserError

WHOLE = re.compile(r"-?[0-9]+")
ROLES = ("user", "item", "timestamp", "rating", "title")
Row = tuple[str, list[str], list[str] | None]  # user, items, times


def no_times(args: argparse.Namespace) -> None:
    if args.order == "time":
        raise UserError("--order time needs times, and none are read (see --timestamp of `interactions`); leave it out")


def read_titles(args: argparse.Namespace) -> dict[str, str] | None:
    """Titles of --titles, None without it. Readers call it before they read the interactions, which may be many."""
    if not args.titles:
        return None
    titles: dict[str, str] = {}
    table = read_table(args.titles, {"item": args.titles_item, "title": args.titles_title}, Layout.of(args, "titles_"))
    add_titles(titles, zip(table["item"], table["title"], strict=True))
    return titles


def check_ids(table: Table, names: dict[str, str | None], layout: Layout) -> None:
    """UserError where an id is missing, stands on several lines, or is the name of its column."""
    for role in ("user", "item"):
        column, name = table[role], names[role]
        row = table.first(column.str.strip() == "")
        if row is not None:
            raise UserError(f"{table.where(row)}: user or item is empty ({role})")
        row = table.first(column.str.contains("\n", regex=False))
        if row is not None:
            raise UserError(f"{table.where(row)}: a quote opens there and the {role} goes on in the next line; mend it")
        row = None if layout.columns else table.first(column == name)
        alike = re.sub("[0-9]+", "0", name)
        if row is None and alike != name and not layout.columns:  # "u1" above "u2" and "u3"
            row = table.first(column.head(1000).str.replace("[0-9]+", "0", regex=True) == alike)
        if row is not None:
            wrong = f"{column.iloc[row]!r} is a value like {name!r}, so the header is a row, or stands twice"
            raise UserError(f"{table.where(row)}: {wrong}; {layout.no_header}")
    if layout.columns and is_header(table["user"].iloc[0], table["item"].iloc[0]):
        raise UserError(f"{table.where(0)}: this is a header line; leave out --header none and --columns")


def read_interactions(args: argparse.Namespace) -> Interactions:
    """CSV, TSV or Parquet, one interaction a row; columns are named by flags, or --columns without a header."""
    layout = Layout.of(args)
    given = layout.columns or ()
    names = {role: getattr(args, role) or (role if role in given else None) for role in ROLES}
    names |= {role: names[role] or f"{role}_id" for role in ("user", "item")}
    check_roles(names)
    if not names["timestamp"]:
        no_times(args)
    titles = read_titles(args)
    table = read_table(args.input, names, layout)
    check_ids(table, names, layout)
    time = times.column(table["timestamp"], table.where) if "timestamp" in table else None
    if "title" in table:
        others, titles = titles or {}, {}
        full = table.columns[table["title"] != ""].drop_duplicates(["item", "title"])
        add_titles(titles, zip(full["item"], full["title"], strict=True))
        titles = others | titles
    return from_columns(
        table["user"],
        table["item"],
        time=time,
        rating=numbers(table, "rating") if "rating" in table else None,
        titles=titles,
        notes=[] if time else times.unread(table.names, args.input),
    )


def words(line: str) -> list[str]:
    """What spaces and tabs separate; other characters that look like spaces belong to an id."""
    return [word for word in re.split("[ \t]+", line) if word]


def lines_of(args: argparse.Namespace) -> tuple[list[list[str]], Callable[[int], str]]:
    """Words of each line that is not blank, and where it stands."""
    lines = [words(line) for line in text_of(args.input, Layout.of(args).encoding).split("\n")]
    numbers = [number for number, parts in enumerate(lines, 1) if parts]
    if not numbers:
        raise UserError(f"{args.input} is empty")
    return [parts for parts in lines if parts], lambda row: f"{args.input}, line {numbers[row]}"


def read_pairs(args: argparse.Namespace) -> Interactions:
    """One `user item` pair a line, oldest first, as the data of SASRec's own repositories is."""
    no_times(args)
    titles = read_titles(args)
    lines, where = lines_of(args)
    for row, parts in enumerate(lines):
        if len(parts) != 2:
            advice = "`sequences` reads one user a line, `interactions` rows with more columns"
            raise UserError(f"{where(row)}: {len(parts)} values, where a pair is a user and an item; {advice}")
    if is_header(*lines[0]):
        raise UserError(f"{where(0)}: this is a header line; `interactions` reads files that have one")
    user, item = zip(*lines, strict=True)
    return from_columns(user, item, titles=titles)


def from_sequences(rows: Sequence[Row], where: Callable[[int], str], whole: bool, **rest) -> Interactions:
    """One row per user; `whole` asks for items that are whole numbers, `where` names the place of a row."""
    seen: dict[str, int] = {}
    for row, (user, items, moments) in enumerate(rows):
        if not user.strip():
            raise UserError(f"{where(row)}: the user is empty")
        if user in seen:
            advice = "; a file with one `user item` pair a line is read by `pairs`" if len(items) == 1 else ""
            first = where(seen[user]).rpartition(", ")[2]
            raise UserError(f"{where(row)}: user {user} stands in {first} already{advice}")
        seen[user] = row
        if not items:
            raise UserError(f"{where(row)}: user {user} has no items")
        wrong = next((item for item in items if whole and not WHOLE.fullmatch(item)), None)
        if wrong is not None:
            raise UserError(f"{where(row)}: {wrong!r} is no whole number")
        if moments is not None and len(moments) != len(items):
            raise UserError(f"{where(row)}: {len(items)} items but {len(moments)} timestamps")
    users, items, moments = zip(*rows, strict=True)
    counts = [len(part) for part in items]
    time = None
    if moments[0] is not None:
        owner = np.repeat(np.arange(len(rows)), counts)
        time = times.column(pd.Series(list(chain.from_iterable(moments))), lambda at: where(owner[at]))
    return from_columns(np.repeat(np.array(users, object), counts), list(chain.from_iterable(items)), time=time, **rest)


def read_sequences(args: argparse.Namespace) -> Interactions:
    """One user a line, `user item item ...`, oldest first, items as whole numbers (S3-Rec, E4SRec)."""
    no_times(args)
    titles = read_titles(args)
    lines, where = lines_of(args)
    if all(len(parts) == 2 for parts in lines):
        raise UserError(f"{args.input} has one `user item` pair a line: read it with `pairs`")
    rows = [(parts[0], parts[1:], None) for parts in lines]
    return from_sequences(rows, where, True, titles=titles)


def read_lists(args: argparse.Namespace) -> Interactions:
    """A TSV with columns user_id, item_ids, timestamps (the latter two space-separated lists); what `export` writes."""
    wanted = {"user": "user_id", "items": "item_ids", "times": "timestamps", "numbers": "item_numbers"}
    titles = read_titles(args)
    table = read_table(args.input, wanted, Layout.of(args), fixed=("numbers",))
    timed = any(cell.strip() for cell in table["times"])
    if not timed:
        no_times(args)
    rows = [
        (user, words(items), words(moments) if timed else None)
        for user, items, moments in zip(table["user"], table["items"], table["times"], strict=True)
    ]
    found = from_sequences(rows, table.where, False, titles=titles)
    if "numbers" not in table:
        return found
    back = timed and bool((np.diff(found.time.values)[np.diff(found.user) == 0] < 0).any())
    return replace(in_given_numbers(found, table), keep_order=back)


def in_given_numbers(found: Interactions, table: Table) -> Interactions:
    """The same with items numbered as the column item_numbers says, instead of by first appearance."""
    order = np.zeros(len(found.item_ids), np.int64)  # number of each item
    offsets = np.cumsum([0, *(len(words(items)) for items in table["items"])])
    for row, (cell, low, high) in enumerate(zip(table["numbers"], offsets[:-1], offsets[1:], strict=True)):
        numbers, codes = words(cell), found.item[low:high]
        if len(numbers) != len(codes) or not all(re.fullmatch("[0-9]{1,10}", number) for number in numbers):
            raise UserError(f"{table.where(row)}: item_numbers are not as many whole numbers as there are items")
        numbers = np.array(numbers, np.int64)
        order[codes] = numbers
        if (order[codes] != numbers).any():
            raise UserError(f"{table.where(row)}: item_numbers has two numbers for one item")
    if (np.sort(order) != np.arange(1, len(order) + 1)).any():
        raise UserError(
            f"{table.where(0)}: item_numbers are not 1 to {len(order)}, each for one item; leave the column out"
        )
    item_ids = [found.item_ids[code] for code in np.argsort(order)]
    return replace(found, item=(order[found.item] - 1).astype(np.int32), item_ids=item_ids)


def entries(text: str) -> list:
    """A list as JSON or Python writes it, `nan` and `null` as None; ValueError where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            missing = {"nan", "NaN", "null"}
            value = [
                None if isinstance(entry, ast.Name) and entry.id in missing else ast.literal_eval(entry)
                for entry in (tree.elts if isinstance(tree, ast.List) else None)
            ]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError("no list of plain values") from error
    if not isinstance(value, list):
        raise ValueError("no list")
    return [None if entry != entry else entry for entry in value]  # NaN alone differs from itself


def is_exact(value: object) -> bool:
    """Whether it is a float that stands for one whole number; from 2**53 on several are written as one."""
    return type(value) is float and value.is_integer() and abs(value) < 2**53


def read_prepared(args: argparse.Namespace) -> Interactions:
    """The authors' CSV: reviewerID, asin (a list of whole numbers from 0, oldest first), title (a list of as many)."""
    no_times(args)
    wanted = {"user": "reviewerID", "items": "asin", "titles": "title"}
    table = read_table(args.input, wanted, Layout.of(args), fixed=("titles",))
    rows, titles = [], {} if "titles" in table else None
    for row, (user, text) in enumerate(zip(table["user"], table["items"], strict=True)):
        try:
            items = entries(text)
            wrong = [item for item in items if type(item) is not int and not is_exact(item)]
            if wrong:
                raise ValueError(f"it holds {wrong[0]!r}")
        except ValueError as error:
            raise UserError(f"{table.where(row)}: asin is no list of whole numbers ({error})") from error
        items = [str(int(item)) for item in items]
        rows.append((user, items, None))
        cell = table["titles"].iloc[row].strip() if titles is not None else ""
        if cell in ("", "nan"):
            continue
        try:
            names = entries(cell)
            if len(names) != len(items):
                raise ValueError(f"{len(names)} titles, {len(items)} items")
        except ValueError as error:
            wrong = f"title is no list of as many titles as asin has items ({error})"
            raise UserError(f"{table.where(row)}: {wrong}; mend it, or leave the column out") from error
        add_titles(titles, ((item, str(name)) for item, name in zip(items, names, strict=True) if name is not None))
    return from_sequences(rows, table.where, True, titles=titles)
