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
    found = {on_line(name): value for name, value in pairs}
    if len(found) < len(pairs):
        names = [on_line(name) for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def read_attributes(path: Path, item_ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Item number from 1 and attribute number from 1 (pairs, 2), int32, sorted, and the attributes' own ids.

    The file is a JSON object with a list of attributes, each text or a whole number, for each item id. Items that the
    dataset does not have are passed over; UserError where it has none of them.
    """
    try:
        listed = json.loads(b"".join(json_blocks(path)), object_pairs_hook=no_name_twice)
        if not isinstance(listed, dict):
            raise ValueError(f"it holds a {type(listed).__name__}")
        for name, attributes in listed.items():
            if not isinstance(attributes, list) or not all(type(one) in (str, int) and str(one) for one in attributes):
                raise ValueError(f"item {name!r:.60} has {attributes!r:.60}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object of the form {SHAPE} ({error}); mend it") from error
    numbers: dict[str, int] = {}
    pairs = {
        (item, numbers.setdefault(str(one), len(numbers) + 1))
        for item, name in enumerate(item_ids, 1)
        for one in listed.get(name, ())
    }
    if not pairs:
        known = f"such as {next(iter(listed))!r}" if listed else "as it is empty"
        raise UserError(f"{path} has attributes of no item of the dataset ({known} and {item_ids[0]!r}); give its own")
    return np.array(sorted(pairs), np.int32), as_lines(numbers)
