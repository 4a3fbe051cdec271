"""The paper's claims beside what was measured here: holds, does not, within noise, or not measured."""

import statistics

from utils import cli
from utils.checked import NUMBER, read_json
from utils.errors import UserError
from utils.experiments import records
from utils.paper_recipes import JUDGED, Table
from utils.paper_tables import difference, on_other_tables
from utils.report import markdown_table

ENOUGH = 0.98  # of NDCG@10, for a model that is to be as good as another
MISSING = ("-", "not measured yet")  # ours, and the verdict


def claim_table(table: Table) -> str:
    """Each claim on each dataset: the paper's figures, ours on test in both rankings, and the verdicts.

    `datasets`: those of this claim alone. `better: [a, b]`: the interval of a - b over users is above zero.
    `as_good: [a, b]`: the mean of a is at least 98 % of that of b. `share: [measure, a, b]`: a over b of two runs, and
    `timed: [measure, a, b]`: of two rows that benchmarks/efficiency.py timed in turn; figures without a verdict, as
    they depend on the base model.
    """
    cells, strong = [], {}
    for name in table.seeds:
        strong[name] = {key: run for key, run in records(name).items() if key[0] == "strong"}
    for claim in table.claims:
        kind = next((name for name in JUDGED if name in claim), None)
        for dataset in (name for name in claim.get("datasets", table.seeds) if kind and name in table.seeds):
            found = strong[dataset]
            if kind == "timed":
                lines = [("-", *timed(dataset, *claim[kind]))]
            elif kind == "share":
                lines = [("-", *share(claim[kind], found))]
            else:
                lines = [(ranking, *judged(kind, claim[kind], ranking, found)) for ranking in ("sampled", "full")]
                lines = lines if lines[0][1:] != MISSING else [("-", *MISSING)]
            cells += [[claim["claim"], str(claim["paper"]), dataset, *line] for line in lines]
        if not kind:
            cells.append([claim["claim"], str(claim["paper"]), "-", "-", "-", "not tested here"])
    return markdown_table(["claim", "paper", "data", "ranking", "ours, test NDCG@10", "verdict"], cells)


def judged(kind: str, pair: list[str], ranking: str, found: dict) -> tuple[str, str]:
    seeds, values = difference(pair, "strong", ranking, found)
    if not seeds:
        return MISSING
    means = [
        statistics.mean(found["strong", name, seed]["metrics"]["test"][ranking]["NDCG@10"] for seed in seeds)
        for name in pair
    ]
    gain, low, high = values
    ours = f"{means[0]:.4f} beside {means[1]:.4f}: {gain:+.4f} ({low:+.4f} .. {high:+.4f}), {len(seeds)} seed"
    ours += "s" if len(seeds) > 1 else ""
    if other := on_other_tables(pair, "strong", seeds, found):
        ours += f", {other} on different item tables"
    if kind == "as_good":
        return ours, f"{'holds' if means[0] >= ENOUGH * means[1] else 'does not hold'} ({means[0] / means[1]:.1%})"
    return ours, "holds" if low > 0 else "does not hold" if high < 0 else "within noise"


def runs_of(found: dict, name: str) -> list[dict]:
    return [run for (_, row, _), run in found.items() if row == name]


def share(wanted: list[str], found: dict) -> tuple[str, str]:
    measure, *pair = wanted
    part, name = measure.split("/")
    parts = [[of_run["metrics"].get(part) for of_run in runs_of(found, of)] for of in pair]
    if not all(parts):  # a run without a record
        return MISSING
    values = [[of.get(name) if isinstance(of, dict) else None for of in of_run] for of_run in parts]
    if not all(NUMBER[1](value) for of_run in values for value in of_run):
        raise UserError(f"claims.yaml: share: {measure!r} is no figure that records have, as parameters/total is")
    return f"{statistics.mean(values[0]) / statistics.mean(values[1]):.2f}", "a figure of this base model"


def timed(dataset: str, measure: str, slow: str, fast: str) -> tuple[str, str]:
    path = cli.ROOT / "results" / "benchmarks" / "efficiency.json"
    found = read_json(path, "") if path.exists() else None
    if found is None or found["settings"]["dataset"] != dataset:
        return MISSING
    return f"{found['rows'][slow][measure] / found['rows'][fast][measure]:.2f}", "a figure of this base model"
