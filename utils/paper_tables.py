"""The paper's tables, its figures beside ours: Markdown from records."""

import statistics

import numpy as np

from utils.checked import read_json
from utils.errors import UserError
from utils.experiments import records, unpack
from utils.metrics import paired_bootstrap
from utils.paper_recipes import PAPER, Row, Table, printed
from utils.report import markdown_table

DOMAINS = {
    "clothing2014": "Cloth",
    "music2018": "Music",
    **{d.lower(): d for d in ("Cloth", "Movie", "Music", "Sport")},
}
PRINTED = ("HR@1", "HR@5", "NDCG@5", "MRR")  # by the paper, in percent


# --- what was measured ---


def measured(found: dict, protocol: str, row: Row) -> list[dict]:
    """Metrics of the row's runs, one per seed: {"test": {"sampled": ..., "full": ...}, ...}; empty without a record."""
    runs = [
        run["metrics"] for (of, name, _), run in found.items() if of == protocol and name == (row.run or row.baseline)
    ]
    if row.baseline:  # without training: the same for every seed
        return [run["baselines"][row.model] for run in runs if row.model in run["baselines"]][:1]
    return runs


def printed_value(of_domain: dict | None, metric: str) -> str:
    """A value of the paper; a dash where it prints none."""
    value = (of_domain or {}).get(metric)
    return "-" if value is None else f"{value:.2f}"


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
    """Sampled metrics of the paper and the full ranking, in percent, and the paper's own on its domains.

    The average rank is over the seeds that all measured rows share; a dash where they share none.
    """
    paper, domain = printed(table.paper), DOMAINS.get(dataset)
    runs = {name: measured(found, protocol, row) for name, row in table.rows.items()}
    seeds = [{s for of, name, s in found if (of, name) == (protocol, row.run)} for row in table.rows.values()]
    shared = set.intersection(*filter(None, seeds)) if any(seeds) else set()
    alike = {key: run for key, run in found.items() if key[-1] in shared}
    means = {
        name: [statistics.mean(run["test"]["sampled"][m] for run in of) for m in PRINTED] if of else []
        for name, row in table.rows.items()
        for of in [measured(alike, protocol, row) if row.run else runs[name] if shared else []]
    }
    ranks, cells = average_ranks(means), []
    domains = list(dict.fromkeys(d for method in paper.values() for d in method))
    for name, row in table.rows.items():
        of = runs[name]
        line = [name, str(len(of) or "-"), *(mean([r["test"]["sampled"][m] for r in of], 100, 2) for m in PRINTED)]
        full = [mean([r["test"]["full"][m] for r in of], 100, 2) for m in ("HR@10", "NDCG@10")]
        line += [*full, ranks.get(name, "-")]
        theirs = paper.get(row.paper, {})
        shown = [(domain, m) for m in PRINTED] if domain in domains else [(d, "NDCG@5") for d in domains]
        line += [printed_value(theirs.get(d), m) for d, m in shown]
        cells.append(line)
    header = [f"{dataset}, %", "seeds", *PRINTED, "full HR@10", "full NDCG@10", "rank"]
    header += [f"paper {m}" for m in PRINTED] if domain in domains else [f"paper NDCG@5, {d}" for d in domains]
    return markdown_table(header, cells)


def published_table(table: Table, dataset: str, protocol: str, found: dict) -> str:
    """Test NDCG@10 of the full ranking beside what others report, and whether it is at least 95 % of that."""
    cells = []
    for name, row in table.rows.items():
        theirs, of = row.published, measured(found, protocol, row)
        values = [run["test"]["full"]["NDCG@10"] for run in of]
        line = [name, f"{theirs['ndcg']:.4f}", theirs["loss"]] if theirs else [name, "-", "-"]
        line += [str(len(of) or "-"), mean(values)]
        ratio = statistics.mean(values) / theirs["ndcg"] if theirs and values else None
        line += ["-", "-"] if ratio is None else [f"{100 * (ratio - 1):+.1f} %", "yes" if ratio >= 0.95 else "no"]
        trained = [run for run in of if "parameters" in run]  # what learns nothing has none
        line += [f"{trained[0]['parameters']['total'] / 1e6:.2f}" if trained else "-"]
        threads = sorted({str(run["environment"]["threads"]) for run in trained})
        alike = len({(run["environment"]["hardware"], run["environment"]["threads"]) for run in trained}) == 1
        seconds = [run["seconds"]["train_epoch"] for run in trained if "train_epoch" in run["seconds"]]
        line += [mean(seconds, digits=1) if alike else "-", ", ".join(threads) or "-"]
        cells.append([*line, theirs["source"] if theirs else "-"])
    header = [f"{dataset}, full NDCG@10", "published", "its loss", "seeds", "ours", "difference", "at least 95 %"]
    return markdown_table([*header, "params, M", "s/epoch", "threads", "source"], cells)


def difference(pair: list[str], protocol: str, kind: str, found: dict) -> tuple[list[int], tuple[float, float, float]]:
    """Seeds that both runs of a pair have; mean difference of test NDCG@10 over their users, with its interval."""
    seeds = [seed for of, name, seed in found if (of, name) == (protocol, pair[0]) and (of, pair[1], seed) in found]
    if not seeds:
        return [], (0.0, 0.0, 0.0)
    ours, theirs = (
        np.concatenate([unpack(found[protocol, name, seed]["ranks"][f"test_{kind}"]) for seed in seeds])
        for name in pair
    )
    if len(ours) != len(theirs):
        raise UserError(f"{pair[0]} and {pair[1]} have records of other users: of two versions of a dataset; run both")
    return seeds, paired_bootstrap(ours, theirs, clusters=len(seeds))


