"""The runs behind the tables: what recipes/paper/ says of them, which are there, and running those that are not.

A run is a script with the dataset's recipe, the flags of recipes/paper/runs.yaml, a protocol and a seed. Each has one
folder in outputs/<dataset>/paper/, even if several tables show it. If several runs compute the same, one of them stands
for all. The record of a run, results/runs/<dataset>/<run>.json, replaces it, unless a run still to come reads its
folder.
"""

import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from utils import cli
from utils.checked import COUNT, DAMAGE, NUMBER, TEXT, Rule, load_tensors, maybe, read_json, unreadable
from utils.errors import UserError
from utils.files import write_json
from utils.metrics import RANKS_FILE
from utils.paper_runs import READS, SECTIONS, Spec, protocols, recipe, specs
from utils.run_files import CONFIG, METRICS, check_complete, finished_run, read_config

TRAINING = ("train_sr_trad", "finetune", "distill", "train_open_p5")
STATES = ("finished", "recorded", "interrupted", "failed", "to run", "changed")
PATIENCE = 120  # seconds that an interrupted run is given to end
ALONE = 10  # of them before it is interrupted once more
BEYOND = 255  # what a rank of 10 or more is recorded as: no metric at 10 tells it from others


@dataclass(frozen=True)
class Experiment:
    """One run: of a spec, on a dataset, in a protocol, with a seed; `base_model` where it is not the recipe's."""

    dataset: str
    protocol: str
    name: str
    seed: int
    base_model: str | None = None
    max_steps: int | None = None  # of a calibration

    def __post_init__(self) -> None:
        if self.spec.script in ("train_sr_trad", "extract_emb"):  # no language model has a part in it
            object.__setattr__(self, "base_model", None)

    @property
    def spec(self) -> Spec:
        return specs()[self.name]

    @property
    def slug(self) -> str:
        """The name of its folder and record."""
        parts = [self.name, self.protocol if self.protocol != "strong" else "", Path(self.base_model or "").name]
        return f"{'-'.join(plain(part) for part in parts if part)}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return Path("outputs") / self.dataset / ("calibration" if self.max_steps else "paper") / self.slug

    @property
    def record_file(self) -> Path:
        return cli.ROOT / "results" / "runs" / self.dataset / f"{self.slug}.json"

    def parents(self) -> list["Experiment"]:
        """Those whose folders it reads."""
        return [parent.stand_in() for parent in self.named_parents()]

    def named_parents(self) -> list["Experiment"]:
        return [replace(self, name=name) for name in self.spec.reads]

    def flags(self) -> dict[str, object]:
        """What is given beside the recipe: of the protocol for this script, then the run's own."""
        protocol = protocols()[self.protocol]
        found = protocol.flags.get(self.spec.script, {}) | self.spec.flags
        terms = protocol.terms if self.spec.terms is None else self.spec.terms
        if self.spec.script == "distill" and terms is not None:
            for term, weight in protocol.weights.items():
                of_dataset = weight.get(self.dataset, weight["others"]) if isinstance(weight, dict) else weight
                found[f"lambda_{term}"] = of_dataset if term in terms else 0
        if self.spec.script in ("finetune", "train_open_p5") and self.base_model:
            found |= {"base_model": self.base_model}
        return found | ({"max_steps": self.max_steps} if self.max_steps and self.spec.script in TRAINING else {})

    @cache  # noqa: B019  as many as there are runs
    def fingerprint(self) -> str:
        """Of all that decides what the run computes: equal where flags, recipe, seed and what it reads are equal."""
        read = [parent.fingerprint() for parent in self.named_parents()]
        what = [self.spec.script, self.flags(), [recipe(self.dataset)["data"], self.of_recipe()], self.seed, read]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def of_recipe(self) -> dict[str, object]:
        """The recipe's values for this script and this model."""
        own, model = recipe(self.dataset).get(SECTIONS[self.spec.script], {}), self.flags().get("model", "sasrec")
        return {name: value for name, value in own.items() if not isinstance(value, dict) or name == model}

    @cache  # noqa: B019
    def configuration(self) -> str:
        """As the fingerprint, but of resolved values: equal, whether the recipe or the run's flags give them."""
        resolved = self.of_recipe() | self.flags()
        read = [parent.configuration() for parent in self.named_parents()]
        return json.dumps([self.spec.script, resolved, self.seed, read], sort_keys=True, default=str)

    @cache  # noqa: B019
    def equals(self) -> list["Experiment"]:
        """All runs of runs.yaml, of whichever protocol, that compute the same, in its order; itself is one of them."""
        named = [replace(self, name=name, protocol=protocol) for protocol in protocols() for name in specs()]
        return [other for other in named if other.configuration() == self.configuration()]

    def stand_in(self) -> "Experiment":
        """The one of its equals that is run and read for all: the one that is nearest to being there."""
        return min(self.equals(), key=lambda other: STATES.index(other.state()))

    def command(self, depth: Callable[[], int]) -> list[str]:
        """The command line. depth: tells the number of layers of the base model, where the run's flags ask for it."""
        words = [f"{self.spec.script}.py", "--dataset", self.dataset, "--output_dir", str(self.folder)]
        if self.spec.script in TRAINING:
            words += ["--seed", str(self.seed), "--resume", "auto"]
        read = [str(parent.folder) for parent in self.parents()]
        if self.spec.script == "finetune":  # several tables side by side
            read = [",".join(read)]
        words += [word for pair in zip(READS[self.spec.script], read, strict=False) for word in pair]
        flags = self.flags()
        if "num_epochs" in flags and "max_steps" not in flags:  # which a recipe may have, and which goes before epochs
            words += ["--max_steps", "-1"]
        for name, value in flags.items():
            if (name, value) == ("num_layers", "full"):
                value = depth()
            elif (name, value) == ("layer_selection", "0,1,2,last"):
                value = f"0,1,2,{depth() - 1}"
            words += [f"--{name}", str(value)]
        return words

    # --- what is there ---

    def kept(self) -> dict:
        """What `execute` has written of it, beside its folder: fingerprint, outcome, seconds."""
        path = cli.ROOT / f"{self.folder}.json"
        return read_json(path, "", RECORD, f"remove it and {self.folder}") if path.exists() else {}

    def is_of_this_data(self, config: dict) -> bool:
        """Whether a run read the dataset, and its attributes if any, as they are now; yes where it is not here."""
        path = cli.ROOT / "datasets" / self.dataset / "dataset.json"
        if not path.exists():
            return True
        info = read_json(path, "")
        now = {"dataset_fingerprint": info["fingerprint"], "attributes_fingerprint": info.get("attributes_fingerprint")}
        return all(config.get(name, value) == value for name, value in now.items())

    def state(self) -> str:
        """finished, recorded, failed, interrupted, changed (other flags, recipe or data), or to run."""
        kept, of, config = self.kept(), self.fingerprint(), cli.ROOT / self.folder / "config.json"
        if kept.get("fingerprint", of) != of:
            return "changed"
        if kept.get("outcome") == "finished" and config.exists():
            return "finished" if self.is_of_this_data(read_json(config, "")) else "changed"
        found = read_json(self.record_file, "") if self.record_file.exists() else {}
        if found.get("fingerprint") == of and self.is_of_this_data(found.get("config", {})):
            return "recorded"
        return {"failed": "failed", "started": "interrupted"}.get(kept.get("outcome"), "to run")


