"""Fill the tables of README.md and docs/ from the records in results/.

    python benchmarks/tables.py      as `make docs` does

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`, neither indented, where NAME is a key of
TABLES. What stands there is replaced; the rest of a file is left as it is.
"""

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import (
    against_recbole,
    busy,
    cost,
    efficiency,
    evaluation,
    kills,
    llm_step,
    order,
    read_outs,
    same_time,
)
from benchmarks.command import command_line, run_main
from utils.checked import read_json
from utils.cli import ROOT
from utils.errors import UserError
from utils.experiments import records
from utils.files import atomic_file
from utils.paper_recipes import Table, printed, read_table
from utils.paper_tables import PRINTED, difference_table, mean, measured
from utils.report import markdown_table

RESULTS = ROOT / "results"
DATASETS = ("ml-100k", "beauty", "clothing2014")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE, MARK = (
    re.compile(r"^<!-- table: (.*) -->\n(?s:.*?)^<!-- end -->$", re.M),
    re.compile(r"^<!-- ?(?:table|end)\b", re.M),
)
LARGE = "llm_step_llama"  # what a GPU measured, by the command in docs/speed.md
BESIDE = ("Popularity", "SASRec", "E4SRec_8", "SLMRec_4<-8")  # rows of table2


def path_of(name: str) -> Path:
    return RESULTS / "benchmarks" / f"{name}.json"


def record(name: str) -> dict:
    """A benchmark's record."""
    return read_json(path_of(name), f"there is no record of benchmarks/{name}.py")


def beside_paper(dataset: str) -> str:
    """Sampled metrics in percent, means over seeds, and NDCG@5 also as a share of SASRec's, as the paper's."""
    table, found = read_table("table2"), records(dataset)
    paper = printed(table.paper)
    of_rows = {name: measured(found, "strong", table.rows[name]) for name in BESIDE}
    if missing := [name for name, runs in of_rows.items() if not runs]:
        raise UserError(f"{dataset} has no record of {missing[0]} with today's recipe: reproduce.py run table2, record")

    def mean(name: str, kind: str, metric: str) -> float:
        return statistics.mean(run["test"][kind][metric] for run in of_rows[name])

    rows = []
    for name, runs in of_rows.items():
        figures = [*(mean(name, "sampled", m) for m in PRINTED), mean(name, "full", "NDCG@10")]
        share = mean(name, "sampled", "NDCG@5") / mean("SASRec", "sampled", "NDCG@5")
        size = runs[0].get("parameters", {"total": 0})["total"]
        theirs = shares(paper, name) if name in paper else ["-"] * 4
        rows.append(
            [name, *(f"{100 * value:.2f}" for value in figures), f"{share:.2f}", f"{size / 1e6:.1f} M", *theirs]
        )
    header = ["test users, %", *PRINTED, "full NDCG@10", "NDCG@5 / SASRec's", "params"]
    rows.append(["E4SRec, 32 layers", *["-"] * (len(header) - 1), *shares(paper, "E4SRec")])
    return markdown_table([*header, *(f"paper, {name}" for name in paper["SASRec"])], rows)


def shares(paper: dict, method: str) -> list[str]:
    """The paper's NDCG@5 of a method on each dataset, in brackets as a share of its SASRec's."""
    pairs = [(paper[method][name]["NDCG@5"], base["NDCG@5"]) for name, base in paper["SASRec"].items()]
    return [f"{value:.2f} ({value / base:.2f})" for value, base in pairs]


def ladder_table(table: Table, protocol: str, found: dict) -> str:
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


def of_ladder(make: Callable, dataset: str) -> Callable[[], str]:
    """A table of the ladder's rows on a dataset."""
    return lambda: make(read_table("ladder"), "strong", records(dataset))


