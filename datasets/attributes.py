"""Attributes of items, such as categories and brands, from a file."""

import json
from pathlib import Path

import numpy as np
from interactions import as_lines, on_line
from sources import json_blocks

from utils.errors import UserError

SHAPE = '{"item id": ["attribute", ...], ...}'


def no_name_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which the usual reader would keep the last of equal names; ValueError where there are such."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if found.setdefault(on_line(name), value) is not value:
            raise ValueError(f"{name!r:.60} stands twice")
    return found


def read_attributes(path: Path) -> dict[str, list[str]]:
    """The attributes of each item id: a JSON object of lists, of text or whole numbers."""
    try:
        listed = json.loads(b"".join(json_blocks(path)), object_pairs_hook=no_name_twice)
        if not isinstance(listed, dict):
            raise ValueError(f"it holds a {type(listed).__name__}")
        for name, attributes in listed.items():
            if not isinstance(attributes, list) or not all(type(one) in (str, int) and str(one) for one in attributes):
                raise ValueError(f"item {name!r:.60} has {attributes!r:.60}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object of the form {SHAPE} ({error}); mend it") from error
    if not any(listed.values()):
        raise UserError(f"{path} has an attribute of no item; give another file, or leave out --attributes")
    return {name: list(map(str, attributes)) for name, attributes in listed.items()}


def number_attributes(path: Path, listed: dict[str, list[str]], item_ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers from 1 of an item and of an attribute that it has (pairs, 2), int32, sorted, and the attributes' own ids.

    Items that the dataset does not have are passed over; UserError where it has none of them.
    """
    numbers: dict[str, int] = {}
    pairs = {
        (item, numbers.setdefault(one, len(numbers) + 1))
        for item, name in enumerate(item_ids, 1)
        for one in listed.get(name, ())
    }
    if not pairs:
        theirs = next(name for name, attributes in listed.items() if attributes)
        has = f"it has item {theirs!r:.60}, the dataset {item_ids[0]!r:.60}"
        raise UserError(f"{path} has an attribute of no item that is left ({has}); give the file of these items")
    try:
        return np.array(sorted(pairs), np.int32), as_lines(numbers)
    except UserError as error:
        raise UserError(f"{path}: of attributes, {error}") from error
