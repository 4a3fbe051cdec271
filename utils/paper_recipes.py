"""recipes/paper/<table>.yaml: the rows of a table, as read and checked against the paper's figures and runs.yaml."""

from dataclasses import dataclass, field
from pathlib import Path

from utils import cli
from utils.checked import COUNT, NUMBER, TEXT, Rule, check, maybe, read_json, read_yaml
from utils.errors import UserError
from utils.experiments import Experiment
from utils.flags import suggest
from utils.paper_runs import protocols, specs

PAPER = cli.ROOT / "results" / "paper_tables.json"
SHAPES = ("metrics", "published", "efficiency", "depth", "data", "values", "claims")
OF_PAPER = ("efficiency", "depth", "data", "values")  # shapes of one table of the paper
BASELINES = ("Popularity", "Transitions")  # models without training, which a run's record holds
JUDGED = {"better": 2, "as_good": 2, "share": 3, "timed": 3}  # how a claim may be, and how many words that takes


@dataclass(frozen=True)
class Row:
    """A row of a table: our run (or a model without training in its record), and the paper's; None shows a dash.

    datasets: where it is run, None for all of the table's. published: what others report there: `ndcg`, its NDCG@10 of
    the full ranking, the `loss` it was trained with, and the `source`.
    """

    run: str | None = None
    baseline: str | None = None  # the run whose record has it
    model: str = "Popularity"  # which one that is
    paper: str | None = None
    datasets: list[str] | None = None
    published: dict | None = None

    def on(self, dataset: str) -> bool:
        return self.datasets is None or dataset in self.datasets


@dataclass(frozen=True)
class Table:
    """A table: seeds[dataset][protocol] are those that it wants, pairs of runs are compared user by user."""

    name: str
    title: str
    rows: dict[str, Row]
    seeds: dict[str, dict[str, list[int]]]
    paper: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)
    claims: list[dict] = field(default_factory=list)
    shape: str = "metrics"

    def experiments(self, base_model: str | None = None) -> list[tuple[int, Experiment]]:
        """Every run that the table shows, with its place among the seeds: the first of each come first."""
        found = []
        for dataset, of_protocols in self.seeds.items():
            for protocol, seeds in of_protocols.items():
                for place, seed in enumerate(seeds):
                    for row in self.rows.values():
                        if (name := row.run or row.baseline) and row.on(dataset):
                            found.append((place, Experiment(dataset, protocol, name, seed, base_model).stand_in()))
        return found


def is_claim(value: object) -> bool:
    """What it says and where the paper does, and at most one way to judge it: utils/paper_claims.py."""
    if not isinstance(value, dict) or not {"claim", "paper"} <= set(value) <= {"claim", "paper", "datasets", *JUDGED}:
        return False
    lists = {name: value[name] for name in value if name in ("datasets", *JUDGED)}
    if not all(isinstance(of, list) and all(map(TEXT[1], of)) for of in lists.values()):
        return False
    judged = [name for name in lists if name != "datasets"]
    parts = lists["share"][0].count("/") == 1 if "share" in judged and lists["share"] else True
    return TEXT[1](value["claim"]) and len(judged) <= 1 and parts and all(len(lists[of]) == JUDGED[of] for of in judged)


def is_published(value: object) -> bool:
    whole = isinstance(value, dict) and set(value) == {"ndcg", "loss", "source"}
    named = whole and TEXT[1](value["loss"]) and TEXT[1](value["source"])
    return value is None or (named and NUMBER[1](value["ndcg"]) and value["ndcg"] > 0)


SEEDS: Rule = ("a list of seeds", lambda value: isinstance(value, list) and value and all(map(COUNT[1], value)))
NAMES: Rule = ("a list of names", lambda value: isinstance(value, list) and all(map(TEXT[1], value)))
RULE: Rule = {
    **{"title": TEXT, "shape": TEXT, "paper": [TEXT], "seeds": {"*": {"*": SEEDS}}},
    "claims": [("a claim, what the paper says, and at most one of " + ", ".join(JUDGED), is_claim)],
    "pairs": [("two runs", lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(TEXT[1], pair)))],
}
ROWS: Rule = {"*": dict.fromkeys(("run", "baseline", "paper"), maybe(TEXT)) | {"model": TEXT, "datasets": maybe(NAMES)}}
ROWS["*"]["published"] = ("ndcg, loss and source", is_published)


def table_names() -> list[str]:
    found = [path.stem for path in (cli.ROOT / "recipes" / "paper").glob("*.yaml") if path.stem != "runs"]
    return sorted(found, key=lambda name: (name.rstrip("0123456789"), len(name), name))  # table2 before table10


