"""A kill before every file-system event of a small run: the next start ends as if nothing had happened."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_sources
from kills import contents, snapshots

import finetune
import train_open_p5
import train_sr_trad
from models.sr import MODELS
from utils import cli, report
from utils.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tiny_sources(tmp_path_factory.mktemp("kill"))


def step(script, section: str, sources: Path, *flags: object) -> None:
    common = ["--dataset", sources / "data", "--max_steps", 4, "--eval_steps", 2, "--batch_size", 8]
    main = script.main
    main(**cli.resolve(main, section, [str(word) for word in (*common, *flags)], models=MODELS))


EARLY = "--max_steps 6 --patience 1 --learning_rate 1 --warmup_steps 0"  # too high a rate: it stops after 4 steps
STEPS = {
    "train_sr_trad": (train_sr_trad, "sr", f"--item_dim 8 --num_layers 1 {EARLY}"),
    "finetune": (finetune, "teacher", "--base_model {0}/base --item_embeddings {0}/table --num_layers 2 --lora_r 2"),
    "train_open_p5": (train_open_p5, "open_p5", "--base_model {0}/base --num_layers 2 --lora_r 2"),
}


def outcome(folder: Path) -> tuple:
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}
    return {split: metrics[split] for split in ("valid", "test")}, weights


@pytest.fixture(params=STEPS)
def start(request, sources, monkeypatch) -> Callable:
    """start(place, seed, resume): one of the steps, its run in place/run."""
    script, section, own = STEPS[request.param]
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda self, path, **how: Path(path).write_bytes(b"a figure"))

    def one(place: Path, seed: int, resume: str) -> None:
        flags = [*own.format(sources).split(), "--seed", seed, "--resume", resume, "--output_dir", place / "run"]
        step(script, section, sources, *flags)
        assert json.loads((place / "run" / "metrics.json").read_text())["stopped_early"] == (EARLY in own)

    return one


def test_a_kill_at_any_moment_of_a_fresh_run_is_survived(start, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    copies = snapshots(place, tmp_path / "copies", lambda: start(place, 2, "auto"))
    assert len(copies) > 25
    for copy in copies:
        start(copy, 2, "auto")
        assert outcome(copy / "run") == outcome(place / "run"), copy
        assert set(contents(copy)) == set(contents(place)), copy


def test_a_kill_at_any_moment_of_a_replacement_is_survived(start, tmp_path):
    start(tmp_path / "alone", 2, "never")
    wanted = outcome(tmp_path / "alone" / "run")
    place = tmp_path / "place"
    start(place, 1, "never")
    earlier, earlier_files = outcome(place / "run"), contents(place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(place, 2, "never"))
    assert outcome(place / "run") == wanted != earlier and len(copies) > 30
    untouched = 0
    for number, copy in enumerate(copies):
        try:
            start(copy, 2, "never" if number % 8 == 7 else "auto")
        except UserError as error:  # not replaced yet: the earlier run is there, whole, and says how to go on
            assert "--resume never to replace it" in str(error)
            assert earlier_files.items() <= contents(copy).items()
            untouched += 1
            start(copy, 2, "never")
        assert outcome(copy / "run") == wanted, copy
        assert set(contents(copy)) == set(contents(place)), copy
    assert 1 <= untouched <= 3
