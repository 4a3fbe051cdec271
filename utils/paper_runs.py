"""recipes/paper/runs.yaml: the runs and the protocols that tables are made of, as read and checked."""

from dataclasses import dataclass, field
from functools import cache

from utils import cli
from utils.checked import NUMBER, SINGLE, TEXT, Rule, check, read_yaml
from utils.errors import UserError
from utils.flags import suggest
from utils.recipes import read_recipe

SECTIONS = {
    "train_sr_trad": "sr",
    "extract_emb": "extract",
    "finetune": "teacher",
    "distill": "student",
    "train_open_p5": "open_p5",
    "evaluate": "",
}
# flags that take the folders of the runs that a run reads; that of finetune.py takes any number of tables
READS = {"train_sr_trad": ["--init_items"], "extract_emb": ["--sr_dir"], "finetune": ["--item_embeddings"]}
READS |= {"distill": ["--teacher", "--kl_teacher"], "train_open_p5": [], "evaluate": ["--run", "--fuse"]}


def is_weight(value: object) -> bool:
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    return all(map(NUMBER[1], numbers)) and (not isinstance(value, dict) or "others" in value)


RULE: Rule = {
    "runs": {"*": {"script": TEXT, "reads": [TEXT], "flags": {"*": SINGLE}}},
    "protocols": {
        "*": {
            "weights": {"*": ("a number, or numbers by dataset and for others", is_weight)},
            "flags": {"*": {"*": SINGLE}},
        }
    },
}


@dataclass(frozen=True)
class Spec:
    """A run of runs.yaml: its script, the runs whose folders it reads, its flags, and the terms of a student's loss."""

    script: str
    reads: tuple[str, ...] = ()
    flags: dict[str, object] = field(default_factory=dict)
    terms: list[str] | None = None


@dataclass(frozen=True)
class Protocol:
    """Flags by script, weights by term of a student's loss, and the terms that students have if not told otherwise."""

    weights: dict[str, float | dict[str, float]]
    flags: dict[str, dict] = field(default_factory=dict)
    terms: list[str] | None = None


@cache
def book() -> tuple[dict[str, Protocol], dict[str, Spec]]:
    """Protocols and runs of recipes/paper/runs.yaml; UserError where they do not fit together."""
    path = cli.ROOT / "recipes" / "paper" / "runs.yaml"
    found = read_yaml(path)
    check(path, found, RULE, advice="mend it")
    try:
        runs = {name: Spec(**entry | {"reads": tuple(entry.get("reads", ()))}) for name, entry in found["runs"].items()}
        by_name = {name: Protocol(**entry) for name, entry in found["protocols"].items()}
        for name, spec in runs.items():
            if spec.script not in SECTIONS:
                raise UserError(f"{path}: {name}: unknown script {spec.script}{suggest(spec.script, SECTIONS, '')}")
            if len(spec.reads) > len(READS[spec.script]) and spec.script != "finetune":
                raise UserError(f"{path}: {name} reads {len(spec.reads)} runs, {spec.script} {len(READS[spec.script])}")
            if spec.terms is not None and spec.script != "distill":
                raise UserError(f"{path}: {name} has terms, which are of a student's loss: of distill")
            order = list(runs)
            for read in spec.reads:
                if read not in runs or order.index(read) >= order.index(name):
                    raise UserError(f"{path}: {name} reads {read!r}, which does not stand before it")
        for script in (script for protocol in by_name.values() for script in protocol.flags):
            if script not in SECTIONS:
                raise UserError(f"{path}: flags of an unknown script {script}{suggest(script, SECTIONS, '')}")
        for terms in (of.terms or [] for of in (*runs.values(), *by_name.values())):
            for protocol in by_name.values():
                if unknown := set(terms) - set(protocol.weights):
                    raise UserError(f"{path}: no weight of the term {sorted(unknown)[0]!r}")
        return by_name, runs
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def protocols() -> dict[str, Protocol]:
    return book()[0]


def specs() -> dict[str, Spec]:
    return book()[1]


@cache
def recipe(dataset: str) -> dict[str, dict]:
    """The sections of the dataset's recipe."""
    return read_recipe(cli.ROOT / "recipes" / f"{dataset}.yaml")
