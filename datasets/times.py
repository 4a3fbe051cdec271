"""Timestamps without rounding: whole numbers, decimal numbers, and dates of ISO 8601.

What is stored is value * 10 ** decimals, with the fewest decimals that make all values whole. A date counts as seconds
since 1970 in UTC; one without a zone is taken as UTC.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
DATE = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ](?P<time>[0-9]{2}:[0-9]{2}(?P<seconds>:[0-9]{2})?)(?(seconds)(?:[.,](?P<fraction>[0-9]+))?)"
    r" ?(?P<zone>[Zz]|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
UNITS = {"number": "as in the source", "date": "seconds since 1970-01-01 UTC"}
TIME_NAME = re.compile(r"(time|date|(^|_)ts)s?$|timestamp", re.IGNORECASE)
RANK = "rank: the values have more digits, or decimals, than can be stored"
MOST_DECIMALS = 20  # that dataset.json may say


@dataclass(frozen=True)
class Times:
    values: np.ndarray  # (rows,) int64
    unit: str
    decimals: int = 0


def unread(names: list[str], path: Path) -> list[str]:
    """A note where a column or field that is not read looks like one of times."""
    name = next((name for name in names if TIME_NAME.search(name)), None)
    return [f"{path} has {name!r}, which is not read: --timestamp {name} orders by it"] if name else []


def is_value(text: str) -> bool:
    """Whether a text is a number or a date, and so no name of a column."""
    return bool(NUMBER.fullmatch(text.strip()) or DATE.fullmatch(text.strip()))


def moment(text: str) -> tuple[str, Decimal]:
    """("number" or "date", exact value); ValueError says what is wrong."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        try:
            kind, value = "number", Decimal(text)
        except InvalidOperation as error:
            raise ValueError(f"{text!r} has an exponent out of range") from error
    else:
        found = DATE.fullmatch(text)
        if not found:
            raise ValueError(f"{text!r} is no number and no date like 2020-05-31 or 2020-05-31T14:08:48+02:00")
        zone = (found["zone"] or "Z").upper().replace("UTC", "Z")
        try:
            when = datetime.fromisoformat(f"{found['day']}T{found['time'] or '00:00'}{zone}")
        except ValueError as error:
            raise ValueError(f"{text!r} is no date ({error})") from error
        fraction = found["fraction"] or ""
        seconds = (when - EPOCH) // timedelta(seconds=1)
        kind, value = "date", Decimal(f"{seconds * 10 ** len(fraction) + int(fraction or 0)}E-{len(fraction)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text!r} does not fit in 64 bits")
    return kind, value


def scaled(values: Sequence[Decimal]) -> tuple[np.ndarray, int | None]:
    """(values * 10 ** decimals as int64, decimals), or the ranks of the values and None where these do not fit."""
    shortest = [value.normalize(EXACT) for value in values]
    decimals = max((-value.as_tuple().exponent for value in shortest if value), default=0)
    decimals = max(0, decimals)
    if decimals <= MOST_DECIMALS:
        whole = [int(value.scaleb(decimals, EXACT)) for value in shortest]
        if all(-(2**63) <= value < 2**63 for value in whole):
            return np.array(whole, np.int64), decimals
    ranks = {value: rank for rank, value in enumerate(sorted(set(shortest)))}
    return np.array([ranks[value] for value in shortest], np.int64), None


def as_times(values: Sequence[Decimal], kind: str) -> Times:
    stored, decimals = scaled(values)
    return Times(stored, RANK, 0) if decimals is None else Times(stored, UNITS[kind], decimals)


def column(texts: pd.Series, where: Callable[[int], str]) -> Times:
    """A column of timestamps; `where` names the place of a row in messages."""
    try:
        whole = pd.to_numeric(texts)
        if whole.dtype == np.int64:  # the usual case, and the fast one
            return Times(whole.to_numpy(), UNITS["number"])
    except ValueError:
        pass
    codes, distinct = pd.factorize(texts.to_numpy(object))
    values, kinds = [], {}
    for code, text in enumerate(distinct):
        try:
            kind, value = moment(text)
        except ValueError as error:
            raise UserError(f"{where(int(np.argmax(codes == code)))}: timestamp {error}") from error
        values.append(value)
        if kind not in kinds and kinds:
            raise UserError(f"{where(int(np.argmax(codes == code)))}: {mixed(text, kind)}")
        kinds[kind] = True
    times = as_times(values, next(iter(kinds)))
    return Times(times.values[codes], times.unit, times.decimals)


def mixed(text: str, kind: str) -> str:
    other = {"number": "dates", "date": "numbers"}[kind]
    return f"timestamp {text!r} is a {kind} where those before are {other}; write all in one way"


def written(values: np.ndarray, decimals: int) -> list[str]:
    """Stored values as the numbers that they stand for."""
    if not decimals:
        return list(map(str, values.tolist()))
    return [f"{Decimal(value).scaleb(-decimals, EXACT):f}" for value in values.tolist()]
