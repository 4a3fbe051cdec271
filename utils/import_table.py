"""An item table from a file that somebody else wrote: .npy, .safetensors, .csv or .tsv. No pickle is ever read."""

import csv
import io
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from utils.catalogue import Catalogue
from utils.checked import load_tensors, unreadable
from utils.errors import UserError

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
WHAT = "(item|product|movie|book|track|song|business|parent)"
ID_NAME = re.compile(rf"|#|index|i?id(:token)?|{WHAT}|{WHAT}?[ _-]?(id|asin)(:token)?", re.I)  # heads a column of ids
csv.field_size_limit(sys.maxsize)


def import_table(path: Path, order: str | None, catalogue: Catalogue) -> torch.Tensor:
    """(V + 1, d) in float32, row 0 zeros; UserError where the file does not fit the dataset's items.

    order: of the rows of an array without ids, "dataset" or "id"; None where only one fits, or both are the same.
    """
    flag, kind = f"--import_table {path}", path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{flag}: no such file")
    if kind in PICKLES:
        raise UserError(
            f"{flag}: it may run code when it is read; write the array alone: numpy.save('table.npy', array)"
        )
    if kind not in READERS:
        raise UserError(f"{flag}: its name must end in {', '.join(READERS)}")
    rows, ids = READERS[kind](path, catalogue)
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{flag}: an array of shape {rows.shape}, not one row of numbers per item")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        raise UserError(f"{flag}: row {wrong[0] + 1} holds NaN, infinity or what float32 has no number for; mend it")
    if ids is not None and order:
        raise UserError(f"--row_order {order}: {path} has item ids, which say what its rows stand for; leave it out")
    index = by_ids(flag, ids, catalogue) if ids is not None else by_order(flag, rows, order, catalogue)
    idle = np.setdiff1d(np.flatnonzero(rows.any(axis=1)), index)
    if len(idle):
        raise UserError(f"{flag}: row {idle[0] + 1} belongs to no item of the dataset, and is not zero; leave it out")
    table = np.concatenate([np.zeros_like(rows[:1]), rows[index]])
    mean = np.linalg.norm(table[1:].astype(np.float64), axis=1).mean()
    if not 1e-6 < mean < 1e6:
        raise UserError(f"{flag}: the mean norm of its rows is {mean:.1e}; scale them to about 1")
    return torch.from_numpy(table)


# --- formats: an array, and the ids of its rows where the file has them ---


def read_npy(path: Path, catalogue: Catalogue) -> tuple[np.ndarray, None]:
    try:
        rows = np.load(path, allow_pickle=False)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a damaged header raises what it likes
        raise UserError(f"--import_table {path} is no array of numbers ({error}); write it with numpy.save") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu":
        raise UserError(f"--import_table {path} is no array of real numbers; write one with numpy.save")
    return rows, None


def read_safetensors(path: Path, catalogue: Catalogue) -> tuple[np.ndarray, list[str] | None]:
    tensors = load_tensors(path, "write it anew with safetensors")
    ids = tensors.pop("item_ids", None)
    if len(tensors) != 1:
        names = ", ".join(tensors) or "none"
        raise UserError(f"--import_table {path} has {len(tensors)} tensors ({names}), not the table and item_ids alone")
    (rows,) = tensors.values()
    if rows.dtype == torch.bool or rows.is_complex():
        raise UserError(f"--import_table {path}: its tensor is {rows.dtype}, no real numbers")
    if rows.ndim != 2:
        raise UserError(f"--import_table {path}: its shape is {tuple(rows.shape)}, not one row of numbers per item")
    if ids is None or torch.equal(ids.long(), torch.arange(len(rows))):  # as step 2 numbers them
        return rows.float().numpy(), None
    if ids.is_floating_point() or ids.shape != rows.shape[:1]:
        raise UserError(f"--import_table {path}: item_ids are {ids.dtype} {tuple(ids.shape)}, not one id per row")
    return rows.float().numpy(), [str(number) for number in ids.tolist()]


