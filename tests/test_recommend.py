"""recommend.py and evaluate.py: any trained run by original ids and titles, every format, beside a full ranking."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TITLES
from kills import contents, step
from test_kill import sources  # noqa: F401

import evaluate
import finetune
import recommend
import train_sr_trad
from models.text import TextModel
from utils import cli
from utils.catalogue import Catalogue
from utils.data import Sequences
from utils.errors import UserError


@pytest.fixture(scope="module")
def runs(sources, tmp_path_factory):  # noqa: F811
    place = tmp_path_factory.mktemp("runs")
    step(train_sr_trad, "sr", sources, "--item_dim", 8, "--num_negatives", 7, "--output_dir", place / "sasrec")
    base = ["--base_model", sources / "base", "--item_embeddings", sources / "table", "--num_layers", 2]
    step(finetune, "teacher", sources, *base, "--output_dir", place / "teacher")
    return place


@pytest.mark.parametrize("name", ["sasrec", "teacher"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_top_k_is_that_of_a_full_ranking_in_numpy(name, batch_size, runs):
    trained = recommend.load(runs / name)
    rng = np.random.default_rng(0)
    histories = [[f"id{n}" for n in rng.integers(1, 41, rng.integers(1, 40))] for _ in range(20)]
    got = trained.recommend(histories, k=5, batch_size=batch_size)
    for history, answer in zip(histories, got, strict=True):
        numbers = [int(item[2:]) for item in history]
        with torch.no_grad():
            user = trained.model.user_vectors(torch.tensor([numbers[-30:]])).numpy().astype(float)[0]
            scores = trained.model.item_vectors().numpy().astype(float) @ user
        scores[[0, *numbers]] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(5, np.isfinite(scores).sum())]
        assert [item.id for item in answer.items] == [f"id{n}" for n in best]
        assert [item.score for item in answer.items] == pytest.approx(scores[best], abs=1e-4)
        assert [item.rank for item in answer.items] == list(range(1, len(best) + 1)) and not answer.unknown


def test_ties_go_to_the_lower_number_and_candidates_are_all_that_is_ranked():
    scores = np.array([9.0, 1, 3, 3, 2, 3, 0])
    assert recommend.best_of(scores, np.arange(1, 7), 2).tolist() == [2, 3]
    assert recommend.best_of(scores, np.array([1, 4, 5]), 9).tolist() == [5, 4, 1]
    assert recommend.best_of(scores, np.array([], int), 2).tolist() == []


def test_seen_items_unknown_items_and_empty_histories(runs):
    trained = recommend.load(runs / "sasrec")
    out, kept = (trained.recommend([["id4", "id5"]], k=40, exclude_seen=e)[0] for e in (True, False))
    assert len(out.items) == 38 and len(kept.items) == 40 and {"id4", "id5"} & {item.id for item in out.items} == set()
    mixed, plain = trained.recommend([["id4", "nothing", "FILM 5"], ["id4", "id5"]], k=3)
    assert mixed.items == plain.items and mixed.unknown == ["nothing"] and not mixed.by_popularity
    empty, strange = trained.recommend([[], ["nothing"]], k=3)
    counts = trained.catalogue.counts
    expected = [f"id{n}" for n in np.argsort(-counts[1:], kind="stable")[:3] + 1]
    for answer in (empty, strange):
        assert answer.by_popularity and [item.id for item in answer.items] == expected
    some = trained.recommend([["id4"]], k=9, candidates=["id7", "Film 9", "nothing", "id4"])[0]
    assert {item.id for item in some.items} == {"id7", "id9"}
    with pytest.raises(UserError, match="none of the candidates"):
        trained.recommend([["id4"]], candidates=["nothing"])


def run(capsys, *flags) -> str:
    capsys.readouterr()
    cli.run(recommend.main, None, [str(flag) for flag in flags])
    return capsys.readouterr()


def test_every_output_keeps_hostile_titles(runs, tmp_path, capsys):
    flags = ["--run", runs / "sasrec", "--history", "id30", "--k", 39]
    run(capsys, *flags, "--output", tmp_path / "o.jsonl")
    run(capsys, *flags, "--output", tmp_path / "o.csv")
    (line,) = (tmp_path / "o.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    titles = {item["id"]: item["title"] for item in json.loads(line)["items"]}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text(encoding="utf-8"), newline="")))
    assert {row["id"]: row["title"] for row in rows} == titles and len(titles) == 39
    assert {number: titles[f"id{number}"] for number in TITLES} == TITLES
    printed = run(capsys, *flags).out
    assert all(title in printed for title in TITLES.values()) and "(no title)  [id3]" in printed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h.jsonl", '["id4", "Film 5"]\n\n{"history": ["id6"], "user": 3}\n[]\n'),
        ("h.csv", "id4,Film 5\nid6\n\n"),
        ("H.CSV", "id4,Film 5\nid6\n\n"),
        ("h.csv", '\ufeff"id4","Film 5"\r\nid6,\r\n""\r\n'),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_histories_come_from_files_and_standard_input(name, text, piped, runs, tmp_path, capsys, monkeypatch):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    source = tmp_path / name
    if piped:
        monkeypatch.setattr("sys.stdin", io.StringIO(text.lstrip("\ufeff")))
        source = "-"
    got = run(capsys, "--run", runs / "sasrec", "--input", source, "--output", tmp_path / "o.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    direct = recommend.load(runs / "sasrec").recommend([["id4", "id5"], ["id6"], []])
    assert [[i["id"] for i in a["items"]] for a in answers] == [[i.id for i in a.items] for a in direct]
    assert "3 histories" in got.out and "per second" in got.out and answers[2]["by_popularity"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give one of --history"),
        (["--history", "a", "--input", "b.csv"], "give one of --history"),
        (["--history", "id4", "--output", "top.txt"], "ends in .csv or .jsonl"),
        (["--history", "id4", "--k", 0], ">= 1"),
        (["--input", "none.jsonl"], "No such file"),
        (["--input", "h.txt"], "end with .csv or .jsonl"),
        (["--input", "bad.jsonl"], "line 2"),
        (["--input", "twice.jsonl"], "line 1: a name stands twice"),
        (["--input", "latin.csv"], "UTF-8"),
        (["--input", "open.csv"], "open.csv, line 2: "),
        (["--input", "empty.csv"], "holds no history"),
        (["--input", "empty.jsonl"], "holds no history"),
        (["--history", "id4", "--run", "nowhere"], "holds no finished run"),
        (["--history", "id4", "--candidates", "none.txt"], "No such file"),
        (["--input", "-", "--candidates", "-"], "both standard input"),
        (["--input", "h.csv", "--output", "h.csv"], "is read by this command"),
        (["--input", "h.csv", "--output", "../x/link.csv"], "is read by this command"),
        (["--history", "id4", "--candidates", "h.csv", "--output", "h.csv"], "is read by this command"),
        (["--history", "id4", "--output", "run/items.jsonl"], "holds something else than answers"),
        (["--history", "id4", "--output", "h.csv"], "holds something else than answers"),
        (["--history", "id4", "--output", "folder.csv"], "is a folder"),
        (["--history", "id4", "--output", "h.csv/new/top.csv"], "h.csv is a file"),
    ],
)
def test_what_is_refused(flags, words, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('["id4"]\n{"items": []}\n')
    (tmp_path / "twice.jsonl").write_text('{"history": ["id4"], "history": ["id6"]}\n')
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9\n")
    for name in ("h.csv", "h.txt"):
        (tmp_path / name).write_text("id4\n")
    (tmp_path / "open.csv").write_text('id4,"Film 5\nid6,id7\n')  # its quote has no end
    for name in ("empty.csv", "empty.jsonl"):
        (tmp_path / name).touch()
    (tmp_path.parent / "x").mkdir(exist_ok=True)
    link = tmp_path.parent / "x" / "link.csv"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "h.csv")
    (tmp_path / "run").mkdir()
    (tmp_path / "folder.csv").mkdir()
    for name in ("config.json", "items.jsonl"):
        (tmp_path / "run" / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(capsys, *([] if "--run" in flags else ["--run", runs / "sasrec"]), *flags)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert contents(tmp_path) == before


def test_what_is_wrong_is_told_before_the_model_is_loaded(runs, tmp_path, capsys, monkeypatch):
    for module in (recommend, evaluate):
        monkeypatch.setattr(module, "load", lambda *_: pytest.fail("loaded"))
    for script, flags, words in (
        (recommend, ["--input", tmp_path / "none.jsonl"], "No such file"),
        (recommend, ["--history", "id4", "--candidates", tmp_path / "none.txt"], "No such file"),
        (evaluate, ["--dataset", "nowhere"], "--dataset nowhere"),
        (evaluate, ["--negatives", 1000000], "so no user has as many"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(script.main, None, ["--run", str(runs / "teacher"), *map(str, flags)])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_unknown_items_are_told_before_all_histories_are_ranked(runs, capsys, monkeypatch):
    def told(*args: object) -> list:
        assert "'Nothing' is not in the dataset" in capsys.readouterr().err
        return []

    monkeypatch.setattr(recommend.Trained, "recommend", told)
    cli.run(recommend.main, None, ["--run", str(runs / "sasrec"), "--history", "id4; Nothing"])


def test_a_build_for_gpus_works_where_there_is_none(runs, sources, monkeypatch):  # noqa: F811
    """Such a build of PyTorch names the device that it was made for, unless it is asked for one that is there."""
    built = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built)
    assert recommend.load(runs / "sasrec").device.type == "cpu"
    assert TextModel(str(sources / "base")).model.device.type == "cpu"


def test_a_base_that_was_moved_is_named(runs, sources, tmp_path, capsys):  # noqa: F811
    shutil.copytree(runs / "teacher", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"base_model": str(tmp_path / "gone")}))
    with pytest.raises(
        UserError, match=r"no longer there; bring it back, or name its new place .recommend\.py --base_model"
    ):
        recommend.load(tmp_path / "run")
    said = [run(capsys, "--run", runs / "teacher", "--history", "id4").out]
    said += [run(capsys, "--run", tmp_path / "run", "--history", "id4", "--base_model", sources / "base").out]
    assert said[0] == said[1] and "1." in said[0]
    with pytest.raises(UserError, match="sasrec is no language model; leave it out"):
        recommend.load(runs / "sasrec", sources / "base")


@pytest.mark.parametrize("name", ["o.csv", "o.jsonl"])
def test_answers_replace_answers(name, runs, tmp_path, capsys):
    (tmp_path / name).touch()
    found = []
    for history in ("id4", "id5", "id4"):
        run(capsys, "--run", runs / "sasrec", "--history", history, "--output", tmp_path / name)
        found.append((tmp_path / name).read_text(encoding="utf-8"))
    assert found[0] == found[2] != found[1]


def test_a_history_that_has_every_candidate_is_told(runs, tmp_path, capsys):
    (tmp_path / "candidates").write_text("id4\n")
    (tmp_path / "h.csv").write_text("id5\nid4\nid6,id4\n")
    err = run(
        capsys, "--run", runs / "sasrec", "--input", tmp_path / "h.csv", "--candidates", tmp_path / "candidates"
    ).err
    assert "no candidate is left" in err and "2 histories; the first is number 2" in err


def test_unknown_items_are_told_with_what_is_close(runs, capsys):
    err = run(capsys, "--run", runs / "sasrec", "--history", "film 55; Film 5; zzz").err
    assert "item 'film 55' is not in the dataset and is skipped; did you mean" in err and "'Film 5'" in err
    assert "item 'zzz' is not in the dataset and is skipped\n" in err


def test_unknown_candidates_and_more_than_a_screen_of_them_are_told(runs, tmp_path, capsys):
    (tmp_path / "candidates").write_text("id7\nFilm 9\nfilm 77\n")
    flags = ["--run", runs / "sasrec", "--candidates", tmp_path / "candidates"]
    err = run(capsys, *flags, "--history", "id4;" + ";".join(f"zz{n}" for n in range(30))).err.splitlines()
    assert sum("'zz" in line for line in err) == 20 and "and 10 more such items" in err
    assert sum("'film 77' is not in the dataset" in line for line in err) == 1 and len(err) == 22


def test_of_items_that_share_a_title_the_most_frequent_is_taken_and_told():
    catalogue = Catalogue(["a", "b", "c", "d"], ["Same", "same", "SAME", "a"], np.array([0, 1, 3, 3, 9]))
    assert [catalogue.number(name) for name in ("Same", "a", "A", "c", "none")] == [2, 1, 1, 3, None]
    same, a = catalogue.doubts(["same", "a", "c", "same"])
    assert same.startswith("items b, c, a have the title 'same': b, the most frequent, is taken")
    assert a == "'a' is an item's id, and is taken as that; it is the title of d too: ids tell them apart"


def test_a_title_that_is_its_items_own_id_is_no_doubt():
    catalogue = Catalogue(["1917", "B"], ["1917", "b"], np.array([0, 1, 1]))
    assert catalogue.doubts(["1917", "B", "b"]) == [] and [catalogue.number(name) for name in ("1917", "b")] == [1, 2]


@pytest.mark.parametrize("name", ["sasrec", "teacher"])
def test_a_run_is_measured_again_as_it_was(name, runs, capsys):
    saved = json.loads((runs / name / "metrics.json").read_text())
    for split in ("valid", "test"):
        cli.run(evaluate.main, None, ["--run", str(runs / name), "--split", split])
        out = capsys.readouterr().out
        for kind in ("sampled", "full"):
            line = next(line for line in out.splitlines() if line.startswith(f"| {split}, {kind}"))
            cells = [float(cell) for cell in line.split("|")[2:-1]]
            assert cells == pytest.approx(list(saved[split][kind].values()), abs=6e-5)


def test_other_numbers_of_candidates(runs, sources, capsys):  # noqa: F811
    cli.run(evaluate.main, None, ["--run", str(runs / "sasrec"), "--negatives", "5", "--candidate_seed", "3"])
    users = len(Sequences.load(sources / "data").users)
    assert f"{users} users, 5 to 5 negatives" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main, None, ["--run", str(runs / "sasrec"), "--negatives", "1000000000"])
    assert stop.value.code == 2 and "so no user has as many" in capsys.readouterr().err
