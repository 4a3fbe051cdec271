"""The items of a dataset as people know them: original ids and titles, which run folders keep."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.checked import COUNT, DAMAGE, TEXT, check, ids_fingerprint, read_json, read_text, unreadable
from utils.data import Sequences, TrainingPart
from utils.errors import UserError
from utils.files import atomic_file

CATALOGUE_FILE = "items.jsonl"


@dataclass(frozen=True)
class Catalogue:
    """Items 1..V; entry i - 1 of ids and titles is item i. counts (V + 1,): how often each occurs in training."""

    ids: list[str]
    titles: list[str]
    counts: np.ndarray

    @classmethod
    def of(cls, data: Sequences) -> "Catalogue":
        """Of a dataset folder; numbers stand for ids where the data have no folder."""
        ids, titles = [str(item) for item in range(1, data.num_items + 1)], [""] * data.num_items
        if data.folder:
            path, remake = data.folder / "items.tsv", "make it anew with datasets/process.py"
            try:
                rows = read_text(path, advice=remake).split("\n")[1:-1]
                ids, titles = map(list, zip(*(row.split("\t", 1) for row in rows), strict=True))
            except FileNotFoundError:
                raise UserError(f"{path} is missing; {remake}") from None
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}); {remake}") from error
            if len(ids) != data.num_items:
                raise UserError(f"{path} has {len(ids)} items, not {data.num_items}; {remake}")
            made = read_json(data.folder / "dataset.json", "").get("ids_fingerprint")  # early versions have none
            if made not in (ids_fingerprint(ids), None):
                raise UserError(f"{path} has other ids, or the same in another order, than when it was made; {remake}")
        return cls(ids, titles, data.training_part().counts())

    @classmethod
    def load(cls, folder: Path) -> "Catalogue":
        """Of a run folder."""
        path = folder / CATALOGUE_FILE
        try:
            rows = [json.loads(line) for line in read_text(path, advice="train the run again").split("\n") if line]
            check(path, rows, [{"id": TEXT, "title": TEXT, "count": COUNT}], advice="train the run again")
            ids, titles, counts = ([row[name] for row in rows] for name in ("id", "title", "count"))
            return cls(ids, titles, np.array([0, *counts], np.int64))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: the run was made by another version; train it again") from None
        except DAMAGE as error:
            raise unreadable(path, error, "train the run again", "is damaged") from error

    def save(self, folder: Path) -> None:
        with atomic_file(folder / CATALOGUE_FILE) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
            for name, title, count in zip(self.ids, self.titles, self.counts[1:].tolist(), strict=True):
                file.write(json.dumps({"id": name, "title": title, "count": count}, ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return len(self.ids)

    def training_part(self, num_users: int) -> TrainingPart:
        """What a model without its dataset is built from: one user, who met each item that training has once."""
        items = np.flatnonzero(self.counts)
        return TrainingPart(len(self), num_users, np.zeros_like(items), items)

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        """Numbers by title in lower case: of items that share one the most frequent in training first."""
        found: dict[str, list[int]] = {}
        for number in (np.argsort(-self.counts[1:], kind="stable") + 1).tolist():
            if title := self.titles[number - 1]:
                found.setdefault(title.casefold(), []).append(number)
        return found

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.ids, 1)}

    def _numbers(self, item: str) -> list[int]:
        """An id goes before a title, and what is written as it stands before another case."""
        for name in (item, item.casefold()):
            if name in self._by_id:
                return [self._by_id[name]]
            if name in self._by_title:
                return self._by_title[name]
        return []

    def _others(self, item: str) -> list[int]:
        """Where `item` is read as an id: the other items that have it as their title."""
        numbers = self._numbers(item)
        return [number for number in self._by_title.get(item.casefold(), []) if number not in numbers]

    def number(self, item: str) -> int | None:
        """The number of an item given by id or by title, in whatever case; of several the most frequent one."""
        return next(iter(self._numbers(item)), None)

    def doubts(self, items: Iterable[str], most: int = 20) -> list[str]:
        """Lines about items that are not there, and names that several items have: so many, and how many more."""
        odd = [item for item in dict.fromkeys(items) if len(self._numbers(item)) != 1 or self._others(item)]
        rest = [f"and {len(odd) - most:,} more such items"] if len(odd) > most else []
        return [self._doubt(item) for item in odd[:most]] + rest

    def _doubt(self, item: str) -> str:
        if others := self._others(item):
            titled = ", ".join(self.ids[number - 1] for number in others)
            return (
                f"{item!r} is an item's id, and is taken as that; it is the title of {titled} too: ids tell them apart"
            )
        if numbers := self._numbers(item):
            ids = [self.ids[number - 1] for number in numbers]
            title = f"items {', '.join(ids)} have the title {item!r}"
            return f"{title}: {ids[0]}, the most frequent, is taken; ids tell them apart"
        known = {name: [number] for name, number in self._by_id.items()} | self._by_title
        close = difflib.get_close_matches(item.casefold(), known, n=3, cutoff=0.5)
        names = [self.titles[number - 1] or self.ids[number - 1] for number in (known[name][0] for name in close)]
        meant = " or ".join(map(repr, names))
        return f"item {item!r} is not in the dataset and is skipped" + (f"; did you mean {meant}?" if meant else "")
