"""Recipes: the values of a dataset's flags, by step and by model, in recipes/<dataset>.yaml."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from utils.checked import read_yaml
from utils.errors import UserError
from utils.flags import FLAGS, OF_TRAINED, Flag, Models, coerce, suggest

RECIPE_SECTIONS = ("data", "sr", "teacher", "student", "open_p5")


def read_recipe(path: Path) -> dict[str, dict]:
    """Every section of a recipe; empty sections where there is none."""
    empty: dict[str, dict] = {title: {} for title in RECIPE_SECTIONS}
    try:
        sections = read_yaml(path)
    except FileNotFoundError:
        return empty
    for title, entries in sections.items():
        if title not in RECIPE_SECTIONS:
            raise UserError(f"{path}: unknown section {title}; expected {', '.join(RECIPE_SECTIONS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{path}: section {title}: expected name: value lines")
    return empty | sections


def per_model(title: str, entries: dict, models: Models) -> list[tuple[str, object]]:
    """The parts of a recipe's section: what it says of every model, then what it says of each by name."""
    apart = {name: part for name, part in entries.items() if name in (models or {})}
    plain = {name: value for name, value in entries.items() if name not in apart}
    return [(title, plain), *((f"{title}.{name}", part) for name, part in apart.items())]


def check_recipe(path: Path, sections: dict[str, dict], models: Models) -> None:
    """UserError for a key that is a flag of no script that reads recipes, and of no model, in whichever section."""
    known = set(FLAGS) - OF_TRAINED
    known |= {field.name for model in (models or {}).values() for field in dataclasses.fields(model.Config)}
    for title, entries in sections.items():
        for section, part in per_model(title, entries, models if title == "sr" else None):
            if not isinstance(part, dict):
                raise UserError(f"{path}: section {section}: expected name: value lines")
            for name in part:
                if name not in known:
                    raise UserError(f"{path}: unknown key {section}.{name}{suggest(str(name), known)}")


def recipe_values(
    path: Path, sections: list, section: str, flags: dict[str, Flag], inherits: Sequence[str], own: str
) -> dict:
    """The recipe's values for this script. Later ones win: section `data`, the script's, its part for the model.

    own: where the model's stand, as in "sr.sasrec". What a step inherits is not taken from `data`: the earlier step
    knows better what it was trained with.
    """
    entries: dict[str, tuple[str, object]] = {}
    for title, part in sections:
        if title not in ("data", section, own):
            continue
        for name, value in part.items():
            if name not in flags and title != "data":
                raise UserError(f"{path}: {title}.{name} is no flag of this step{suggest(str(name), flags)}")
            if name in flags and not (title == "data" and name in inherits):
                entries[name] = (f"{path}: {title}.{name}", value)
    values = {name: coerce(source, value, flags[name]) for name, (source, value) in entries.items()}
    if values:
        print(f"recipe {path.name}: " + ", ".join(f"{name}={value}" for name, value in values.items()))
    return values