def on_other_tables(pair: list[str], protocol: str, seeds: list[int], found: dict) -> int:
    """Of how many seeds the two runs read different item tables: a part of their difference is that of the tables."""
    read = [{found[protocol, name, seed].get("config", {}).get("table_sha256") for name in pair} for seed in seeds]
    return sum(len(tables) > 1 and None not in tables for tables in read)


def difference_table(table: Table, protocol: str, found: dict) -> str:
    """Mean differences of NDCG@10 between pairs of runs, over the users of all seeds that both have, with interval."""
    cells = []
    for pair in table.pairs:
        for kind in ("sampled", "full"):
            seeds, (mean, low, high) = difference(pair, protocol, kind, found)
            if seeds:
                interval = f"{low:+.4f} .. {high:+.4f}"
                other = str(on_other_tables(pair, protocol, seeds, found))
                cells.append([" - ".join(pair), kind, str(len(seeds)), f"{mean:+.4f}", interval, other])
    header = ["test NDCG@10", "ranking", "seeds", "difference", "95 % interval", "on different item tables"]
    return markdown_table(header, cells) if cells else ""


def data_table(table: Table) -> str:
    """Users, items and interactions of our datasets, as the runs counted them, and of the paper's."""
    cells = []
    for dataset in table.seeds:
        of_runs = (run["metrics"]["protocol"] for run in records(dataset).values())
        counts = next((found for found in of_runs if "interactions" in found), None)
        cells += [[dataset, *(counts[name] for name in ("users", "items", "interactions"))]] if counts else []
    for name, counts in read_json(PAPER, "")[table.paper[0]]["rows"].items():
        cells.append([f"paper, {name}", *counts[:3]])
    rows = [
        [name, *(f"{n:,}" for n in counts), f"{100 * counts[2] / counts[0] / counts[1]:.3f}"] for name, *counts in cells
    ]
    return markdown_table(["dataset", "users", "items", "interactions", "density, %"], rows)


def efficiency_table(table: Table, dataset: str, protocol: str, found: dict) -> str:
    """Seconds, parameters and memory of each row, beside the paper's columns as printed.

    One seed of each, so that no mean is of two machines: of those that the table wants, the one with most rows. In
    brackets the ratio to the last row; of ours only where the records name the same hardware and threads.
    """
    paper, domain, wanted = read_json(PAPER, "")[table.paper[0]], DOMAINS.get(dataset), table.seeds[dataset][protocol]
    rows = {row.run for row in table.rows.values()}
    seed = max(wanted, key=lambda seed: sum((protocol, run, seed) in found for run in rows))  # the first of equals
    found, cells = {key: run for key, run in found.items() if key[-1] == seed}, []
    ours = {name: next(iter(measured(found, protocol, row)), None) for name, row in table.rows.items()}
    theirs = {name: paper["rows"].get(row.paper) for name, row in table.rows.items()}
    theirs = {name: of.get(domain) if isinstance(of, dict) else of for name, of in theirs.items()}
    last, theirs_last = (of[list(table.rows)[-1]] for of in (ours, theirs))
    for name in table.rows:
        line = [name] + ["-"] * 6
        if run := ours[name]:
            alike = last and all(run["environment"][k] == last["environment"][k] for k in ("hardware", "threads"))
            line = [name]
            for kind in ("train_epoch", "score_test"):
                ratio = f" ({run['seconds'][kind] / last['seconds'][kind]:.2f})" if alike else ""
                line.append(f"{run['seconds'][kind]:.1f}{ratio}")
            line += [f"{run['parameters'][kind] / 1e6:.2f}" for kind in ("trained", "total")]
            line += [f"{run['peak_memory_bytes'] / 2**30:.2f}", str(run["environment"]["threads"])]
        for at, column in enumerate(paper["columns"]):
            own, base = (of and of[at] for of in (theirs[name], theirs_last))
            ratio = f" ({own / base:.2f})" if own and base and "hours" in column else ""
            line.append("-" if own is None else f"{own:g}{ratio}")
        cells.append(line)
    header = [dataset, "s/epoch (ratio)", "s to score (ratio)", "trained, M", "params, M", "peak GiB", "threads"]
    return markdown_table([*header, *(f"paper: {column.replace('_', ' ')}" for column in paper["columns"])], cells)


VALUES = ("learning_rate", "max_steps", "num_epochs", "batch_size", "eval_steps", "warmup_steps", "lr_scheduler")
VALUES += ("lambda_cos", "lambda_norm", "lambda_ms", "lambda_kl", "num_blocks", "read_out", "train_targets")
IN_PAPER = {
    "lambda_1": "lambda_cos",
    "lambda_2": "lambda_norm",
    "lambda_3": "lambda_ms",
    "lr_scheduler_type": "lr_scheduler",
}


def value_table(table: Table) -> str:
    """The flags that the runs were made with, beside those of the paper."""
    columns: dict[str, dict] = {}
    for dataset, of_protocols in table.seeds.items():
        for (protocol, name, _), run in records(dataset).items():
            if protocol in of_protocols and name in [row.run for row in table.rows.values()]:
                columns.setdefault(f"{dataset}, {protocol}: {name}", run["config"])
    values = read_json(PAPER, "")[table.paper[0]]
    for domain in ("Cloth", "Movie", "Music", "Sport"):
        columns[f"paper, {domain}"] = {IN_PAPER.get(k, k): v for k, v in (values["common"] | values[domain]).items()}
    cells = [[name, *("-" if (v := of.get(name)) is None else str(v) for of in columns.values())] for name in VALUES]
    return markdown_table(["flag", *columns], cells)