def read_table(name: str) -> Table:
    """recipes/paper/<name>.yaml; UserError where it names a run, protocol or key that is not there."""
    if name not in table_names():
        raise UserError(f"no table {name}{suggest(name, table_names(), '')}: it is one of {', '.join(table_names())}")
    found = read_yaml(path := cli.ROOT / "recipes" / "paper" / f"{name}.yaml")
    check(path, found, RULE, advice="mend it")
    check(path, found.get("rows"), [TEXT] if isinstance(found.get("rows"), list) else ROWS, "rows", "mend it")
    try:
        rows = found.pop("rows")
        rows = {row: {"run": row} for row in rows} if isinstance(rows, list) else rows
        table = Table(name, rows={row: Row(**entry) for row, entry in rows.items()}, **found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    for run in [*(row.run for row in table.rows.values() if row.run), *named_runs(table)]:
        if run not in specs():
            raise UserError(f"{path}: runs.yaml has no run {run!r}{suggest(run, specs(), '')}")
    for protocol in (protocol for of_protocols in table.seeds.values() for protocol in of_protocols):
        if protocol not in protocols():
            raise UserError(f"{path}: runs.yaml has no protocol {protocol!r}; it has {', '.join(protocols())}")
    if table.shape not in SHAPES:
        raise UserError(f"{path}: shape {table.shape!r} is none of {', '.join(SHAPES)}")
    unknown = [key for key in table.paper if key not in read_json(PAPER, "")]
    if unknown or (table.shape in OF_PAPER and not table.paper):
        raise UserError(f"{path}: paper {unknown or 'is missing'}: keys of {PAPER.name} are expected, as in [table_7]")
    for key in table.paper:
        if not has_shape(read_json(PAPER, "")[key], table.shape):
            raise UserError(f"{path}: shape {table.shape} can show nothing of the paper's {key}; give another of them")
    check_rows(path, table)
    return table


def named_runs(table: Table) -> list[str]:
    """The runs that a table names beside its rows': of untrained models, pairs and claims."""
    named = [row.baseline for row in table.rows.values() if row.baseline]
    named += [run for pair in table.pairs for run in pair]
    judged = [claim.get(kind, ()) for claim in table.claims for kind in JUDGED if kind != "timed"]
    return named + [run for words in judged for run in words[-2:]]


NEEDED = {"data": ["rows"], "efficiency": ["rows", "columns"], "depth": ["trained_at_depth"], "values": ["common"]}


def has_shape(of_paper: object, shape: str) -> bool:
    """Whether a table of the paper has what a table of this shape shows of it."""
    if not isinstance(of_paper, dict) or not set(NEEDED.get(shape, ())) <= set(of_paper):
        return False
    if shape == "data":
        return all(isinstance(counts, list) for counts in of_paper["rows"].values())
    return shape in NEEDED or all(isinstance(of_method, dict) for of_method in of_paper.values())


def check_rows(path: Path, table: Table) -> None:
    """UserError for a row that the table could not show: names that nothing has, a run without a metric of its own."""
    methods = printed(table.paper) if table.shape not in NEEDED else {}
    if table.shape == "efficiency":
        methods = read_json(PAPER, "")[table.paper[0]]["rows"]
    for name, row in table.rows.items():
        for value, known in ((row.model, BASELINES), (row.paper, methods)):
            if value is not None and known and value not in known:
                raise UserError(f"{path}: row {name!r} names {value!r}, expected one of {', '.join(known)}")
        if row.run and table.shape == "efficiency" and specs()[row.run].script == "evaluate":
            raise UserError(f"{path}: row {name!r} trains nothing, so it has no time of training to show")
    shown = [row.run for row in table.rows.values() if table.shape != "depth"]
    for run in [*shown, *named_runs(table)]:
        if run and "layers" in specs()[run].flags:
            raise UserError(f"{path}: {run!r} measures every layer of a model; only rows of shape depth show that")
    for claim in table.claims:
        for dataset in claim.get("datasets", ()):
            if dataset not in table.seeds:
                raise UserError(f"{path}: claim {claim['claim']!r} names {dataset!r}, which `seeds` has not")


def printed(names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The paper's values: method, domain, metric in percent; several of its tables as one."""
    tables = read_json(PAPER, "")
    methods = list(dict.fromkeys(method for name in names for method in tables[name]))
    return {method: {d: v for name in names for d, v in tables[name].get(method, {}).items()} for method in methods}
