"""Columns of a CSV, TSV or Parquet file as text, with the line that each row stands in."""

import argparse
import codecs
import csv
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from interactions import is_header
from sources import is_parquet, text_of
from times import is_value

from utils.errors import UserError

RECBOLE = re.compile(r":(token|float)(_seq)?$")
ALWAYS_QUOTED = ",;"  # separators of files in which a quote at the start of a field always quotes it
csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True)
class Layout:
    """How a table is written; a separator that is None is found out, columns that are None stand in a header line."""

    encoding: str = "utf-8"
    separator: str | None = None
    columns: tuple[str, ...] | None = None
    prefix: str = ""  # of the flags

    @property
    def no_header(self) -> str:
        example = "item_id,title" if self.prefix else "user,item,rating,timestamp"
        flags = f"--{self.prefix}header none --{self.prefix}columns {example}"
        return f"a file without a header line is read with {flags}, all its columns in their order"

    @classmethod
    def of(cls, args: argparse.Namespace, prefix: str = "") -> "Layout":
        """From the flags --encoding, --separator, --header and --columns, or those of the titles file."""
        encoding, separator, header, columns = (
            getattr(args, f"{prefix}{name}", None) for name in ("encoding", "separator", "header", "columns")
        )
        if (header == "none") != (columns is not None):
            raise UserError(
                f"--{prefix}header none and --{prefix}columns go together: a file has a header line, or none"
            )
        try:
            codecs.lookup(encoding or "utf-8")
            b" ".decode(encoding or "utf-8")
        except LookupError as error:
            raise UserError(f"--{prefix}encoding {encoding}: {error}; utf-8, utf-16 and latin-1 are usual") from error
        except UnicodeError:
            pass  # a single byte is no text in UTF-16
        separator = {"tab": "\t", r"\t": "\t", "space": " "}.get(separator, separator)
        if separator is not None and (not separator or "\n" in separator or '"' in separator):
            raise UserError(f"--{prefix}separator {separator!r}: give what stands between two values (tab, ::, ;)")
        names = tuple(map(str.strip, columns.split(","))) if columns else None
        return cls(encoding or "utf-8", separator, names, prefix)


@dataclass(frozen=True)
class Table:
    names: list[str]  # of all columns of the file
    columns: pd.DataFrame  # text, "" where there is nothing
    where: Callable[[int], str]  # the file and the line of a row, for messages

    def __getitem__(self, name: str) -> pd.Series:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def first(self, mask: pd.Series | np.ndarray) -> int | None:
        """The first row of a mask, if there is one."""
        rows = np.flatnonzero(np.asarray(mask))
        return int(rows[0]) if len(rows) else None


def read_table(
    path: Path, wanted: dict[str, str | None], layout: Layout, fixed: tuple[str, ...] | None = None
) -> Table:
    """Columns renamed to the keys of `wanted`; RecBole's `name:type` headers are understood.

    wanted: new name -> name in the file, or None where the file has no such column.
    fixed: given for a format whose names no flag changes: those of the new names whose column may be absent.
    """
    find = partial(found_columns, path, wanted=wanted, layout=layout, fixed=fixed)
    if is_parquet(path):
        if (layout.encoding, layout.separator, layout.columns) != ("utf-8", None, None):
            what = f"--{layout.prefix}encoding, --{layout.prefix}separator or --{layout.prefix}columns"
            raise UserError(f"{path} is a Parquet file, on which {what} has no effect: leave it out")
        names, table, where = read_parquet(path, set(wanted.values()))
    else:
        names, table, where = read_text(path, layout, find)
    found = find(names)
    columns = pd.DataFrame({new: table[names.index(name)] for new, name in found.items()}).fillna("")
    if not len(columns):
        raise UserError(f"{path} holds no row below its header")
    return Table(names, columns, where)