def single_ratios(record: dict) -> str:
    """What benchmarks/cost.py compares in pairs."""
    micro, grouped, compiling = (record[name] for name in ("micro_batches", "sasrec_groups", "compile"))
    rows = [("prefix shared by 4 micro-batches of 8", "one prefix each", micro["shared"] / micro["each"])]
    for name, speeds in record["many_targets"].items():
        rows.append((f"8 targets of a user on one history, {name}", "copies", speeds["shared"] / speeds["copies"]))
    rows.append(("SASRec's users in groups of like lengths", "one piece", grouped["groups"] / grouped["one_piece"]))
    states = record["teacher_states"]
    rows.append(("the teacher's states stored, bfloat16", "float32", states["bfloat16"] / states["float32"]))
    rows.append(("the teacher's states computed per batch", "stored", states["per_batch"] / states["float32"]))
    after = f"torch.compile, after {compiling['first_seconds']:.0f} s of compiling"
    rows.append((after, "as it is", compiling["compiled"] / compiling["plain"]))
    return markdown_table(["", "compared with", "ratio of speeds"], [[a, b, f"{ratio:.2f}"] for a, b, ratio in rows])


def large_catalogues(record: dict) -> str:
    """benchmarks/catalogue.py: seconds and memory beside the plain computation."""
    found = record["summary"]
    users = f"{int(record['settings']['users']):,} users of Beauty"
    rows = [
        [f"candidates, {users}, s", found["candidates_seconds"], found["candidates_released_seconds_each_pass"]],
        [f"full ranking after the user vectors, {users}, s", found["rank_seconds"], found["rank_plain_seconds"]],
        ["loss and gradient, 376,858 items of Cloth, s", found["loss_seconds"], found["loss_plain_seconds"]],
        ["the same, peak memory, MiB", found["loss_peak_bytes"] / 2**20, found["loss_plain_peak_bytes"] / 2**20],
    ]
    cells = [[name, f"{ours:,.1f}", f"{plain:,.1f}", f"{plain / ours:.1f}"] for name, ours, plain in rows]
    return markdown_table(["", "ours", "plain", "ratio"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "busy": lambda: busy.table(record("busy")),
    "beside the paper": lambda: beside_paper("ml-100k"),
    **{f"ladder of {name}": of_ladder(ladder_table, name) for name in DATASETS},
    **{f"differences on {name}": of_ladder(difference_table, name) for name in DATASETS},
    "order": lambda: order.table(record("order")),
    "llm_step": lambda: llm_step.speed_table(record("llm_step")),
    "read-outs": lambda: read_outs.table(record("read_outs")),
    "hours of the paper": lambda: llm_step.paper_table(record(LARGE if path_of(LARGE).exists() else "llm_step")),
    "cost": lambda: cost.optimisations_table(record("cost")),
    "single ratios": lambda: single_ratios(record("cost")),
    "efficiency": lambda: efficiency.table(record("efficiency")),
    "catalogue": lambda: large_catalogues(record("catalogue")),
    "evaluation": lambda: evaluation.table(record("evaluation")),
    "kills": lambda: kills.table(record("kills")),
    "same time": lambda: same_time.table(record("same_time")),
    "against RecBole": lambda: against_recbole.table(record("against_recbole")),
}


def filled(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """`text` with every table as the records have it; UserError where a place is not understood."""

    if len(MARK.findall(text)) != 2 * len(PLACE.findall(text)):
        raise UserError("a <!-- table: NAME --> or <!-- end --> stands alone, or shares its line")

    def fill(place: re.Match) -> str:
        name = place[1]
        if name not in tables:
            raise UserError(f"<!-- table: {name} -->: no such table; it is one of {', '.join(tables)}")
        return f"<!-- table: {name} -->\n\n{tables[name]()}\n\n<!-- end -->"

    return PLACE.sub(fill, text)


def main() -> None:
    parser = command_line(__doc__)
    parser.parse_args()
    for path in FILES:
        old = path.read_text(encoding="utf-8")
        try:
            new = filled(old)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if new != old:
            with atomic_file(path) as part:
                part.write_text(new, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(PLACE.findall(new))} tables{'' if new == old else ', written anew'}")


if __name__ == "__main__":
    run_main(main)
