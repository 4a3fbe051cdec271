"""The tables of the pages: what is filled in where, and the figures beside the paper's."""

import json
import re
import statistics

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import llm_step, tables
from utils import cli, paper_claims, paper_recipes, paper_tables
from utils.errors import UserError
from utils.experiments import pack
from utils.paper_figures import depth_points
from utils.paper_recipes import Row, Table
from utils.paper_tables import efficiency_table, metric_table

RECORDS = ROOT / "results"


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_table_replaces_what_stands_in_its_place_and_nothing_else():
    example = "   <!-- table: x -->\n   <!-- end -->\n"  # indented: of a page that explains
    text = f"a\n{example}\n<!-- table: x -->\n| old |\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    made = {"x": lambda: "| new |", "y": lambda: r"| \1 |"}
    once = tables.filled(text, made)
    filled = "<!-- table: x -->\n\n| new |\n\n<!-- end -->\nb\n<!-- table: y -->\n\n| \\1 |\n\n<!-- end -->\n"
    assert once == f"a\n{example}\n{filled}" == tables.filled(once, made)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: z -->\n<!-- end -->\n",
        "<!-- table: x -->\n",
        "<!-- end -->\n",
        "<!-- table: x -->\n<!-- table: x -->\n<!-- end -->\n",
        "<!-- table: x -->\n<!-- table: x -->\n<!-- end -->\n<!-- end -->\n",
        "<!-- table: x --> \n<!-- end -->\n",
        "<!-- table: x -->\n<!-- end --> b\n",
        "<!--table: x-->\n<!-- end -->\n",
    ],
)
def test_a_place_that_is_not_understood_is_refused(text):
    with pytest.raises(UserError):
        tables.filled(text, {"x": lambda: "| new |"})


def test_one_line_says_which_page_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: z -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "FILES", [page])
    monkeypatch.setattr("sys.argv", ["tables.py"])
    with pytest.raises(SystemExit) as stop:
        tables.run_main(tables.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(page) in line and "z" in line
    assert page.read_text(encoding="utf-8") == "<!-- table: z -->\n<!-- end -->\n"


def test_the_papers_figures_stand_beside_ours_with_their_share_of_sasrecs():
    """Recomputed from the files: ours in percent, means over seeds; in brackets NDCG@5 over SASRec's there."""
    paper = json.loads((RECORDS / "paper_tables.json").read_text(encoding="utf-8"))
    ours = {}
    for row, name in {"SASRec": "sasrec", "E4SRec_8": "teacher", "SLMRec_4<-8": "student"}.items():
        files = [RECORDS / "runs" / "ml-100k" / f"{name}-seed{seed}.json" for seed in (1, 2, 42)]
        ours[row] = [json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in files]

    def mean(row: str, metric: str) -> float:
        return statistics.mean(run["test"]["sampled"][metric] for run in ours[row])

    header, _, *body = rows(tables.beside_paper("ml-100k"))
    assert [row[0] for row in body] == ["Popularity", *ours, "E4SRec, 32 layers"]
    for row in body:
        cells = dict(zip(header, row, strict=True))
        if row[0] in ours:
            for metric in ("HR@1", "HR@5", "NDCG@5", "MRR"):
                assert float(cells[metric]) == pytest.approx(100 * mean(row[0], metric), abs=0.0051)
            share = mean(row[0], "NDCG@5") / mean("SASRec", "NDCG@5")
            assert float(cells["NDCG@5 / SASRec's"]) == pytest.approx(share, abs=0.0051)
            size = ours[row[0]][0]["parameters"]["total"] / 1e6
            assert float(cells["params"].split()[0]) == pytest.approx(size, abs=0.051)
        method = "E4SRec" if row[0].startswith("E4SRec,") else row[0]
        for table, datasets in (("table_2", ("Cloth", "Movie")), ("table_3", ("Music", "Sport"))):
            for name in datasets if method != "Popularity" else ():
                value, base = (paper[table][of][name]["NDCG@5"] for of in (method, "SASRec"))
                found, share = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cells[f"paper, {name}"]).groups()
                assert float(found) == value and float(share) == pytest.approx(value / base, abs=0.0051)


