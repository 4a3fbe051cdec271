"""Order, filters, and the funnel that tells what each step leaves."""

import argparse

import numpy as np
from interactions import Interactions

from utils.errors import UserError


def in_order(found: Interactions, order: str) -> Interactions:
    """Rows by user, then by time with ties in file order, or in file order alone (the released notebook's)."""
    keys = (found.time.values, found.user) if order == "time" else (found.user,)
    return found.take(np.lexsort(keys))  # stable, the last key sorts first


def first_of_each_pair(found: Interactions) -> np.ndarray:
    """Mask of the rows where a user meets an item for the first time."""
    key = found.user.astype(np.int64) * len(found.item_ids) + found.item
    mask = np.zeros(len(key), bool)
    mask[np.unique(key, return_index=True)[1]] = True
    return mask


def distinct(codes: np.ndarray) -> int:
    """How many different codes occur."""
    return int(np.count_nonzero(np.bincount(codes)))


def at_least(codes: np.ndarray, k: int) -> np.ndarray:
    """Mask of the rows whose code occurs at least k times."""
    return (np.bincount(codes) >= k)[codes] if len(codes) else np.zeros(0, bool)


def check_effect(args: argparse.Namespace, argv: list[str]) -> None:
    """UserError for a flag that has no effect without another one."""
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag == "--k" and args.filter != "kcore":
            raise UserError("--k has no effect without --filter kcore: add that, or leave it out")
        for owner in ("titles", "meta"):
            if flag.startswith(f"--{owner}_") and not getattr(args, owner):
                raise UserError(f"{flag} has no effect without --{owner} FILE: add that, or leave it out")


def aligned(rows: list[list[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


class Funnel:
    """What is left after each step."""

    def __init__(self, found: Interactions):
        self.found, self.steps = found, []
        self.note("read")

    def note(self, step: str) -> None:
        found = self.found
        counts = {"rows": len(found.user), "users": distinct(found.user), "items": distinct(found.item)}
        self.steps.append({"step": step} | counts | {"interactions": int(first_of_each_pair(found).sum())})

    def keep(self, step: str, mask: np.ndarray) -> None:
        self.found = self.found.take(mask)
        self.note(step)

    def table(self) -> str:
        header = list(self.steps[0])
        rows = [header] + [[f"{v:,}" if isinstance(v, int) else v for v in step.values()] for step in self.steps]
        return aligned(rows)


def apply_filters(found: Interactions, args: argparse.Namespace) -> Funnel:
    """The released notebook's steps in its order, or k-core until nothing changes, or none; then repeats."""
    funnel = Funnel(found)
    if args.filter == "paper":
        if found.rating is not None:
            funnel.keep("rating >= 3", found.rating >= 3)
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
        funnel.keep("items with >= 20", at_least(funnel.found.item, 20))
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
    if args.repeats == "first":
        funnel.keep("first of repeated items", first_of_each_pair(funnel.found))
    if args.filter == "paper":
        funnel.keep("users with >= 5", at_least(funnel.found.user, 5))
    if args.filter == "kcore":
        while True:
            mask = at_least(funnel.found.user, args.k) & at_least(funnel.found.item, args.k)
            if mask.all():
                break
            funnel.keep(f"users and items with >= {args.k}", mask)
    return funnel


def tie_share(time: np.ndarray, offsets: np.ndarray) -> float:
    """Share of neighbours within a user's sequence that have the same timestamp."""
    inner = np.ones(len(time), bool)
    inner[offsets[:-1]] = False
    same = np.concatenate([[False], time[1:] == time[:-1]]) & inner
    return float(same.sum() / max(1, inner.sum()))
