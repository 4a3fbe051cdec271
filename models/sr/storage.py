"""A traditional recommender from its run folder."""

import dataclasses
from pathlib import Path

from models.interface import Recommender
from models.sr import MODELS
from utils.data import TrainingPart
from utils.errors import UserError
from utils.files import load_tensors


def new_recommender(config: dict, known: TrainingPart) -> Recommender:
    """An untrained recommender from the flags of a run; UserError where they are not those of a known model."""
    if config.get("model") not in MODELS:
        raise UserError(f"model {config.get('model')!r} is not known; it is one of {', '.join(MODELS)}")
    kind = MODELS[config["model"]]
    # a flag that the run's own version did not have, and that is off, changes nothing in what it did
    off = {field.name: field.default for field in dataclasses.fields(kind.Config) if not field.default}
    names, config = [field.name for field in dataclasses.fields(kind.Config)], off | config
    lacking = [name for name in names if name not in config]
    if lacking:
        raise UserError(f"the run has no {lacking[0]}: it was made by another version; run train_sr_trad.py again")
    return kind(kind.Config(**{name: config[name] for name in names}), known)


def load_recommender(folder: Path, config: dict, known: TrainingPart) -> Recommender:
    """The trained recommender of a run folder, in eval mode; UserError where its weights do not fit."""
    recommender, weights = new_recommender(config, known), load_tensors(folder / "model.safetensors")
    recommender.resize(weights)
    wanted, found = ({n: tuple(v.shape) for n, v in part.items()} for part in (recommender.state_dict(), weights))
    if wanted != found:
        odd = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        what = f"{odd} is {found.get(odd)}, not {wanted.get(odd)}"
        raise UserError(f"{folder}: its weights do not fit its flags ({what}); train it again")
    recommender.load_state_dict(weights)
    return recommender.eval()
