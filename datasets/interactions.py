"""Interactions in memory, with ids and titles that fit on a line of every file that is written."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from times import Times

from utils.errors import UserError

BREAKS = re.compile(  # what would end a line or a list, or be no UTF-8; a single space between two words may stay
    r"[^\S ]|[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff]|^ | \Z|(?<= ) | (?= )"
)
ARRAYS = ("items", "offsets", "timestamps")  # the files of a dataset that hold its interactions, NAME.npy
SPACE = "\\u0020"  # as it stands in a list that spaces separate
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
USUAL = re.compile(
    r"(user|item|movie|product|book|business|reviewer|customer|track|artist)[ _-]?(id|name)?|uid|iid|(parent_)?asin"
)


@dataclass(frozen=True)
class Interactions:
    """Rows as read: user and item are codes into user_ids and item_ids, which hold the source's own ids."""

    user: np.ndarray  # (rows,) int32
    item: np.ndarray  # (rows,) int32
    user_ids: list[str]
    item_ids: list[str]
    time: Times | None = None
    rating: np.ndarray | None = None  # (rows,) float64
    titles: dict[str, str] | None = None  # by item id; None where the source has none
    bad_lines: int = 0
    keep_order: bool = False  # rows are in the order of a dataset, which need not be that of time
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each

    def take(self, rows: np.ndarray) -> "Interactions":
        """The same with the rows of a mask or an index array."""
        time = self.time and replace(self.time, values=self.time.values[rows])
        rating = None if self.rating is None else self.rating[rows]
        return replace(self, user=self.user[rows], item=self.item[rows], time=time, rating=rating)


def on_line(text: str) -> str:
    """An id with what would split its line written as \\uXXXX; every other id as it is."""
    return BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace(SPACE, " "))


def in_list(text: str) -> str:
    """The same for a list that spaces separate; on_line takes it back."""
    return on_line(text).replace(" ", SPACE)


def title_of(title: str) -> str:
    return " ".join(UNWRITABLE.sub(lambda found: " " if found[0] < "\ud800" else "\ufffd", title).split())


def as_lines(ids: Iterable[str]) -> list[str]:
    """on_line of ids that differ; UserError where two become the same."""
    seen: dict[str, str] = {}
    for text in ids:
        line = on_line(text)
        if line in seen:
            raise UserError(f"the ids {seen[line]!r} and {text!r} are both written as {line}; rename one")
        seen[line] = text
    return list(seen)


def check_roles(names: dict[str, str | None]) -> None:
    """UserError where one column is to be the user and the item."""
    if names["user"] == names["item"]:
        raise UserError(f"--user and --item are both {names['user']}; name two columns")


def from_columns(user: Iterable[str], item: Iterable[str], **rest) -> Interactions:
    """Codes from columns of ids, numbered by first appearance."""
    user_codes, user_ids = pd.factorize(np.asarray(user, object))
    item_codes, item_ids = pd.factorize(np.asarray(item, object))
    codes = {"user": user_codes.astype(np.int32), "item": item_codes.astype(np.int32)}
    return Interactions(**codes, user_ids=as_lines(user_ids), item_ids=as_lines(item_ids), **rest)


def add_titles(titles: dict[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    """Take over (item id, title) of items without one; an empty title is none."""
    for item, title in pairs:
        item, title = on_line(item), title_of(title)
        if title:
            titles.setdefault(item, title)


def is_header(user: str, item: str) -> bool:
    """Whether two values are the usual names of columns of users and items."""
    return all(USUAL.fullmatch(text.partition(":")[0].lower().strip()) for text in (user, item))