def plain(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def with_parents(wanted: list[Experiment]) -> Iterator[Experiment]:
    """Those of `wanted` that are neither finished nor recorded, each after the runs that it reads, once."""
    seen: set[Experiment] = set()

    def visit(experiment: Experiment, folder_needed: bool) -> Iterator[Experiment]:
        state, folder = experiment.state(), cli.ROOT / experiment.folder
        if state == "finished" and folder_needed:
            check_complete(folder, read_config(folder), f"bring it back, or move {folder} and {folder.name}.json away")
        if experiment in seen or state == "finished" or (state == "recorded" and not folder_needed):
            return
        seen.add(experiment)
        for parent in experiment.parents():
            yield from visit(parent, True)
        yield experiment

    for experiment in wanted:
        yield from visit(experiment, False)


def check_unchanged(experiments: list[Experiment]) -> None:
    """UserError where a folder holds a run of other flags, another recipe or other data, before anything is run."""
    for experiment in experiments:
        if experiment.state() == "changed":
            here = f"{experiment.folder} and {experiment.folder.name}.json"
            raise UserError(f"{here} are of other flags, another recipe or other data; to run it again, move them away")


def execute(experiment: Experiment, depth: Callable[[], int], seconds_left: float) -> str:
    """Run or continue one run; returns its state: finished, failed, or interrupted when the time is over."""
    path, before = cli.ROOT / f"{experiment.folder}.json", experiment.kept()
    kept = {"experiment": asdict(experiment), "fingerprint": experiment.fingerprint()}
    kept |= {"seconds": before.get("seconds", 0.0), "outcome": "started"}
    write_json(kept, path)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *experiment.command(depth)], cwd=cli.ROOT)
    try:
        code = process.wait(max(0.0, seconds_left))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        if isinstance(stopped, KeyboardInterrupt):  # Ctrl-C reaches both; a second one would disturb how it ends
            with suppress(subprocess.TimeoutExpired):
                process.wait(ALONE)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        write_json(kept | {"seconds": kept["seconds"] + time.monotonic() - begun}, path)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return "interrupted"
    outcome = "finished" if code == 0 else "failed"
    write_json(kept | {"outcome": outcome, "seconds": kept["seconds"] + time.monotonic() - begun}, path)
    return outcome


