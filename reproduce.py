"""Every table of the paper, and ours: run what is missing, and put what was printed and what was measured side by side.

python reproduce.py list                                    the tables, and how much of each is there
python reproduce.py plan table2 --dataset beauty            what `run` would run, and about how long
python reproduce.py run table2 --budget_hours 2.5           run it; again later: goes on where it stopped
python reproduce.py run all --dataset beauty --seeds 42 1
python reproduce.py record                                  records of finished runs, and the tables made of them
python reproduce.py show table2                             the table, from the records
python reproduce.py compare outputs/ml-100k/student-4from8 outputs/ml-100k/sasrec   user by user
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import argparse
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils import assets, cli
from utils.errors import Parser, RunError, UserError, cut_short, told_in_one_line
from utils.experiments import (
    Experiment,
    check_unchanged,
    execute,
    finished_experiments,
    read_record,
    record,
    records,
    with_parents,
)
from utils.files import atomic_file, is_plain_name, write_json
from utils.flags import suggest
from utils.paper_claims import claim_table
from utils.paper_figures import depth_figure, depth_table
from utils.paper_recipes import Table, read_table, table_names
from utils.paper_runs import protocols, recipe
from utils.paper_tables import (
    data_table,
    difference_table,
    efficiency_table,
    measured,
    metric_table,
    published_table,
    value_table,
)
from utils.paper_times import calibration, expected_seconds
from utils.report import compare_ranks, markdown_table

DEFAULT_SEED = 42
PER_DATASET = {
    "metrics": metric_table,
    "published": published_table,
    "efficiency": efficiency_table,
    "depth": depth_table,
}
WHOLE = {"data": data_table, "values": value_table, "claims": claim_table}
TABLES = cli.ROOT / "results" / "TABLES.md"
HEADER = """# The paper's tables: its figures beside ours

Made by `python reproduce.py record` from the records in `results/` alone; a dash is a cell without a run.
`recipes/paper/` says what each row is. Protocol *strong*: the dataset's recipe, with every position as a target where
a row does not say otherwise. Protocol *released*: one target per user for every model, read after the response,
weights by MRR. Sampled metrics are in percent, among 1 + 999 candidates, ties count against; mean ± standard deviation
over seeds. Items that a user touched at the same time stand in the order of the file. Columns named *paper* are of the
paper's data, with LLaMA-7B: its Cloth and Music have more than 30 times the users of `clothing2014` and `music2018`.
Seconds of runs that were made apart say little; `docs/speed.md` has rows that were timed in turn. Peak memory is that
of the whole process, with a student's that of its teacher's pass. `rank` is over the seeds that all measured rows
share, a dash where they share none. Intervals are over the users of the seeds that are there, and do not hold the
noise of training: a verdict of one seed is of that seed alone. That one model is as good as another holds where its
mean is at least 98 % of the other's. Claims quote the paper's NDCG@5 of the sampled ranking, in percent; ours are
NDCG@10. On Amazon's data the teachers of *strong* learn SASRec's logits too. The ablation of *strong* has the weights
cos 1, norm 0.01, ms 0.1, summed over blocks; in the paper's table 8 norm has 0.1, and ms 0.01 to 1."""


def main() -> None:
    args = command_line().parse_args()
    if dataset := getattr(args, "dataset", None):
        if not is_plain_name(dataset):
            raise UserError(f"--dataset {dataset}: the name of a dataset in datasets/ is expected")
        places = (f"recipes/{dataset}.yaml", f"outputs/{dataset}", f"results/runs/{dataset}")
        if not any((cli.ROOT / place).exists() for place in places):
            assets.dataset_folder(dataset)
    base = getattr(args, "base_model", None)
    if base and base != assets.EMBEDDED_MODEL and Path(base).is_dir():  # the scripts run in the checkout
        args.base_model = cli.portable_path(Path(base).resolve())
    verb = {"list": show_list, "plan": show_plan, "run": run, "show": show, "record": write_records, "compare": compare}
    with nullcontext() if args.verb in ("run", "record") else cut_short():
        verb[args.verb](args)


def command_line() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    tables = {"nargs": "?", "default": "all", "help": "one of `list`, or all (default)"}
    for name, meaning in {
        "list": "name the tables",
        "plan": "say what would run, and how long it would take",
        "run": "run what is missing",
        "show": "print tables from the records",
        "record": "write records of finished runs to results/, and the tables made of them",
    }.items():
        verb = verbs.add_parser(name, help=meaning)
        if name != "record":
            verb.add_argument("table", **tables)
        verb.add_argument("--dataset", help="one dataset instead of the table's (default: all of them)")
        if name != "record":
            verb.add_argument(
                "--base_model", help="language model of every teacher and student (default: the recipe's)"
            )
            verb.add_argument("--protocol", help="one protocol instead of the table's")
            verb.add_argument("--rows", nargs="+", help="these rows of the table alone")
        if name in ("plan", "run"):
            verb.add_argument("--seeds", type=natural, nargs="+", help="instead of the table's")
        if name == "plan":
            verb.add_argument("--calibrate", action="store_true", help="run 3 steps where no time is known yet")
        if name == "run":
            verb.add_argument(
                "--budget_hours", type=positive, default=float("inf"), help="stop after so long (default: never)"
            )
    verb = verbs.add_parser("compare", help="the difference between two runs over the users of test")
    verb.add_argument("runs", nargs=2, type=Path, metavar="FOLDER")
    return parser


def natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 0")
    return int(text)


def positive(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is no number above 0")


# --- what there is to run ---


def chosen_tables(args: argparse.Namespace) -> list[Table]:
    return [read_table(name) for name in (table_names() if args.table == "all" else [args.table])]


def narrowed(table: Table, args: argparse.Namespace) -> Table:
    """The table on the dataset, protocol and seeds that the command line asks for."""
    on, protocol, seeds = table.seeds, args.protocol, getattr(args, "seeds", None)
    if protocol and protocol not in protocols():
        raise UserError(f"--protocol {protocol}: it is one of {', '.join(protocols())}")
    if args.dataset:  # one that the table does not name is run with one seed
        on = {args.dataset: on.get(args.dataset, {"strong": [DEFAULT_SEED]})}
    if protocol:
        on = {dataset: {protocol: found.get(protocol, [DEFAULT_SEED])} for dataset, found in on.items()}
    if seeds:
        on = {dataset: dict.fromkeys(found, seeds) for dataset, found in on.items()}
    names = args.rows or table.rows
    for name in names:
        if name not in table.rows:
            raise UserError(f"--rows {name!r}: {table.name} has no such row{suggest(name, table.rows, '')}")
    rows = {name: table.rows[name] for name in names}
    if args.dataset not in (None, *table.seeds):  # what others report is of the table's own
        rows = {name: replace(row, published=None) for name, row in rows.items()}
    if args.rows:  # asked for by name: on whatever dataset
        rows = {name: replace(row, datasets=None) for name, row in rows.items()}
    return replace(table, seeds=on, rows=rows)


def wanted_runs(args: argparse.Namespace) -> list[Experiment]:
    """The runs of the tables, each once: the first seed of all of them, then the second, table by table."""
    found = [pair for table in chosen_tables(args) for pair in narrowed(table, args).experiments(args.base_model)]
    return list(dict.fromkeys(experiment for _, experiment in sorted(found, key=lambda pair: pair[0])))


def base_layers(experiment: Experiment) -> int:
    """How many layers the base model of a run has: a student's is its teacher's."""
    from models.llm.decoder import base_config  # transformers takes seconds to import, which most verbs do not need

    sections = recipe(experiment.dataset)
    values = sections["data"] | sections["open_p5" if experiment.spec.script == "train_open_p5" else "teacher"]
    base = experiment.base_model or values.get("base_model") or assets.EMBEDDED_MODEL
    return base_config(assets.base_model_path(str(base), cli.ROOT)).num_hidden_layers


# --- verbs ---


def show_list(args: argparse.Namespace) -> None:
    cells = []
    for table in chosen_tables(args):
        table = narrowed(table, args)
        states = [e.state() for e in dict.fromkeys(e for _, e in table.experiments(args.base_model))]
        done = sum(state in ("finished", "recorded") for state in states)
        cells.append([table.name, table.title, ", ".join(table.seeds) or "-", f"{done} of {len(states)}"])
    print(markdown_table(["table", "title", "datasets", "runs that are there"], cells))


def show_plan(args: argparse.Namespace) -> None:
    """Every run that is missing, with what it reads, in the order of `run`."""
    cells, total, missing = [], 0.0, list(with_parents(wanted_runs(args)))
    unknown = [calibration(experiment) for experiment in missing if expected_seconds(experiment) is None]
    execute_all(list(with_parents(unknown)) if args.calibrate else [])
    for experiment in missing:
        seconds = expected_seconds(experiment)
        total += seconds or 0.0
        hours = "?" if seconds is None else f"{seconds / 3600:.2f}"
        cells.append(
            [experiment.name, experiment.dataset, experiment.protocol, str(experiment.seed), experiment.state(), hours]
        )
    print(markdown_table(["run", "dataset", "protocol", "seed", "state", "hours"], cells))
    unknown = sum(row[-1] == "?" for row in cells)
    more = f" and {unknown} runs of which no time is known: --calibrate" if unknown else ""
    print(f"{len(cells)} runs, {total / 3600:.1f} hours{more}")


def run(args: argparse.Namespace) -> None:
    """Run what is missing, until the budget is used up."""
    wanted = wanted_runs(args)
    missing = list(with_parents(wanted))
    if not missing:
        print(f"all {len(wanted)} runs are there: `show` prints the table, `record` makes records of finished runs")
    execute_all(missing, args.budget_hours)


def execute_all(missing: list[Experiment], budget_hours: float = float("inf")) -> None:
    """Run or continue each; what failed is named at the end, with exit code 1, and what reads it is not run."""
    begun, outcomes = time.monotonic(), {}
    check_unchanged(missing)
    for dataset in dict.fromkeys(experiment.dataset for experiment in missing):
        assets.dataset_folder(dataset)  # what is not there is told before anything is run
    on_base = [e for e in missing if e.spec.script in ("finetune", "train_open_p5")]
    for experiment in {(e.dataset, e.spec.script, e.base_model): e for e in on_base}.values():
        base_layers(experiment)
    for at, experiment in enumerate(missing, 1):
        title = f"{experiment.name} on {experiment.dataset}, {experiment.protocol}, seed {experiment.seed}"
        failed = [parent.name for parent in experiment.parents() if outcomes.get(parent) == "failed"]
        if failed:
            outcomes[experiment] = "failed"
            print(f"[{at} of {len(missing)}] {title}: not run, as {failed[0]} failed")
            continue
        print(f"[{at} of {len(missing)}] {title}", flush=True)
        left = 3600 * budget_hours - (time.monotonic() - begun)
        outcomes[experiment] = execute(experiment, partial(base_layers, experiment), left)
        still = len(missing) - at + (outcomes[experiment] == "interrupted")
        if still and time.monotonic() - begun >= 3600 * budget_hours:
            print(f"the budget is used up: {still} of {len(missing)} runs are left; the same command goes on")
            break
    bad = [experiment for experiment, outcome in outcomes.items() if outcome == "failed"]
    if bad:
        raise RunError(f"{len(bad)} runs failed: {', '.join(str(experiment.folder) for experiment in bad)}")


def show(args: argparse.Namespace) -> None:
    tables = chosen_tables(args)
    if given := [flag for flag in ("base_model", "protocol", "rows") if getattr(args, flag)]:
        tables = [table for table in tables if table.shape not in WHOLE]
        if not tables:
            raise UserError(f"--{given[0]} has no effect on what {args.table} shows; leave it out")
    print("\n\n".join(render(narrowed(table, args), args.base_model) for table in tables))


def render(table: Table, base_model: str | None = None) -> str:
    """The whole table as Markdown, from the committed records alone."""
    parts = [f"## {table.title}"]
    if table.shape in WHOLE:
        return "\n\n".join([*parts, WHOLE[table.shape](table)])
    for dataset, of_protocols in table.seeds.items():
        found = records(dataset, base_model)
        for protocol in of_protocols:
            if not any(measured(found, protocol, row) for row in table.rows.values()):
                parts.append(f"{dataset}, protocol {protocol}: not measured yet.")
                continue
            parts += [f"### {dataset}, protocol {protocol}", PER_DATASET[table.shape](table, dataset, protocol, found)]
            parts += [differences] if (differences := difference_table(table, protocol, found)) else []
    return "\n\n".join(parts)


def write_records(args: argparse.Namespace) -> None:
    """results/runs/: one record per finished run; results/TABLES.md is made of all of them anew."""
    tables = [read_table(name) for name in table_names()]  # what is wrong there is told before a record is replaced
    folders = sorted((cli.ROOT / "outputs").glob(f"{args.dataset or '*'}/paper"))
    if args.dataset and not folders:
        raise UserError(f"--dataset {args.dataset}: outputs/{args.dataset}/paper/ holds no run; `run` makes them")
    for folder in folders:
        for experiment in finished_experiments(folder.parent.name):
            if found := record(experiment):
                path = experiment.record_file
                if path.exists() and read_record(path)["experiment"] != found["experiment"]:
                    raise UserError(f"{path} is of another run, whose base model has the same name; move it away")
                write_json(found, experiment.record_file)
                print(experiment.record_file.relative_to(cli.ROOT))
    with atomic_file(TABLES) as part:
        part.write_text(page(), encoding="utf-8")
    for table in tables:
        pairs = [(d, p) for d, of in table.seeds.items() for p in of if table.shape == "depth"]
        for dataset, protocol in pairs:
            path = TABLES.parent / "figures" / f"{table.name}-{dataset}-{protocol}.png"
            depth_figure(table, dataset, protocol, records(dataset), path)


def page() -> str:
    """results/TABLES.md."""
    tables = [render(read_table(name)) for name in table_names()]
    return "\n\n".join([HEADER, *tables]) + "\n"


def compare(args: argparse.Namespace) -> None:
    """Every metric of two run folders, and the difference with the interval of a paired bootstrap over users."""
    cells = [
        [
            f"{row['kind']} {row['metric']}",
            *(f"{row[side]:.4f}" for side in "ab"),
            f"{row['difference']:+.4f}",
            f"{row['low']:+.4f} .. {row['high']:+.4f}",
        ]
        for row in compare_ranks(*args.runs)
    ]
    print(markdown_table(["test", *map(str, args.runs), "difference", "95 % interval"], cells))


if __name__ == "__main__":
    with told_in_one_line("reproduce.py", "the same command goes on"):
        main()
