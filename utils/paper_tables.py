"""The paper's tables, printed beside measured: what recipes/paper/<table>.yaml says, as Markdown from records."""

import statistics
from dataclasses import dataclass, field

import numpy as np

from utils import cli
from utils.errors import UserError
from utils.experiments import Experiment, protocols, read_yaml, records, specs, unpack
from utils.files import read_json
from utils.flags import suggest
from utils.metrics import paired_bootstrap
from utils.report import markdown_table

DOMAINS = {
    "clothing2014": "Cloth",
    "music2018": "Music",
    **{d.lower(): d for d in ("Cloth", "Movie", "Music", "Sport")},
}
PRINTED = ("HR@1", "HR@5", "NDCG@5", "MRR")  # by the paper, in percent
SHAPES = ("metrics", "efficiency", "data", "values")


@dataclass(frozen=True)
class Row:
    """A row of a table: our run (or the baseline in its record), and the paper's row; None shows a dash."""

    run: str | None = None
    baseline: str | None = None
    paper: str | None = None


@dataclass(frozen=True)
class Table:
    """A table: seeds[dataset][protocol] are those that it wants, pairs of runs are compared user by user."""

    name: str
    title: str
    rows: dict[str, Row]
    seeds: dict[str, dict[str, list[int]]]
    paper: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)
    shape: str = "metrics"

    def experiments(self, base_model: str | None = None) -> list[tuple[int, Experiment]]:
        """Every run that the table shows, with its place among the seeds: the first of each come first."""
        found = []
        for dataset, of_protocols in self.seeds.items():
            for protocol, seeds in of_protocols.items():
                for place, seed in enumerate(seeds):
                    for row in self.rows.values():
                        for name in (row.run or row.baseline,):
                            found += [(place, Experiment(dataset, protocol, name, seed, base_model))] if name else []
        return found


def table_names() -> list[str]:
    return [path.stem for path in sorted((cli.ROOT / "recipes" / "paper").glob("*.yaml")) if path.stem != "runs"]