def found_columns(
    path: Path, names: list[str], wanted: dict[str, str | None], layout: Layout, fixed: tuple[str, ...] | None
) -> dict[str, str]:
    """Those of `wanted` that the file has, UserError where it lacks one or has two of the name: see `read_table`."""
    found = {new: name for new, name in wanted.items() if name and (name in names or new not in (fixed or ()))}
    for new, name in found.items():
        if name not in names:
            advice = f"name yours with --{layout.prefix}{new}" if fixed is None else "this format must have it"
            alone = len(names) == 1 and f"; --{layout.prefix}separator says what stands between the columns"
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(names)}: {advice}{alone or ''}")
        if names.count(name) > 1:
            raise UserError(f"{path} has two columns of one name: {', '.join(names)}")
    return found


def read_parquet(path: Path, read: set[str | None]) -> tuple[list[str], pd.DataFrame, Callable[[int], str]]:
    try:
        table = pd.read_parquet(path, dtype_backend="numpy_nullable")
        if table.index.name is not None or isinstance(table.index, pd.MultiIndex):
            table = table.reset_index()
        names = list(map(str, table.columns))
        values = {at: table.iloc[:, at].to_numpy(object) for at, name in enumerate(names) if name in read}
        texts = pd.DataFrame({at: [as_text(value) for value in column] for at, column in values.items()})
    except ImportError as error:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow, or write it as CSV") from error
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's own errors are of these kinds
        raise UserError(f"{path} cannot be read ({error}); write it anew") from error
    return names, texts, lambda row: f"{path}, row {row + 1}"


def as_text(value: object) -> str:
    if isinstance(value, np.ndarray | list | dict):
        raise ValueError("a column holds lists; write them as text")
    if isinstance(value, bytes):
        return value.decode()
    return "" if pd.isna(value) else str(value)


def read_text(
    path: Path, layout: Layout, check: Callable[[list[str]], object]
) -> tuple[list[str], pd.DataFrame, Callable[[int], str]]:
    """Names of the columns, which pass `check` before the rows are parsed, the rows, and where each stands."""
    text = text_of(path, layout.encoding)
    blank = re.match(r"(?:[ \t]*\n)*", text)[0]
    first = re.compile("[^\n]*").match(text, len(blank))[0]
    blank = blank.count("\n")
    if not first.strip():
        raise UserError(f"{path} is empty; it needs {'' if layout.columns else 'a header line and '}one row per line")
    separator = layout.separator or next((one for one in ("\t", "::", ",", ";", "|") if one in first), ",")
    given = separator
    if len(separator.encode()) > 1:  # the parser knows separators of one byte
        spare = next((one for one in "\x1f\x1e\x1d\x1c" if one not in text), None)
        if spare is None:
            raise UserError(f"{path} holds control characters beside the separator {separator!r}; convert it first")
        text, first, separator = text.replace(given, spare), first.replace(given, spare), spare
    first = first.replace("\r", " ")
    spaced = separator != " " and any(name[:1] == " " for name in next(csv.reader([first], delimiter=separator)))
    quoted = is_quoted(text, separator, first, path, spaced)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    names = next(csv.reader([first], delimiter=separator, quoting=quoting, skipinitialspace=spaced))
    if layout.columns and len(names) != len(layout.columns):
        wrong = f"line {blank + 1} has {len(names)} values, --{layout.prefix}columns names {len(layout.columns)}"
        raise UserError(f"{path}, {wrong}; name each column (and see --{layout.prefix}separator)")
    if not layout.columns:
        names = [RECBOLE.sub("", name.strip()) for name in names]
        value = next((name for name in names if is_value(name)), None)
        if value is not None and not (len(names) > 1 and is_header(*names[:2])):
            raise UserError(f"{path}, line {blank + 1} holds values ({value}), no names of columns; {layout.no_header}")
    check(list(layout.columns or names))
    skip = blank + (layout.columns is None)
    options = {"sep": separator, "quoting": quoting, "lineterminator": "\n", "skiprows": skip, "index_col": False}
    options |= {"names": range(len(names)), "dtype": str, "keep_default_na": False, "skipinitialspace": spaced}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more fields than columns: data would be lost
            table = pd.read_csv(io.StringIO(text), **options)
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} holds no row below its header") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = f"{error}"
        for start, _, fields in records(text, separator, quoted, spaced):
            if len(fields) > len(names):
                reason = f"line {start} has {len(fields)} values, there are {len(names)} columns"
                break
        raise UserError(f"{path} cannot be parsed: {reason}") from error
    if not text.endswith("\n") and len(table) and table.iloc[-1, -1] in ("", None, np.nan):
        *_, (start, _, fields) = records(text, separator, quoted, spaced)
        if len(fields) < len(names):  # elsewhere empty values at the end of a line may be left out
            wrong = f"line {start}, the last, has {len(fields)} values and no end, there are {len(names)} columns"
            raise UserError(f"{path}, {wrong}: it was cut off; fetch it again, or end the line")

    def where(row: int) -> str:
        """Read again: a file that is right need not keep its text."""
        lines = text_of(path, layout.encoding).replace(given, separator)
        starts = (start for start, _, _ in records(lines, separator, quoted, spaced) if start > skip)
        return f"{path}, line {next(start for number, start in enumerate(starts) if number == row)}"

    return list(layout.columns or names), table.apply(without_padding, spaced=spaced), where


