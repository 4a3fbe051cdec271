"""What the committed records say: checks that no change of code can break, but a new record can (`make records`)."""

import json
import re
import statistics
from itertools import product

import pytest
from conftest import ROOT

from benchmarks import tables

pytestmark = pytest.mark.records
PAGES = {path.name: path.read_text(encoding="utf-8") for path in tables.FILES}
RUNS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results/runs").glob("*.json")}
STEPS = ("train_sr_trad", "finetune", "distill")
BENCHMARKS = ROOT / "results" / "benchmarks"


def record(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_records(name):
    """`make docs` fills them in."""
    assert tables.filled(PAGES[name]) == PAGES[name]


def test_every_table_has_a_place():
    assert {name for text in PAGES.values() for name in tables.PLACE.findall(text)} == set(tables.TABLES)


def test_every_record_was_measured_on_a_clean_committed_tree():
    environments = {name: run["metrics"]["environment"] for name, run in RUNS.items()}
    environments |= {path.stem: record(path.stem)["environment"] for path in BENCHMARKS.glob("*.json")}
    assert len(environments) >= 15
    for name, environment in environments.items():
        assert re.fullmatch(r"[0-9a-f]{40}", environment["git_commit"]), name


def test_speed_and_memory_are_what_the_pages_say():
    speed, large = (record(name)["summary"] for name in ("llm_step", "catalogue"))
    assert speed["equal_depth_train_ratio"] >= 6 and speed["equal_depth_infer_ratio"] >= 5.5
    assert speed["full_depth_train_ratio"] >= 40 and speed["full_depth_infer_ratio"] >= 38
    assert speed["max_relative_difference"] <= 1e-4 and speed["max_relative_gradient_difference"] <= 1e-5
    assert f"costs {speed['distillation_over_plain']:.2f} times a plain step" in PAGES["speed.md"]
    assert large["full_ranks_that_are_the_same"] == 1 and large["loss_and_gradient_difference"] <= 1e-5
    assert large["loss_peak_share"] <= 0.25


def test_the_fast_computations_move_no_metric():
    """The record of the whole pipeline without dropout, 24 metrics a step; a single user is 0.00106 of a hit rate."""
    runs = record("same_metrics")["runs"]
    assert [run["step"] for run in runs] == ["train_sr_trad", "finetune", "distill"]
    for run in runs:
        assert len(run["differences"]) == 24 and max(map(abs, run["differences"].values())) <= 1e-3, run["step"]
    largest = max(abs(value) for run in runs for value in run["differences"].values())
    assert f"the one that differs most does so by {largest:.5f}" in " ".join(PAGES["results.md"].split())


def test_with_dropout_the_metrics_differ_by_noise_alone():
    """Three seeds with everything on and off: Student's paired t test, 5 %, two-sided, for each NDCG@10."""
    runs = record("same_metrics_dropout")["runs"]
    for step, kind in product(STEPS, ("sampled", "full")):
        for split in ("test", "valid"):
            found = {r["seed"]: r["differences"][f"{split}/{kind}/NDCG@10"] for r in runs if r["step"] == step}
            assert list(found) == [1, 2, 3]
            error = statistics.stdev(found.values()) / 3**0.5
            assert abs(statistics.mean(found.values())) <= 4.303 * error, (step, split, kind)


def test_reading_at_items_is_better_over_three_seeds():
    """Mean NDCG@10 beside the recipe before: higher on test and validation; and what the README says of the means."""
    runs = record("seeds")["runs"]
    before, now = dict.fromkeys(run["commit"] for run in runs)
    means = {}
    for step, split, kind in product(STEPS, ("test", "valid"), ("sampled", "full")):
        for commit in (before, now):
            found = {r["seed"]: r[split][kind]["NDCG@10"] for r in runs if (r["commit"], r["step"]) == (commit, step)}
            assert list(found) == [1, 2, 42]
            means[commit, step, split, kind] = statistics.mean(found.values())
        gain = means[now, step, split, kind] - means[before, step, split, kind]
        assert gain >= (-1e-6 if step == "train_sr_trad" else 0), (step, split, kind)
    for kind in ("sampled", "full"):
        for step in STEPS:
            assert f"{means[now, step, 'test', kind]:.4f}".removeprefix("0") in PAGES["README.md"], (step, kind)


def test_sasrec_on_beauty_is_near_what_is_published():
    """Published: sampled softmax .0531, BCE .0354; full ranking, history masked."""
    found = [run["test"]["full"]["NDCG@10"] for run in record("ladder-beauty")["runs"] if run["row"] == "SASRec"]
    assert statistics.mean(found) >= 0.95 * 0.0531


def test_on_beauty_teacher_and_student_are_above_sasrec_as_the_readme_says():
    runs = record("ladder-beauty")["runs"]
    found = [
        statistics.mean(r["test"]["full"]["NDCG@10"] for r in runs if r["row"] == row)
        for row in ("SASRec", "teacher", "student")
    ]
    assert min(found[1:]) > found[0]
    assert "full NDCG@10 " + ", ".join(f"{value:.4f}"[1:] for value in found) in PAGES["README.md"]


def test_the_recommenders_do_what_the_pages_say():
    """Student, teacher and SASRec within noise, all above popularity; half the layers in half the time."""
    runs = {run["config"]["kind"]: run for name, run in RUNS.items() if name.startswith("ml-100k-")}
    found = {kind: run["metrics"]["test"]["sampled"]["NDCG@10"] for kind, run in runs.items()}
    popularity = runs["sr"]["metrics"]["baselines"]["Popularity"]["test"]["sampled"]["NDCG@10"]
    assert abs(found["student"] - found["teacher"]) <= 0.008  # the standard error over the test users
    assert max(found.values()) - min(found.values()) <= 0.008 and min(found.values()) >= 0.120 > 2 * popularity
    seconds = {kind: run["metrics"]["seconds"]["score_test"] for kind, run in runs.items()}
    assert 0.4 <= seconds["student"] / seconds["teacher"] <= 0.65
    assert 2 * runs["student"]["config"]["num_layers"] == runs["teacher"]["config"]["num_layers"] == 8