def test_pairs_on_different_item_tables_are_counted():
    """A recommender has no item table of another run: None."""
    tables_read = {"a": [1, 2, 3], "b": [1, 5, 6], "SASRec": [None] * 3}
    ranks = {"test_full": pack(np.zeros(5, int)), "test_sampled": pack(np.zeros(5, int))}
    metrics = {"test": {key: {"NDCG@10": 1.0} for key in ("full", "sampled")}}
    found = {
        ("strong", name, seed): {"config": {"table_sha256": table and f"{table}"}, "ranks": ranks, "metrics": metrics}
        for name, read in tables_read.items()
        for seed, table in enumerate(read)
    }
    told = paper_claims.judged("better", ["a", "b"], "full", found)[0]
    assert told.endswith("3 seeds, 2 on different item tables")
    assert paper_claims.judged("better", ["a", "SASRec"], "full", found)[0].endswith("3 seeds")
    table = Table("t", "t", {}, {}, pairs=[["a", "b"], ["b", "SASRec"]])
    body = rows(paper_tables.difference_table(table, "strong", found))[2:]
    assert [row[-1] for row in body] == ["2", "2", "0", "0"]


def test_a_row_without_a_record_is_told(monkeypatch):
    monkeypatch.setattr(tables, "records", lambda dataset: {})
    with pytest.raises(UserError, match="ml-100k has no record of Popularity"):
        tables.beside_paper("ml-100k")


def test_pairs_are_compared_by_their_ratios():
    record = {"micro_batches": {"shared": 6.0, "each": 4.0}, "sasrec_groups": {"groups": 9.0, "one_piece": 3.0}}
    record |= {"compile": {"compiled": 1.1, "plain": 1.0, "first_seconds": 54.2}}
    record["many_targets"] = {"beauty": {"shared": 5.0, "copies": 2.0}}
    record["teacher_states"] = {"float32": 4.0, "bfloat16": 3.0, "per_batch": 2.0, "once": 8.0}
    ratios = [row[-1] for row in rows(tables.single_ratios(record))[2:]]
    assert ratios == ["1.50", "2.50", "3.00", "0.75", "0.50", "1.10"]


def test_the_papers_hours_stand_beside_what_a_gpu_measured():
    """Table 7 of the paper: 3.95 and 0.60 hours per epoch, 0.415 and 0.052 hours of inference."""
    record = json.loads((RECORDS / "benchmarks" / "llm_step.json").read_text(encoding="utf-8"))
    assert llm_step.paper_table(record).count("not measured") == 2
    record["settings"]["base_model"], record["environment"]["hardware"] = llm_step.LLAMA, "some GPU"
    record["rows"] = [{"kind": "training", "released": "32 layers", "ours": "student 4", "ratio": 41.26}]
    training, inference = rows(llm_step.paper_table(record))[2:]
    assert training[1:] == ["3.95", "0.6", "6.6", "41.3, some GPU"]
    assert inference[1:] == ["0.415", "0.052", "8.0", "needs a GPU, not measured"]


def test_a_depth_counts_a_seed_once():
    """All layers of a base of 24 are those of the row of 24 layers."""

    def run(layers: int, figure: float) -> dict:
        return {"config": {"kind": "teacher", "num_layers": layers}, "metrics": {"test": figure}}

    names = ["teacher, 24 layers", "teacher, full depth"]
    table = Table("figure2", "", {name: Row(name) for name in names}, {"beauty": {"strong": [1, 2]}}, shape="depth")
    found = {("strong", name, seed): run(24, seed / 10) for name in names for seed in (1, 2)}
    found["released", names[0], 3] = run(24, 0.9)
    assert depth_points(table, "strong", found) == ({24: [0.1, 0.2]}, {})


def test_a_share_of_what_no_record_has_is_told():
    found = {
        ("strong", name, 1): {"metrics": {"parameters": {"total": 3}, "test": {"full": {}}, "steps": 3}}
        for name in "ab"
    }
    assert paper_claims.share(["parameters/total", "a", "b"], found)[0] == "1.00"
    assert paper_claims.share(["parameters/total", "a", "c"], found) == paper_claims.MISSING
    for measure in ("parameters/totl", "test/full", "steps/total"):
        with pytest.raises(UserError, match=f"share: '{measure}' is no figure that records have"):
            paper_claims.share([measure, "a", "b"], found)


