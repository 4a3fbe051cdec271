"""Files that a step reads, whoever wrote them last: each is checked before it is used, or refused in one line.

What is no plain file, has an absurd size or nests without end is refused before it is parsed. What parses is held to a
rule: a pair of words and a test, or a dictionary or list of rules. No pickle anywhere.
"""

import hashlib
import json
import re
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from utils.errors import UserError

if TYPE_CHECKING:  # datasets/process.py uses this module and needs no torch
    import torch

MOST = 2**30  # bytes of a text; those that the steps write have far fewer
MOST_JSON = 2**26
MOST_YAML = 2**20
ALIASES = 16  # of a YAML file: nested ones stand for exponentially many values
AGAIN = "run the step that writes it again"
REPLACED = "remove that folder, or choose another --output_dir"
DAMAGE = (ValueError, TypeError, LookupError, EOFError, SyntaxError, AttributeError, OverflowError, RecursionError)

Rule = tuple[str, Callable[[object], bool]] | dict | list
# a JSON escape may stand for half a character, which no file can hold
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
TEXT: Rule = ("text", lambda value: type(value) is str and not LONE_SURROGATE.search(value))
FLAG: Rule = ("true or false", lambda value: type(value) is bool)
COUNT: Rule = ("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**63)
SIZE: Rule = ("a whole number of at least 1, of 31 bits", lambda value: type(value) is int and 1 <= value < 2**31)
NUMBER: Rule = ("a number", lambda value: type(value) in (int, float) and abs(value) < 1e300)
SINGLE: Rule = ("a single value", lambda value: value is None or type(value) in (str, bool) or NUMBER[1](value))


def maybe(rule: Rule) -> Rule:
    """`rule`, or null."""
    words, test = rule
    return f"{words} or null", lambda value: value is None or test(value)


# dataset.json
INFO: Rule = {"name": TEXT, "fingerprint": TEXT, "order": TEXT, "density": NUMBER} | {
    **dict.fromkeys(("users", "items", "attributes"), SIZE),
    **dict.fromkeys(("attributes_fingerprint", "ids_fingerprint"), TEXT),
    **{"interactions": COUNT, "timestamp_ties": maybe(NUMBER)},
    "timestamp_decimals": maybe(("a whole number from 0 to 20", lambda value: COUNT[1](value) and value <= 20)),
}


def check(path: Path, value: object, rule: Rule, name: str = "", advice: str = AGAIN) -> None:
    """UserError unless `value`, which `path` has as `name`, is as `rule` says. A key that it lacks is passed over.

    The key "*" of a rule stands for all that have none of their own.
    """
    kinds = {dict: "an object", list: "a list"}
    if type(rule) in kinds and not isinstance(value, type(rule)):
        rule = (kinds[type(rule)], lambda value: False)
    if isinstance(rule, dict):
        for key, part in value.items():
            if (found := rule.get(key, rule.get("*"))) is not None:
                check(path, part, found, f"{name}.{key}" if name else key, advice)
    elif isinstance(rule, list):
        for at, part in enumerate(value):
            check(path, part, rule[0], f"{name}[{at}]", advice)
    elif not rule[1](value):
        text = f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else repr(value)
        raise UserError(f"{path}: {name or 'it'} is {text[:60]}, expected {rule[0]}; {advice}")


def check_file(path: Path, most: int | None = None) -> None:
    """UserError for a folder, a pipe, a device, or more than `most` bytes; OSError for what is not there or closed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no plain file; remove it and {AGAIN}")
    if most is not None and status.st_size > most:
        raise UserError(f"{path} has {status.st_size:,} bytes, which no such file has; {AGAIN}")
    path.open("rb").close()  # safetensors takes a file that may not be read for one that is missing


def unreadable(path: Path, error: Exception, advice: str = AGAIN, how: str = "cannot be read") -> UserError:
    """The one line for what went wrong with `path`."""
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read ({error.strerror}): ask its owner, or make one of your own")
    text = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    return UserError(f"{path} {how} ({text[:300]}); {advice}")


def read_text(path: Path, encoding: str = "utf-8", advice: str = AGAIN, most: int = MOST) -> str:
    """The text of a plain file; FileNotFoundError where there is none."""
    try:
        check_file(path, most)
        return path.read_text(encoding=encoding)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a file where its folder is meant
        raise FileNotFoundError(*error.args) from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error, advice) from error


class FromFile(dict):
    """What a file holds; a key that it lacks is a UserError that names the file."""

    def __init__(self, path: Path, values: dict) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> None:
        raise UserError(f"{self.path} has no {key!r}; {AGAIN}")


def read_json(path: Path, missing: str, rule: Rule | None = None, advice: str = AGAIN) -> dict:
    """A JSON object as `rule` says; UserError with the text `missing` where there is no file."""

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no number")

    try:
        text = read_text(path, advice=advice, most=MOST_JSON)
        value = json.loads(text, object_hook=partial(FromFile, path), parse_constant=no_number)
    except FileNotFoundError as error:
        raise UserError(missing) from error
    except DAMAGE as error:
        raise unreadable(path, error, advice) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {advice}")
    check(path, value, rule or {}, advice=advice)
    return value


class CheckedYaml(yaml.SafeLoader):
    """PyYAML would keep the last of equal names and drop the others, and follow aliases without end."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > ALIASES:
                raise yaml.YAMLError(f"more than {ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names: set[str] = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not key.tag.endswith((":str", ":merge")):
                raise yaml.YAMLError(f"{line}: {key.value if isinstance(key.value, str) else 'a name'} is no text")
            if key.value in names:
                raise yaml.YAMLError(f"{line}: {key.value} stands twice in one section")
            names.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A YAML mapping whose names are text, {} of an empty file; FileNotFoundError where there is none."""
    try:
        value = yaml.load(read_text(path, "utf-8-sig", "mend it", MOST_YAML), CheckedYaml)
        json.dumps(value, default=str)  # ValueError for a number of thousands of digits, which Python will not print
    except (yaml.YAMLError, *DAMAGE) as error:
        raise UserError(f"{path} is no YAML: {str(error)[:300]}; mend it") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: expected name: value lines; mend it")
    return value or {}


def read_array(path: Path, advice: str = AGAIN) -> np.ndarray:
    """An array as `np.save` writes it, mapped into memory; UserError where the file holds none."""
    try:
        check_file(path)
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays")
        return found
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged header raises what it likes
        raise unreadable(path, error, advice) from error


def fingerprint_of(items: np.ndarray, offsets: np.ndarray, num_items: int) -> str:
    """SHA-256 of what a dataset's arrays hold, as datasets/process.py records it."""
    digest = hashlib.sha256()
    for part in (np.ascontiguousarray(items), np.ascontiguousarray(offsets), str(num_items).encode()):
        digest.update(part)
    return digest.hexdigest()


def attributes_fingerprint(pairs: np.ndarray) -> str:
    """SHA-256 of the attributes of a dataset's items, as datasets/process.py records it."""
    return hashlib.sha256(np.ascontiguousarray(pairs)).hexdigest()


def ids_fingerprint(ids: list[str]) -> str:
    """SHA-256 of the original ids of a dataset's items in their order, as datasets/process.py records it."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def check_tensors(path: Path, advice: str) -> None:
    """UserError unless `path` holds safetensors as long as its header says; the values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        check_file(path)
        with safe_open(path, "numpy"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except (SafetensorError, OSError, *DAMAGE) as error:
        raise unreadable(path, error, advice, "is damaged") from error


def load_tensors(path: Path, advice: str = AGAIN) -> dict[str, "torch.Tensor"]:
    """Read safetensors; UserError where the file is missing or damaged, or holds NaN or infinity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_file(path)
        found = load_file(path)
        odd = [
            name for name, value in found.items() if value.is_floating_point() and not value.float().isfinite().all()
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except (SafetensorError, OSError, RuntimeError, MemoryError, *DAMAGE) as error:
        raise unreadable(path, error, advice, "is damaged") from error
    if odd:
        raise UserError(f"{path}: {odd[0]} holds NaN or infinity; {advice}")
    return FromFile(path, found)
