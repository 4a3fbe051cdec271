"""Interaction sequences, the leave-one-out split, training examples and batches.

A dataset folder (`datasets/README.md` describes the format) holds every user's items as one flat array in time
order. Nothing here copies it: splits and examples are index ranges into that array, and a batch is cut out of it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from utils.checked import INFO, attributes_fingerprint, fingerprint_of, read_array, read_json
from utils.errors import UserError
from utils.files import is_plain_name

MIN_INTERACTIONS = 3  # one item each to train on, to validate on and to test on


def consecutive(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """counts[i] whole numbers from begin[i] on, one range after the other."""
    return np.arange(counts.sum()) + np.repeat(begin - (np.cumsum(counts) - counts), counts)


def no_attributes() -> np.ndarray:
    return np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Sequences:
    """All users' items, oldest first.

    items: (total,) int32, ids 1..num_items; 0 is padding and never occurs.
    offsets: (users + 1,) int64; user u owns items[offsets[u]:offsets[u + 1]].
    users: (kept,) the users with at least three interactions, the only ones that are split and ranked.
    fingerprint: SHA-256 of what the arrays hold, as the dataset's maker recorded it.
    folder: where they were read, None for sequences made in memory.
    attributes: (pairs, 2) int32, item 1..num_items and attribute 1..; none where the dataset has no attributes.
    """

    name: str
    items: np.ndarray
    offsets: np.ndarray
    num_items: int
    users: np.ndarray
    fingerprint: str
    folder: Path | None = None
    attributes: np.ndarray = field(default_factory=no_attributes)

    @classmethod
    def load(cls, folder: Path) -> "Sequences":
        """Read a dataset folder; raises UserError where it is incomplete, empty or holds impossible ids."""
        info = read_json(folder / "dataset.json", f"{folder} is no dataset: make one with datasets/process.py", INFO)
        remake = "make it anew with datasets/process.py"
        items, offsets = (read_array(folder / f"{name}.npy", remake) for name in ("items", "offsets"))
        name, num_items, fingerprint = info["name"], info["items"], info["fingerprint"]
        if (items.dtype, offsets.dtype) != (np.int32, np.int64):
            raise UserError(f"dataset {folder}: items.npy is {items.dtype}, offsets.npy {offsets.dtype}; {remake}")
        if not is_plain_name(name):  # runs are written to a folder of that name
            raise UserError(f"dataset {folder}: dataset.json has the name {name!r}, no plain name; {remake}")
        if items.ndim != 1 or offsets.ndim != 1 or not len(items):
            raise UserError(f"dataset {folder} is empty; {remake}")
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(items) or (offsets[1:] < offsets[:-1]).any():
            raise UserError(f"dataset {folder}: offsets.npy does not fit items.npy; {remake}")
        low, high = int(items.min()), int(items.max())
        if low < 1 or high > num_items:
            raise UserError(f"dataset {folder}: item ids {low}..{high} outside 1..{num_items}; {remake}")
        if fingerprint_of(items, offsets, num_items) != fingerprint:
            raise UserError(f"dataset {folder} is not as it was made: its fingerprint is another; {remake}")
        users = np.flatnonzero(np.diff(offsets) >= MIN_INTERACTIONS)
        if not len(users):
            raise UserError(f"dataset {folder}: no user has {MIN_INTERACTIONS} interactions to split; bring more data")
        attributes = no_attributes()
        if "attributes" in info:
            attributes, limits = read_array(folder / "attributes.npy", remake), [num_items, info["attributes"]]
            fit = attributes.dtype == np.int32 and attributes.ndim == 2 and attributes.shape[1] == 2
            fit = fit and (attributes >= 1).all() and (attributes <= limits).all()
            if not fit or attributes_fingerprint(attributes) != info["attributes_fingerprint"]:
                raise UserError(f"dataset {folder}: attributes.npy is not as it was made; {remake}")
        return cls(name, items, offsets, num_items, users, fingerprint, folder, attributes)

    def training_part(self) -> "TrainingPart":
        """All but the last two items of every kept user (leave-one-out)."""
        begin = self.offsets[self.users]
        lengths = self.offsets[self.users + 1] - 2 - begin
        users, items = np.repeat(self.users, lengths), self.items[consecutive(begin, lengths)]
        return TrainingPart(self.num_items, len(self.offsets) - 1, users, items, self.attributes)

    def describe(self) -> str:
        dropped, count = len(self.offsets) - 1 - len(self.users), len(np.unique(self.attributes[:, 0]))
        attributes = f", {count:,} items with attributes" if count else ""
        return (
            f"dataset {self.name}: {len(self.users):,} users, {self.num_items:,} items, {len(self.items):,} "
            f"interactions ({dropped:,} users with fewer than {MIN_INTERACTIONS} interactions dropped){attributes}"
        )


@dataclass(frozen=True)
class TrainingPart:
    """What a model may know of the data when it is built: the interactions that training sees, and items' attributes.

    users, items (interactions,): who met what, users in order and each user's oldest first. Users are numbered
    0..num_users - 1, items 1..num_items. attributes: of items, as those of `Sequences`.
    """

    num_items: int
    num_users: int
    users: np.ndarray
    items: np.ndarray
    attributes: np.ndarray = field(default_factory=no_attributes)

    def counts(self) -> np.ndarray:
        """(V + 1,) int64: how often each item occurs."""
        return np.bincount(self.items, minlength=self.num_items + 1)


@dataclass(frozen=True)
class Examples:
    """What to predict from what, as positions in `Sequences.items`.

    Example i, of user users[i], reads items[start[i]:end[i]] and asks for items[first[i]:end[i] + 1], each from those
    before it. With first == end it is one history and one target.
    """

    items: np.ndarray
    users: np.ndarray
    start: np.ndarray
    first: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.end)

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start

    @property
    def num_targets(self) -> np.ndarray:
        """Targets of each example."""
        return self.end - self.first + 1

    def only(self, index: np.ndarray) -> "Examples":
        """The examples `index`."""
        return Examples(self.items, self.users[index], self.start[index], self.first[index], self.end[index])

    def target_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows of the examples `index` in an array with one row per target of all examples, in order."""
        counts = self.num_targets[index]
        low = np.cumsum(self.num_targets)[index] - counts
        return consecutive(low, counts)

    def single_targets(self, offsets: np.ndarray, max_length: int) -> "Examples":
        """One example per target, in order: the user's `max_length` items before it, also those before a window.

        offsets: of the sequences that the examples were cut from.
        """
        counts = self.num_targets
        end = consecutive(self.first, counts)
        users = np.repeat(self.users, counts)
        return Examples(self.items, users, np.maximum(offsets[users], end - max_length), end, end)

    def batch(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Cut out the examples `index`, left-padded with 0 to the longest of them.

        Returns users (B,), histories (B, T) and targets (B, T); targets[b, t] is the item to predict after
        histories[b, :t + 1], 0 where there is no target. The last column always has one.
        """
        width = int(self.lengths[index].max())
        position = self.end[index][:, None] - width + np.arange(width)  # (B, T)
        inside = position >= self.start[index][:, None]
        histories = np.where(inside, self.items[np.maximum(position, 0)], 0)
        target_mask = inside & (position + 1 >= self.first[index][:, None])
        targets = np.where(target_mask, self.items[np.maximum(position + 1, 0)], 0)
        batch = {"users": self.users[index], "histories": histories, "targets": targets}
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}


def parse_train_targets(train_targets: str) -> int:
    """How many of a user's last training targets are used: `last` is 1, `all` is -1, otherwise the number given."""
    fixed = {"last": 1, "all": -1}
    if train_targets in fixed:
        return fixed[train_targets]
    if re.fullmatch("[0-9]{1,18}", train_targets) and int(train_targets) > 0:
        return int(train_targets)
    raise UserError(f"--train_targets {train_targets!r}: expected last, all or a number of at least 1")


def training_examples(data: Sequences, train_targets: str, max_length: int) -> Examples:
    """The training part of every user: all but the last two items (leave-one-out).

    `last` asks for one target per user, with the `max_length` items before it as history: the released protocol. With
    more targets, a user's training part is cut into windows of at most `max_length` items, the newest first, and each
    target is asked in exactly one of them, so one that comes early in its window has a shorter history. A user whose
    training part is a single item has no history and gives no example.
    """
    count = parse_train_targets(train_targets)
    begin, stop = data.offsets[data.users], data.offsets[data.users + 1] - 2  # training part: [begin, stop)
    first = begin + 1 if count < 0 else np.maximum(begin + 1, stop - count)
    windows = -(-(stop - first) // max_length)  # of each user; 0 where first == stop
    user = np.repeat(np.arange(len(windows)), windows)
    back = consecutive(np.zeros_like(windows), windows)
    end = stop[user] - 1 - back * max_length
    start = np.maximum(begin[user], end - max_length)
    return Examples(data.items, data.users[user], start, np.maximum(first[user], start + 1), end)


def split_examples(data: Sequences, split: str, max_length: int) -> Examples:
    """One example per kept user: `valid` asks for the item before the last, `test` for the last."""
    end = data.offsets[data.users + 1] - {"valid": 2, "test": 1}[split]
    return Examples(data.items, data.users, np.maximum(data.offsets[data.users], end - max_length), end, end)


@lru_cache(maxsize=1)
def shuffled_batches(examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Example indices of each batch of an epoch; a pure function of its arguments, so that a run can resume in it."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return [order[at : at + batch_size] for at in range(0, examples, batch_size)]


def planned_steps(config: dict, per_epoch: int) -> int:
    """Steps of training: `max_steps`, or else `num_epochs` of `per_epoch` steps."""
    return config["max_steps"] if config["max_steps"] > 0 else math.ceil(config["num_epochs"] * per_epoch)


def visited_examples(examples: int, config: dict) -> np.ndarray:
    """Examples that training sees, in order: all of them, unless it ends within the first epoch."""
    batches = shuffled_batches(examples, config["batch_size"], config["seed"], 0)
    return np.sort(np.concatenate(batches[: planned_steps(config, len(batches))]))


def sorted_batches(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """All examples once, longest first (a batch that does not fit in memory shows at once)."""
    order = np.argsort(-lengths, kind="stable")
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]


def check_same_dataset(data: Sequences, config: dict, where: Path) -> None:
    """Raise UserError unless the run in `where`, of this `config`, was made from these very sequences."""
    if config.get("dataset_fingerprint") != data.fingerprint:
        name = Path(config.get("dataset") or data.name).name
        advice = (
            "run its step again"
            if name in (data.name, data.folder and data.folder.name)
            else f"it is of --dataset {config['dataset']}"
        )
        raise UserError(f"{where} was made from another dataset than {data.name} as it is now; {advice}")