def read_table(name: str) -> Table:
    """recipes/paper/<name>.yaml; UserError where it names a run, protocol or key that is not there."""
    if name not in table_names():
        raise UserError(f"no table {name}{suggest(name, table_names())}: it is one of {', '.join(table_names())}")
    path = cli.ROOT / "recipes" / "paper" / f"{name}.yaml"
    found = read_yaml(path)
    try:
        rows = found.pop("rows")
        rows = {row: {"run": row} for row in rows} if isinstance(rows, list) else rows
        table = Table(name, rows={row: Row(**entry) for row, entry in rows.items()}, **found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    named = [run for row in table.rows.values() for run in (row.run, row.baseline) if run]
    for run in [*named, *(run for pair in table.pairs for run in pair)]:
        if run not in specs():
            raise UserError(f"{path}: runs.yaml has no run {run!r}{suggest(run, specs())}")
    for protocol in (protocol for of_protocols in table.seeds.values() for protocol in of_protocols):
        if protocol not in protocols():
            raise UserError(f"{path}: runs.yaml has no protocol {protocol!r}; it has {', '.join(protocols())}")
    if table.shape not in SHAPES:
        raise UserError(f"{path}: shape {table.shape!r} is none of {', '.join(SHAPES)}")
    return table


# --- what was measured, what was printed ---


def measured(found: dict, protocol: str, row: Row) -> list[dict]:
    """Metrics of the row's runs, one per seed: {"test": {"sampled": ..., "full": ...}, ...}; empty without a record."""
    runs = [
        run["metrics"] for (of, name, _), run in found.items() if of == protocol and name == (row.run or row.baseline)
    ]
    if row.baseline:  # without training: the same for every seed
        return [run["baselines"]["Popularity"] for run in runs[:1]]
    return runs


def printed(names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The paper's values: method, domain, metric in percent; several of its tables as one."""
    tables = read_json(cli.ROOT / "results" / "paper_tables.json", "")
    methods = list(dict.fromkeys(method for name in names for method in tables[name]))
    return {method: {d: v for name in names for d, v in tables[name].get(method, {}).items()} for method in methods}


def mean(values: list[float], scale: float = 1.0, digits: int = 4) -> str:
    """Mean, with the standard deviation of several; a dash for none."""
    if not values:
        return "-"
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def average_ranks(figures: dict[str, list[float]]) -> dict[str, str]:
    """Of each row its rank among the measured rows, averaged over the metrics: 1 is best, equal values share a rank."""
    names = [name for name, values in figures.items() if values]
    if len(names) < 2:
        return {}
    values = np.array([figures[name] for name in names])  # (rows, metrics)
    better = (values[None] > values[:, None]).sum(1) + ((values[None] == values[:, None]).sum(1) - 1) / 2
    return {name: f"{1 + mean:.1f}" for name, mean in zip(names, better.mean(1), strict=True)}


# --- tables ---


def metric_table(table: Table, dataset: str, protocol: str, found: dict) -> str:
    """Sampled metrics of the paper and the full ranking, in percent, and the paper's own on its domains."""
    paper, domain = printed(table.paper), DOMAINS.get(dataset)
    runs = {name: measured(found, protocol, row) for name, row in table.rows.items()}
    means = {
        name: [statistics.mean(run["test"]["sampled"][m] for run in of) for m in PRINTED] if of else []
        for name, of in runs.items()
    }
    ranks, cells = average_ranks(means), []
    domains = list(dict.fromkeys(d for method in paper.values() for d in method))
    for name, row in table.rows.items():
        of = runs[name]
        line = [name, str(len(of) or "-"), *(mean([r["test"]["sampled"][m] for r in of], 100, 2) for m in PRINTED)]
        line += [mean([r["test"]["full"][m] for r in of], 100, 2) for m in ("HR@10", "NDCG@10")] + [
            ranks.get(name, "-")
        ]
        theirs = paper.get(row.paper, {})
        if domain in domains:
            line += [f"{theirs[domain][m]:.2f}" if theirs.get(domain) else "-" for m in PRINTED]
        else:
            line += [f"{theirs[d]['NDCG@5']:.2f}" if theirs.get(d) else "-" for d in domains]
        cells.append(line)
    header = [f"{dataset}, %", "seeds", *PRINTED, "full HR@10", "full NDCG@10", "rank"]
    header += [f"paper {m}" for m in PRINTED] if domain in domains else [f"paper NDCG@5, {d}" for d in domains]
    return markdown_table(header, cells)


def ladder_table(table: Table, dataset: str, protocol: str, found: dict) -> str:
    """NDCG@10 on validation and test of the rows that were run."""
    cells = []
    for name, row in table.rows.items():
        of = measured(found, protocol, row)
        if not of:
            continue
        figures = [[run[split][kind]["NDCG@10"] for run in of] for split, kind in (("valid", "full"), ("test", "full"))]
        figures += [[run["test"]["sampled"]["NDCG@10"] for run in of], [run["test"]["full"]["HR@10"] for run in of]]
        cells.append([name, str(len(of)), *(mean(values) for values in figures)])
    return markdown_table(["NDCG@10", "seeds", "valid, full", "test, full", "test, sampled", "full HR@10"], cells)


def difference_table(table: Table, protocol: str, found: dict) -> str:
    """Mean differences of NDCG@10 between pairs of runs, over the users of all seeds that both have, with interval."""
    cells = []
    for pair in table.pairs:
        seeds = [seed for of, name, seed in found if (of, name) == (protocol, pair[0]) and (of, pair[1], seed) in found]
        for kind in ("sampled", "full") if seeds else ():
            ours, theirs = (
                np.concatenate([unpack(found[protocol, name, seed]["ranks"][f"test_{kind}"]) for seed in seeds])
                for name in pair
            )
            difference, low, high = paired_bootstrap(ours, theirs, clusters=len(seeds))
            interval = f"{low:+.4f} .. {high:+.4f}"
            cells.append([" - ".join(pair), kind, str(len(seeds)), f"{difference:+.4f}", interval])
    return markdown_table(["test NDCG@10", "ranking", "seeds", "difference", "95 % interval"], cells) if cells else ""


def render(table: Table, base_model: str | None = None) -> str:
    """The whole table as Markdown, from the committed records alone."""
    parts = [f"## {table.title}"]
    for dataset, of_protocols in table.seeds.items():
        found = records(dataset, base_model)
        for protocol in of_protocols:
            if not any(measured(found, protocol, row) for row in table.rows.values()):
                parts.append(f"{dataset}, protocol {protocol}: not measured yet.")
                continue
            parts += [f"### {dataset}, protocol {protocol}", metric_table(table, dataset, protocol, found)]
            parts += [differences] if (differences := difference_table(table, protocol, found)) else []
    return "\n\n".join(parts)