def read_text(path: Path, catalogue: Catalogue) -> tuple[np.ndarray, list[str]]:
    """A line per item: its id, then its numbers, in columns of their own or in one, separated by spaces."""
    flag = f"--import_table {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = next((mark for mark in "\t,;" if mark in text.partition("\n")[0]), None)
        if separator is None:
            raise UserError(f"{flag}: no tab, comma or semicolon in its first line; an id and its numbers are expected")
        quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        lines = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting, strict=True)
        cells = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag} cannot be read as UTF-8 text ({error}); write it anew") from error
    if all(not row[-1] for _, row in cells):  # each line ends with a separator
        cells = [(line, row[:-1]) for line, row in cells]
    column = 0
    if cells and is_header(cells[0][1], catalogue):
        names = [name.lower().removesuffix(":token") for name in cells[0][1]]
        column = names.index("item_id") if "item_id" in names else 0
        more = [name for at, name in enumerate(cells[0][1]) if at != column and ID_NAME.fullmatch(name)]
        if more:
            raise UserError(f"{flag}: columns {names[column]!r} and {more[0]!r} are both of ids; leave one of them out")
        cells = cells[1:]
    ids, rows = [], []
    for line, row in cells:
        if column < len(row):
            ids.append(row.pop(column))
        if "" in row:
            raise UserError(f"{flag}, line {line}: a cell is empty; every row needs an id and all its numbers")
        numbers = " ".join(row).split()
        try:
            rows.append(np.array(numbers, np.float64))
        except ValueError as error:
            raise UserError(f"{flag}, line {line}: {error}") from error
        if len(numbers) != len(rows[0]) or len(ids) != len(rows):
            raise UserError(f"{flag}, line {line}: {len(numbers)} numbers, but {len(rows[0])} in the first row")
    if not rows:
        raise UserError(f"{flag} holds no row of numbers")
    return np.stack(rows), ids


def is_header(cells: list[str], catalogue: Catalogue) -> bool:
    """Whether the first line of a text is none of an item: not the id of one, and names beside it or above it."""
    if cells[0] in catalogue.ids:
        return False
    numbers = [re.fullmatch(r"[-+.\deE ]+|[-+]?(nan|inf(inity)?)", cell, re.I) for cell in cells[1:]]
    return ID_NAME.fullmatch(cells[0]) is not None or not all(numbers)


READERS = {".npy": read_npy, ".safetensors": read_safetensors, ".csv": read_text, ".tsv": read_text}


# --- which row is whose ---


def by_ids(flag: str, ids: list[str], catalogue: Catalogue) -> np.ndarray:
    """(V,): the row of item 1, 2, ..."""
    known = set(catalogue.ids)
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise UserError(
            f"{flag}: {len(unknown):,} ids are of no item of the dataset, {unknown[0]!r} for one; leave them out"
        )
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{flag}: {name!r} has {count} rows; leave one")
    row = {name: at for at, name in enumerate(ids)}
    lacking = [name for name in catalogue.ids if name not in row]
    if lacking:
        advice = "give each a row, of zeros where nothing is known"
        raise UserError(f"{flag}: {len(lacking):,} items have no row, {lacking[0]!r} for one; {advice}")
    return np.array([row[name] for name in catalogue.ids])


def by_order(flag: str, rows: np.ndarray, order: str | None, catalogue: Catalogue) -> np.ndarray:
    """The same of an array without ids, whose rows are those of items.tsv, or have original ids as their numbers."""
    size, padded = len(catalogue), not rows[0].any()  # a first row of zeros is the padding
    found = {}
    if len(rows) == size or (len(rows) == size + 1 and padded):
        found["dataset"] = np.arange(size) + len(rows) - size
    if all(re.fullmatch(r"0|[1-9]\d{0,11}", name) for name in catalogue.ids):
        numbers = np.array(catalogue.ids, np.int64)
        if numbers.max() < len(rows):
            found["id"] = numbers
        elif numbers.max() == len(rows) and numbers.min() > 0:  # the first row is that of id 1
            found["id"] = numbers - 1
    if not found or (order and order not in found):
        first = "" if padded else ", the first of them not zero"
        how = f" as --row_order {order}" if order else ""
        raise UserError(
            f"{flag} has {len(rows):,} rows{first}, which do not fit the dataset's {size:,} items{how}; bring a row "
            "per item, with a row of zeros before them if any, or a .csv with item ids"
        )
    if order is None and len({tuple(index) for index in found.values()}) > 1:
        raise UserError(
            f"{flag}: its rows may be in the order of the dataset's items.tsv, or of the original ids, which differ "
            "here; say which: --row_order dataset or --row_order id"
        )
    return found[order or next(iter(found))]
