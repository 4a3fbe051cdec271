"""The ladder of docs/results.md: which commands a row needs, and what its record says of the runs."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import ladder
from utils.metrics import metrics_from_ranks, paired_bootstrap


@pytest.fixture
def commands(tmp_path, monkeypatch) -> list[list[str]]:
    """Commands in order; each leaves a run with ranks of 50 users."""
    given = []

    def run(command: list[str], check: bool, cwd) -> None:
        given.append(command[1:])
        folder = tmp_path / command[command.index("--output_dir") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(given))
        ranks = {kind: rng.integers(0, 40, 50) for kind in ("sampled", "full")}
        tensors = {f"test_{kind}": torch.from_numpy(found.astype(np.int32)) for kind, found in ranks.items()}
        save_file(tensors, folder / "ranks.safetensors")
        config = {"run_id": f"{len(given)}", "run_ids": None}
        if command[1] == "evaluate.py":
            parts = [command[command.index(flag) + 1] for flag in ("--run", "--fuse")]
            config["run_ids"] = [json.loads((tmp_path / part / "config.json").read_text())["run_id"] for part in parts]
        (folder / "config.json").write_text(json.dumps(config))
        if command[1] != "extract_emb.py":
            metrics = {kind: metrics_from_ranks(found) for kind, found in ranks.items()}
            seconds = {} if command[1] == "evaluate.py" else {"train_epoch": 60.0}
            report = {"environment": {}, "seconds": seconds, "parameters": {}, "valid": metrics, "test": metrics}
            (folder / "metrics.json").write_text(json.dumps(report))

    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "subprocess", SimpleNamespace(run=run))
    return given


def test_a_row_runs_after_the_rows_that_it_reads(commands):
    ladder.run_row("beauty", "student with titles + SASRec", 3)
    scripts = [command[0] for command in commands]
    assert scripts[:3] == ["train_sr_trad.py", "extract_emb.py", "extract_emb.py"]
    assert scripts[3:] == [
        "finetune.py",
        "distill.py",
        "train_sr_trad.py",
        "evaluate.py",
    ]  # SASRec sees that it is done
    folder = "outputs/beauty/ladder/"
    teacher, fusion = commands[3], commands[-1]
    tables = f"{folder}item-table-seed3,{folder}table-of-titles-seed3"
    assert teacher[teacher.index("--item_embeddings") + 1] == tables and teacher[teacher.index("--seed") + 1] == "3"
    assert fusion[fusion.index("--run") + 1] == f"{folder}student-with-titles-seed3" and "--seed" not in fusion
    assert fusion[fusion.index("--fuse") + 1] == f"{folder}sasrec-seed3"


def test_a_fusion_is_made_again_when_one_of_its_runs_is_another(commands, tmp_path):
    ladder.run_row("beauty", "student + SASRec", 1)
    parts = [f"outputs/beauty/ladder/{name}-seed1" for name in ("student", "sasrec")]
    fused = ladder.folder_of("beauty", "student + SASRec", 1)
    assert ladder.is_of(fused, parts)
    (tmp_path / parts[0] / "config.json").write_text(json.dumps({"run_id": "another"}))
    assert not ladder.is_of(fused, parts)


def test_the_record_holds_every_seed_and_its_tables_their_means(commands, tmp_path, monkeypatch, capsys):
    names = ["student", "student, without any teacher"]
    monkeypatch.setattr("sys.argv", ["ladder.py", "--dataset", "beauty", "--seeds", "1", "12", "--rows", *names])
    ladder.main()
    record = json.loads((tmp_path / "results/benchmarks/ladder-beauty.json").read_text())
    found = {(run["row"], run["seed"]): run["test"]["full"]["NDCG@10"] for run in record["runs"]}
    assert set(found) == {(name, seed) for name in ["SASRec", "teacher", *names] for seed in (1, 12)}
    values = [found["student", seed] for seed in (1, 12)]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| student  "))
    assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in row

    [told] = [d for d in record["differences"] if d["pair"] == names and d["ranking"] == "full"]
    ranks = [
        np.concatenate(
            [
                ladder.load_tensors(tmp_path / ladder.folder_of("beauty", name, seed) / "ranks.safetensors")[
                    "test_full"
                ]
                for seed in (1, 12)
            ]
        )
        for name in names
    ]
    assert [told["mean"], told["low"], told["high"]] == pytest.approx(paired_bootstrap(*ranks, clusters=2))
    assert told["mean"] == pytest.approx(
        statistics.mean(values) - statistics.mean([found[names[1], s] for s in (1, 12)])
    )
