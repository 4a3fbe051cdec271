"""The candidates of the sampled protocol: drawn per user, the same for every model."""

import math
import os
import tempfile
from contextlib import suppress

import numpy as np

from utils.data import Sequences, consecutive

NUM_NEGATIVES = 999
CANDIDATE_SEED = 20240527  # candidates have a seed of their own: a run's --seed never changes who is ranked
SPLITS = ("valid", "test")
NEGATIVES_AT_ONCE = 2**27  # 512 MiB: of more users than have so many, they never stand in memory together


class Negatives:
    """`draw_negatives` of all kept users; those of a part are drawn when they are first asked for: `negatives[part]`.

    shape: (users, num). What was drawn is kept: in memory where that of all users fits, else in a temporary file.
    """

    def __init__(self, data: Sequences, split: str, num: int = NUM_NEGATIVES, seed: int = CANDIDATE_SEED) -> None:
        self.data, self.split, self.num, self.seed = data, split, num, seed
        self.shape = (len(data.users), num)
        self.kept: dict[tuple[int, int], np.ndarray | int] = {}  # of each part, itself or where it begins in the file
        self.file = None

    def __getitem__(self, part: slice) -> np.ndarray:
        low, high, _ = part.indices(self.shape[0])
        found = self.kept.get((low, high))
        if isinstance(found, int):
            self.file.seek(found)
            return np.fromfile(self.file, np.int32, (high - low) * self.num).reshape(-1, self.num)
        if found is None:
            found = draw_negatives(self.data, self.split, self.num, self.seed, slice(low, high))
            if self.shape[0] * self.num <= NEGATIVES_AT_ONCE:
                self.kept[low, high] = found
            else:
                with suppress(OSError):  # without room for it they are drawn again
                    self.file = self.file or tempfile.TemporaryFile()  # noqa: SIM115
                    begins = self.file.seek(0, os.SEEK_END)
                    self.file.write(found.data)
                    self.kept[low, high] = begins
        return found


def block_size(num_items: int) -> int:
    """Users whose negatives are drawn together, from one seed."""
    return max(1, 2**24 // (num_items + 1))


def parts(data: Sequences, num: int, processes: int = 1) -> list[slice]:
    """The kept users in parts whose negatives, `num` of each, fit in memory.

    With several processes the number of parts is a multiple of theirs, and parts have nearly the same size, if there
    are enough blocks of users.
    """
    block, users = block_size(data.num_items), len(data.users)
    most = max(1, NEGATIVES_AT_ONCE // (max(1, num) * block)) * block
    number = processes * math.ceil(users / (processes * most))
    blocks = users / (number * block)
    size = max(1, math.ceil(blocks) if processes == 1 else round(blocks)) * block
    return [slice(low, min(low + size, users)) for low in range(0, users, size)]


def negative_counts(data: Sequences, num: int = NUM_NEGATIVES) -> np.ndarray:
    """(users,): how many negatives each kept user has, as all items that it never touched may be fewer than `num`."""
    row, item = seen_pairs(data, data.users, data.offsets[data.users + 1])
    distinct = np.unique(row * (data.num_items + 1) + item) // (data.num_items + 1)
    return np.minimum(data.num_items - np.bincount(distinct, minlength=len(data.users)), num)


def draw_negatives(
    data: Sequences,
    split: str,
    num: int = NUM_NEGATIVES,
    seed: int = CANDIDATE_SEED,
    part: slice = slice(None),
) -> np.ndarray:
    """Draw `num` negatives per kept user, uniform without replacement over the items outside the user's sequence.

    Returns (users, num) int32. Depends on the data, the split and the seed alone, so every model is ranked on the
    same candidates. A user with fewer unseen items gets all of them, and 0 in the places left over. part: of the kept
    users, whole blocks of them, as `parts` has.

    Ids are drawn with replacement and kept in order when neither seen nor drawn before, which is the same
    distribution; `first` remembers, per user and item, the position of the first draw (or that it was seen).
    """
    width = data.num_items + 1
    rows_at_once, rows_in_cache = block_size(data.num_items), max(1, 2**18 // width)
    begin, end, _ = part.indices(len(data.users))
    if begin % rows_at_once or (end % rows_at_once and end < len(data.users)):
        raise ValueError(f"users {begin} to {end} are no whole blocks of {rows_at_once}")
    asked = data.users[begin:end]
    out = np.zeros((len(asked), num), np.int32)
    firsts = np.empty((min(rows_at_once, len(asked)), width), np.int32)
    for low in range(0, len(asked), rows_at_once):
        users = asked[low : low + rows_at_once]
        rng = np.random.default_rng([seed, SPLITS.index(split), (begin + low) // rows_at_once])
        seen_row, seen_item = seen_pairs(data, users, data.offsets[users + 1])
        first = firsts[: len(users)]
        first.fill(-1)  # not drawn
        first[seen_row, seen_item] = -2
        wanted = np.minimum((first[:, 1:] == -1).sum(1), num)
        first = first.reshape(-1)  # (users * width,)
        filled = np.zeros(len(users), np.int64)
        rows = np.arange(len(users))
        drawn = 0
        while len(rows):
            all_draws = rng.integers(1, width, (len(rows), num + num // 8 + 8), dtype=np.int32)
            position = drawn + np.arange(all_draws.shape[1], dtype=np.int32)
            for at in range(0, len(rows), rows_in_cache):
                some, draws = rows[at : at + rows_in_cache], all_draws[at : at + rows_in_cache]
                cell = some[:, None] * width + draws  # (some, draws) in `first`
                # Of equal places the one written last stays: backwards (in memory too, NumPy would turn a view round
                # again), it is the first one drawn.
                backwards = cell[:, ::-1].copy()
                known = first[backwards]
                first[backwards] = np.where(known == -1, position[::-1], known)
                fresh = first[cell] == position
                slot = filled[some][:, None] + np.cumsum(fresh, 1) - 1
                row_of, col_of = np.nonzero(fresh & (slot < wanted[some][:, None]))
                out[low + some[row_of], slot[row_of, col_of]] = draws[row_of, col_of]
                filled[some] += np.bincount(row_of, minlength=len(some))
            drawn += all_draws.shape[1]
            rows = rows[filled[rows] < wanted[rows]]
    return out


def seen_pairs(data: Sequences, users: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and item ids of all that `users` touched before position `stop` of the flat array: two (pairs,) arrays."""
    counts = stop - data.offsets[users]
    row = np.repeat(np.arange(len(users)), counts)
    position = consecutive(data.offsets[users], counts)
    return row, data.items[position]