def without_padding(column: pd.Series, spaced: bool) -> pd.Series:
    """A space on one side of all values belongs to the separator; spaced: one stands behind each separator."""
    padded = spaced or any(side(" ", na=True).all() for side in (column.str.startswith, column.str.endswith))
    return column.str.strip(" ") if padded else column


def records(text: str, separator: str, quoted: bool, spaced: bool) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, fields) of each record that is not blank; ValueError names the line of a wrong quote."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(text.replace("\r", " "))  # which csv takes for the end of a line
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True, skipinitialspace=spaced)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"line {start}: a quote opens a value that does not end where it closes ({error})"
            ) from error
        if fields is None:
            return
        if len(fields) > 1 or (fields and fields[0].strip(" \t")):
            yield start, reader.line_num, fields


def is_quoted(text: str, separator: str, header: str, path: Path, spaced: bool) -> bool:
    """Whether quotes enclose values here, or are characters like others. spaced: spaces may stand before a value.

    Commas and semicolons: they enclose, and UserError where they cannot. Other separators: they enclose if every value
    with a quote is written as pandas writes it, or all names of the header are quoted.
    """
    if '"' not in text:
        return False
    strict = separator in ALWAYS_QUOTED
    always = strict or all(re.fullmatch('"[^"]*"', name) for name in header.split(separator))
    lines: list[str] = []
    between = re.compile(re.escape(separator) + ("" if spaced else "(?! )"))  # a comma in a sentence has a space behind
    columns = len(between.findall(header))
    try:
        for first, last, fields in records(text, separator, True, spaced):
            if always and first == last:
                continue
            lines = lines or text.replace("\r", " ").split("\n")
            written = lines[first - 1 : last]
            if last > first and sum(len(between.findall(line)) >= columns > 0 for line in written) > 1:
                raise ValueError(
                    f"line {first}: a quote opens there and closes in line {last}, over what look like rows"
                )
            if not always and '"' in "".join(written) and minimal(fields, separator) != "\n".join(written):
                return False
    except ValueError as error:
        if strict:
            raise UserError(
                f"{path}, {error}; double a quote that is part of a value, and quote the whole value"
            ) from error
        return False
    return True


def minimal(fields: list[str], separator: str) -> str:
    """A record as csv and pandas write it, quoting only what needs it."""
    line = io.StringIO()
    csv.writer(line, delimiter=separator, lineterminator="\n").writerow(fields)
    return line.getvalue().removesuffix("\n")


def numbers(table: Table, name: str) -> np.ndarray:
    """A column as float64; UserError with the line of the first that is no finite number."""
    values = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
    bad = table.first(~np.isfinite(values))
    if bad is not None:
        raise UserError(f"{table.where(bad)}: {name} {table[name].iloc[bad]!r} is no number")
    return values
