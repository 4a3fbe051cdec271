"""A traditional recommender from its run folder."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import get_type_hints

import torch

from models.interface import Recommender
from models.sr import MODELS
from utils.checked import check, load_tensors
from utils.data import TrainingPart
from utils.errors import UserError
from utils.run_files import rule_of

LARGEST = 2**20  # of a flag that is a whole number


def new_recommender(config: dict, known: TrainingPart) -> Recommender:
    """An untrained recommender from the flags of a run; UserError where they are not those of a known model."""
    if config.get("model") not in MODELS:
        raise UserError(f"model {config.get('model')!r:.60} is not known; it is one of {', '.join(MODELS)}")
    kind = MODELS[config["model"]]
    # a flag that the run's own version did not have, and that is off, changes nothing in what it did
    off = {field.name: field.default for field in dataclasses.fields(kind.Config) if not field.default}
    names, config = [field.name for field in dataclasses.fields(kind.Config)], off | config
    lacking = [name for name in names if name not in config]
    if lacking:
        raise UserError(f"the run has no {lacking[0]}: it was made by another version; run train_sr_trad.py again")
    return kind(kind.Config(**{name: config[name] for name in names}), known)


def check_sizes(flags: dict) -> None:
    """UserError, before anything is trained, where `check_flags` would refuse a run with these flags of its model."""
    for name, value in flags.items():
        if type(value) is int and value > LARGEST:
            raise UserError(f"--{name} {value}: at most {LARGEST:,}")


def check_flags(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    """UserError where the model's own flags in config.json are none that the command line, or memory, would take."""
    kind = getattr(MODELS.get(config.get("model")), "Config", Recommender.Config)
    of, fields = get_type_hints(kind), dataclasses.fields(kind)
    check(folder / "config.json", config, {f.name: rule_of(of[f.name], f.metadata["limits"]) for f in fields})
    largest = {"num_layers": len(weights)}  # each layer has a tensor at least
    for name in (field.name for field in fields if type(config.get(field.name)) is int):
        if config[name] > largest.get(name, LARGEST):
            raise UserError(f"{folder}: its weights do not fit its flags ({name} {config[name]}); train it again")


def check_weights(folder: Path, recommender: Recommender, weights: dict[str, torch.Tensor]) -> None:
    """UserError unless a recommender has these weights, in these shapes."""
    recommender.resize(weights)
    wanted, found = (
        {n: f"{'float' if v.is_floating_point() else 'other'} {tuple(v.shape)}" for n, v in part.items()}
        for part in (recommender.state_dict(), weights)
    )
    if wanted != found:
        odd = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        what = f"{odd} is {found.get(odd)}, not {wanted.get(odd)}"
        raise UserError(f"{folder}: its weights do not fit its flags ({what}); train it again")


def load_recommender(folder: Path, config: dict, known: TrainingPart) -> Recommender:
    """The trained recommender of a run folder, in eval mode; UserError where its weights do not fit."""
    weights = load_tensors(folder / "model.safetensors")
    check_flags(folder, config, weights)
    # The meta device takes no memory, however large the flags. A model that computes with what it draws is let be.
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        check_weights(folder, new_recommender(config, known), weights)
    recommender = new_recommender(config, known)
    check_weights(folder, recommender, weights)
    recommender.load_state_dict(weights)
    return recommender.eval()
