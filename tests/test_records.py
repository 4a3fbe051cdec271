"""What the committed records say: checks that no change of code can break, but a new record can (`make records`)."""

import json
import re
import statistics
from collections.abc import Iterator

import pytest
from conftest import ROOT

import reproduce
from benchmarks import tables
from utils.experiments import from_entry, read_record, records

pytestmark = pytest.mark.records
PAGES = {path.name: path.read_text(encoding="utf-8") for path in tables.FILES}
README = " ".join(PAGES["README.md"].split())
RECORDS = {path.name: records(path.name) for path in (ROOT / "results" / "runs").iterdir()}
SASREC, TEACHER, STUDENT, ALONE = "SASRec", "teacher", "student", "student, without any teacher"
BENCHMARKS = ROOT / "results" / "benchmarks"


def record(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_records(name):
    """`make docs` fills them in."""
    assert tables.filled(PAGES[name]) == PAGES[name]


def test_every_table_has_a_place():
    assert {name for text in PAGES.values() for name in tables.PLACE.findall(text)} == set(tables.TABLES)


def measured_parts(found: object) -> Iterator[dict]:
    """What of a record has an environment of its own: all of it, or parts that are measured one by one."""
    if isinstance(found, dict) and "environment" in found:
        yield found
    elif isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from measured_parts(part)


def test_every_record_is_of_today_s_flags_and_recipes():
    paths = list((ROOT / "results" / "runs").glob("*/*.json"))
    assert len(paths) > 100
    for path in paths:
        run = read_record(path)
        assert run["fingerprint"] == from_entry(run["experiment"]).fingerprint(), path


def test_every_record_was_measured_on_a_clean_committed_tree():
    runs = {(dataset, *key): run for dataset, found in RECORDS.items() for key, run in found.items()}
    environments = {name: run["metrics"]["environment"] for name, run in runs.items()}
    for path in BENCHMARKS.glob("*.json"):
        parts = list(measured_parts(record(path.stem)))
        assert parts, path
        environments |= {f"{path.stem} {at}": part["environment"] for at, part in enumerate(parts)}
    assert len(environments) >= 15
    for name, environment in environments.items():
        assert re.fullmatch("[0-9a-f]{40}", environment["git_commit"]), name


def test_an_epoch_takes_less_than_that_of_recbole():
    for name, (run,) in record("against_recbole")["speed"].items():
        assert run["epoch_seconds"]["ours"] < run["epoch_seconds"]["recbole"], name


def test_speed_and_memory_are_what_the_pages_say():
    speed, large = (record(name)["summary"] for name in ("llm_step", "catalogue"))
    assert speed["equal_depth_train_ratio"] >= 6 and speed["equal_depth_infer_ratio"] >= 5.5
    assert speed["full_depth_train_ratio"] >= 40 and speed["full_depth_infer_ratio"] >= 38
    assert speed["max_relative_difference"] <= 1e-4 and speed["max_relative_gradient_difference"] <= 1e-5
    assert f"costs {speed['distillation_over_plain']:.2f} times a plain step" in PAGES["speed.md"]
    assert large["full_ranks_that_are_the_same"] == 1 and large["loss_and_gradient_difference"] <= 1e-5
    assert large["loss_peak_share"] <= 0.25


def test_items_learn_five_times_the_targets_of_response_tokens():
    ratios: dict[str, list[float]] = {}
    for row in record("read_outs")["rows"]:
        ratios.setdefault(row["kind"], []).append(row["item"] / row["response"])
    assert max(ratios["training, targets"]) >= 5 and min(ratios["inference, users"]) >= 1.5


def test_evaluation_fits_in_memory_and_is_shared():
    memory, processes = (record("evaluation")[part] for part in ("memory", "processes"))
    assert (memory["users"], memory["items"]) == (1_219_678, 376_858) and memory["peak_extra_bytes"] <= 2 * 2**30
    assert processes["share"] <= 0.6 and processes["ranks_apart"] <= 1 and processes["other_ranks"] <= 5


def test_every_kill_was_survived():
    found = record("kills")
    counts = [count for modes in found["events"].values() for count in modes.values()]
    assert set(found["events"]) == {"train_sr_trad", "finetune", "distill"} and len(counts) == 9
    assert all(count["other"] == 0 and count["kills"] >= 40 for count in counts)
    assert found["random"] == {"kills": 24, "other": 0}


def mean(dataset: str, run: str, split: str = "test", kind: str = "full") -> float:
    """NDCG@10 over the seeds of a run, in the protocol strong."""
    of = {key: r for key, r in RECORDS[dataset].items() if key[:2] == ("strong", run)}
    found = [r["metrics"][split][kind]["NDCG@10"] for r in of.values()]
    return statistics.mean(found)


def three(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}"[1:] for value in values)


def test_the_readme_tells_the_means_of_three_seeds():
    names = (SASREC, TEACHER, STUDENT, ALONE)
    for name in names:
        assert sorted(s for p, n, s in RECORDS["ml-100k"] if (p, n) == ("strong", name)) == [1, 2, 42]
    sampled, full = (three([mean("ml-100k", name, kind=kind) for name in names]) for kind in ("sampled", "full"))
    assert f"{sampled} (full: {full})" in README


def test_sasrec_on_beauty_is_near_what_is_published():
    """Published: sampled softmax .0531, over all items .0597; full ranking, history masked."""
    assert mean("beauty", SASREC) >= 0.95 * 0.0531
    assert mean("beauty", "SASRec as published") >= 0.95 * 0.0597
    best = [mean("beauty", name) for name in ("SASRec as published", "teacher on the table of SASRec as published")]
    wanted = f"train it has {best[0]:.4f} (theirs: 0.0597), the teacher on its table {best[1]:.4f}".replace("0.", ".")
    assert wanted in README


def test_the_readme_tells_the_depths():
    names = [f"teacher, {depth}" for depth in ("1 layer", "2 layers", "4 layers")]
    found = [mean("beauty", name) for name in (*names, "teacher, full depth")]
    assert three(found) in README


def test_the_readme_tells_the_means_on_beauty_and_clothing():
    beauty, clothing = ([mean(d, name) for name in (SASREC, TEACHER, STUDENT)] for d in ("beauty", "clothing2014"))
    assert min(beauty[1:]) > beauty[0]
    assert f"student is {three(beauty)}, on Clothing {three(clothing)} (three seeds" in README


@pytest.mark.parametrize("dataset", tables.DATASETS)
def test_the_student_is_not_behind_its_teacher(dataset):
    assert mean(dataset, STUDENT) >= 0.98 * mean(dataset, TEACHER)


def test_the_recommenders_do_what_the_pages_say():
    """On MovieLens-100K student, teacher and SASRec are within noise, all above popularity."""
    found = [mean("ml-100k", name, kind="sampled") for name in (SASREC, TEACHER, STUDENT)]
    baseline = RECORDS["ml-100k"]["strong", SASREC, 42]["metrics"]["baselines"]["Popularity"]["test"]["sampled"]
    assert max(found) - min(found) <= 0.008  # the standard error over the test users
    assert min(found) >= 0.120 > 2 * baseline["NDCG@10"]


def test_the_paper_tables_are_those_of_the_records():
    assert (ROOT / "results" / "TABLES.md").read_text(encoding="utf-8") == reproduce.page()