# --- records ---


def finished_experiments(dataset: str) -> list[Experiment]:
    """Those that have finished in outputs/<dataset>/paper/."""
    paths = sorted((cli.ROOT / "outputs" / dataset / "paper").glob("*-seed*.json"))
    kept = [read_json(path, "", RECORD, f"remove it and {path.with_suffix('')}")["experiment"] for path in paths]
    found = []
    for path, entry in zip(paths, kept, strict=True):
        known = entry["name"] in specs() and entry["protocol"] in protocols()
        state = from_entry(entry).state() if known else "of no run of recipes/paper/runs.yaml"
        if state == "finished":
            found.append(from_entry(entry))
        else:
            print(f"{path.with_suffix('').relative_to(cli.ROOT)} is left out: {state}")
    return found


def from_entry(entry: dict) -> Experiment:
    """The experiment that a file tells of; UserError where it does not tell all."""
    values = [entry[name] for name in ("dataset", "protocol", "name", "seed")]
    return Experiment(*values, entry.get("base_model"), entry.get("max_steps"))


def record(experiment: Experiment) -> dict | None:
    """What is committed of a finished run: flags, metrics, and of every test user the rank, where it is below 10."""
    folder = cli.ROOT / experiment.folder
    if not (folder / "metrics.json").exists():
        return None  # an item table has no metrics
    config, metrics = finished_run(folder, f"{folder} holds no finished run")
    ranks = load_tensors(folder / RANKS_FILE) if (folder / RANKS_FILE).exists() else {}
    packed = {"ranks": {name: pack(values.numpy()) for name, values in ranks.items()}}
    return experiment.kept() | packed | {"config": config, "metrics": metrics}


def pack(ranks: np.ndarray) -> str:
    """Ranks (users,) as text: those of 10 and more become BEYOND."""
    return base64.b64encode(zlib.compress(np.where(ranks < 10, ranks, BEYOND).astype(np.uint8).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).astype(np.int64)


RECORD: Rule = {
    "experiment": {**dict.fromkeys(("dataset", "protocol", "name"), TEXT), "seed": COUNT, "base_model": maybe(TEXT)},
    **{"fingerprint": TEXT, "seconds": NUMBER, "outcome": TEXT, "ranks": {"*": TEXT}},
    **{"config": CONFIG, "metrics": METRICS},
}


def read_record(path: Path) -> dict:
    """A committed record; UserError where it is damaged."""
    again = "bring it back from version control"
    run = read_json(path, f"{path} is missing; {again}", RECORD)
    try:
        name, protocol = (run["experiment"][key] for key in ("name", "protocol"))
        if name not in specs() or protocol not in protocols():
            raise UserError(
                f"{path}: runs.yaml has no run {name!r} in {protocol!r}; name it there, or remove the record"
            )
        from_entry(run["experiment"])
        users = {len(unpack(text)) for text in run.get("ranks", {}).values()}
        known = run.get("metrics", {}).get("protocol", {}).get("users")
        if len(users | ({known} if users and known else set())) > 1:
            raise ValueError("its ranks are not of its users")
    except UserError:
        raise
    except (zlib.error, *DAMAGE) as error:
        raise unreadable(path, error, again, "is damaged") from error
    return run


def records(dataset: str, base_model: str | None = None) -> dict[tuple[str, str, int], dict]:
    """The committed records of a dataset by protocol, run and seed; also by the names of runs that compute the same.

    Those of other flags or of another recipe than today's are left out, which is told once.
    """
    read = {path: read_record(path) for path in sorted((cli.ROOT / "results" / "runs" / dataset).glob("*.json"))}
    versions = {path: run.get("config", {}).get("dataset_fingerprint") for path, run in read.items()}
    if len(set(versions.values())) > 1:
        rare = min(versions, key=lambda path: list(versions.values()).count(versions[path]))
        few = list(versions.values()).count(versions[rare])
        raise UserError(f"{few} of {len(versions)} records of {dataset}, as {rare}, are of other data; remove these")
    pairs = [(from_entry(run["experiment"]), run) for run in read.values()]
    pairs = [(e, run) for e, run in pairs if e == replace(e, base_model=base_model)]
    today = [(e, run) for e, run in pairs if run.get("fingerprint") == e.fingerprint()]
    if len(today) < len(pairs):
        tell_left_out(dataset, len(pairs) - len(today))
    found = {(e.protocol, e.name, e.seed): run for e, run in today}
    for experiment, run in today:
        for other in experiment.equals():
            found.setdefault((other.protocol, other.name, other.seed), run)
    return found


@cache
def tell_left_out(dataset: str, count: int) -> None:
    print(f"{count} records of {dataset} are left out: of other flags or another recipe than today's", file=sys.stderr)
