"""How long runs of the tables will take: by what they took with another seed, or by a few steps."""

import re
from dataclasses import replace

import numpy as np

from utils import cli
from utils.data import planned_steps
from utils.experiments import TRAINING, Experiment, read_record
from utils.paper_runs import recipe
from utils.run_files import read_config, read_metrics

CALIBRATION_STEPS = 3


def expected_seconds(experiment: Experiment) -> float | None:
    """What it took with another seed, here or in a record; else by its calibration; None where neither is known."""
    if experiment.state() == "finished":
        return 0.0
    others = [replace(experiment, seed=seed) for seed in seeds_seen(experiment.dataset)]
    known = [kept["seconds"] for other in others if (kept := other.kept()).get("outcome") == "finished"]
    recorded = [read_record(other.record_file) for other in others if other.record_file.exists()]
    known += [run["seconds"] for run in recorded if "seconds" in run]  # those of an earlier version have none
    return known[0] if known else by_calibration(experiment)


def seeds_seen(dataset: str) -> set[int]:
    folders = (cli.ROOT / "outputs" / dataset / "paper", cli.ROOT / "results" / "runs" / dataset)
    names = [path.stem for folder in folders for path in folder.glob("*-seed*.json")]
    return {int(found[1]) for name in names if (found := re.search(r"-seed(\d{1,18})$", name))}


def by_calibration(experiment: Experiment) -> float | None:
    """Seconds by a run of a few steps: steps and evaluations scale, the rest is taken as it was."""
    short = calibration(experiment)
    if short.state() != "finished":
        return None
    wall, folder = short.kept()["seconds"], cli.ROOT / short.folder
    if experiment.spec.script not in TRAINING:
        return wall
    config, metrics = read_config(folder), read_metrics(folder)
    values, own = recipe(experiment.dataset)["data"], experiment.of_recipe()
    values = values | own | own.get(experiment.flags().get("model", "sasrec"), {}) | experiment.flags()
    whole = config | {"max_steps": int(values.get("max_steps", -1))}
    steps = planned_steps(whole, metrics["steps_per_epoch"])
    train, score = metrics["seconds"]["train"], metrics["seconds"]["score_test"]
    evaluations = int(np.ceil(steps / config["eval_steps"]))
    steps += int(np.ceil(config.get("pretrain_epochs", 0) * metrics["steps_per_epoch"]))  # as --max_steps bounds both
    return wall + train * (steps / metrics["steps"] - 1) + score * (evaluations - 1)


def calibration(experiment: Experiment) -> Experiment:
    """The same run with a few steps: one for all seeds."""
    return replace(experiment, seed=0, max_steps=CALIBRATION_STEPS)