def test_a_claim_holds_by_the_interval_over_users(monkeypatch):
    """Ranks of 200 users: "first" is always first, "second" always second, "shuffled" is "mixed" in another order.

    In the sampled ranking all are as "mixed", so that nothing is ahead of anything.
    """
    mixed = np.arange(200) % 10
    ranks = {
        "first": mixed * 0,
        "second": mixed * 0 + 1,
        "mixed": mixed,
        "shuffled": mixed[::-1],
        "best": mixed - (mixed > 8),
    }

    def run(of: np.ndarray) -> dict:
        figure = float((1 / np.log2(of + 2)).mean())
        test = {"full": {"NDCG@10": figure}, "sampled": {"NDCG@10": 0.5}}
        ranks = {"test_full": pack(of), "test_sampled": pack(mixed)}
        return {"metrics": {"test": test, "seconds": {"train_epoch": figure}}, "ranks": ranks}

    found = {("strong", name, 42): run(of) for name, of in ranks.items()}
    released = {("released", "first", 42): run(mixed)}
    monkeypatch.setattr(paper_claims, "records", lambda name: found | released if name == "here" else {})
    judged = {
        ("better", "first", "second"): "holds",
        ("better", "second", "first"): "does not hold",
        ("better", "mixed", "shuffled"): "within noise",
        ("as_good", "best", "mixed"): "holds",
        ("as_good", "mixed", "best"): "holds",
        ("as_good", "second", "first"): "does not hold",
    }
    claims = [{"claim": "c", "paper": "p", kind: pair, "datasets": ["here"]} for kind, *pair in judged]
    claims.append(
        {"claim": "c", "paper": "p", "share": ["seconds/train_epoch", "second", "first"], "datasets": ["here"]}
    )
    claims += [{"claim": "missing", "paper": "p", "better": ["first", "missing"], "datasets": ["here"]}]
    claims += [{"claim": "everywhere", "paper": "p", "better": ["first", "second"]}, {"claim": "none", "paper": "p"}]
    table = Table("t", "t", {}, {"here": {"strong": [42]}, "elsewhere": {"strong": [42]}}, claims=claims)
    _, _, *cells = rows(paper_claims.claim_table(table))
    verdicts = {kind: [cell[-1].split(" (")[0] for cell in cells if cell[3] == kind] for kind in ("sampled", "full")}
    assert verdicts["full"][: len(judged)] == list(judged.values())
    of_kind = {"better": "within noise", "as_good": "holds"}
    assert verdicts["sampled"][: len(judged)] == [of_kind[kind] for kind, *_ in judged]
    assert [cell[4] for cell in cells if cell[-1] == "a figure of this base model"] == [f"{1 / np.log2(3):.2f}"]
    assert [cell[2:] for cell in cells if cell[0] == "everywhere"][2] == ["elsewhere", "-", "-", "not measured yet"]
    assert cells[-1][2:] == ["-", "-", "-", "not tested here"] and len(cells) == 2 * len(judged) + 6
    assert [cell[2:] for cell in cells if cell[0] == "missing"] == [["here", "-", "-", "not measured yet"]]
    gain = 1 - 1 / np.log2(3)
    assert cells[0][4] == "0.5000 beside 0.5000: +0.0000 (+0.0000 .. +0.0000), 1 seed"
    assert cells[1][4] == f"1.0000 beside {1 - gain:.4f}: {gain:+.4f} ({gain:+.4f} .. {gain:+.4f}), 1 seed"


def test_rows_are_ranked_by_the_seeds_that_all_of_them_have():
    def run(value: float) -> dict:
        test = {
            kind: dict.fromkeys(("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"), value)
            for kind in ("sampled", "full")
        }
        return {"metrics": {"test": test, "baselines": {"Popularity": {"test": test}}}}

    found = {"steady": {1: 0.5, 2: 0.9}, "ahead": {1: 0.6}}
    found = {("strong", name, seed): run(value) for name, of in found.items() for seed, value in of.items()}
    found["released", "steady", 1] = found["strong", "steady", 3] = run(0.9)
    names = {"steady": Row(run="steady"), "ahead": Row(run="ahead"), "to come": Row(run="to come")}
    table = Table("t", "t", names | {"popular": Row(baseline="ahead")}, {"here": {"strong": [1, 2]}}, paper=["table_2"])
    _, _, *cells = rows(metric_table(table, "here", "strong", found))
    assert [[*cell[:2], cell[8]] for cell in cells] == [
        ["steady", "3", "3.0"],  # by the .5 of seed 1, not by the mean of three
        ["ahead", "1", "1.5"],
        ["to come", "-", "-"],
        ["popular", "1", "1.5"],
    ]


def test_times_are_compared_where_hardware_and_threads_are_the_same():
    def run(seconds: float, threads: int, hardware: str = "CPU") -> dict:
        times = {"train_epoch": seconds, "score_test": seconds / 4}
        of = {"seconds": times, "environment": {"threads": threads, "hardware": hardware}}
        return {"metrics": of | {"parameters": {"trained": 1e6, "total": 2e6}, "peak_memory_bytes": 2**30}}

    found = {"SASRec": run(3, 1), "all": run(10, 1), "8": run(7, 2), "4": run(2, 1, "GPU"), "student": run(4, 1)}
    found = {("strong", name, 42): of for name, of in found.items()} | {("strong", "8", 1): run(1, 1)}
    papers = {"all": "E4SRec", "student": "SLMRec_4<-8"}
    table_rows = {
        name: Row(run=name, paper=papers.get(name)) for name in ("SASRec", "all", "8", "4", "none", "student")
    }
    table = Table("t", "t", table_rows, {"music2018": {"strong": [42]}}, paper=["table_9"])
    _, _, *cells = rows(efficiency_table(table, "music2018", "strong", found))
    ours = [cell[1:3] for cell in cells]
    assert ours[:3] == [["3.0 (0.75)", "0.8 (0.75)"], ["10.0 (2.50)", "2.5 (2.50)"], ["7.0", "1.8"]]
    assert ours[3:] == [["2.0", "0.5"], ["-", "-"], ["4.0 (1.00)", "1.0 (1.00)"]]
    assert [cell[-2:] for cell in cells if cell[0] in papers] == [
        ["1.88 (6.27)", "0.216 (7.20)"],
        ["0.3 (1.00)", "0.03 (1.00)"],
    ]
    later = {("strong", name, 1): run(seconds, 1) for name, seconds in (("all", 10), ("student", 5))}
    later["strong", "student", 42], wanted = run(4, 1), {"music2018": {"strong": [42, 1]}}
    table = Table("t", "t", table_rows, wanted, paper=["table_9"])
    _, _, *cells = rows(efficiency_table(table, "music2018", "strong", later))
    assert [cells[1][1], cells[-1][1]] == ["10.0 (2.00)", "5.0 (1.00)"]  # of the seed that most rows have


def test_a_speed_that_the_paper_claims_is_that_of_rows_timed_in_turn(tmp_path, monkeypatch):
    found = json.loads((RECORDS / "benchmarks" / "efficiency.json").read_text(encoding="utf-8"))["rows"]
    claim = {"claim": "c", "paper": "6.6", "datasets": ["beauty"], "timed": ["score_seconds", "E4SRec", "SLMRec_4"]}
    table = Table("t", "t", {}, {"beauty": {"strong": [42]}}, claims=[claim])
    _, _, (*_, ours, verdict) = rows(paper_claims.claim_table(table))
    ratio = found["E4SRec"]["score_seconds"] / found["SLMRec_4"]["score_seconds"]
    assert (ours, verdict) == (f"{ratio:.2f}", "a figure of this base model")
    elsewhere = {"claims": [claim | {"datasets": ["ml-100k"]}]}
    assert "not measured yet" in paper_claims.claim_table(
        Table("t", "t", {}, {"ml-100k": {"strong": [42]}}, **elsewhere)
    )
    claim["timed"][1] = "E4SREC"
    with pytest.raises(UserError, match="'E4SREC'"):
        paper_claims.claim_table(table)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert "not measured yet" in paper_claims.claim_table(table)


def test_tables_stand_in_the_order_of_their_numbers():
    names = [name for name in paper_recipes.table_names() if name.startswith("table")]
    assert names == [f"table{n}" for n in (1, 2, 6, 7, 8, 9, 10)]
