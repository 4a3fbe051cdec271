"""Steps 1, 3 and 4 in two and three real processes end as in one; `tests/processes.py` says what they run.

Steps 3 and 4 also with the base sharded between two.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, tiny_llm_rec, tiny_sources
from processes import FLAGS, run_step
from safetensors.torch import load_file
from test_train import train

from utils.errors import UserError


def torchrun(number: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
    script = [ROOT / "tests" / "processes.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, [*command, *script])), capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Where one, two and three processes ran; of the three, one was killed, and two went on."""
    sources = tiny_sources(tmp_path_factory.mktemp("sources"))
    places = {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "three", "sharded")}
    for name in FLAGS:
        run_step(name, sources, places["one"])
    done = torchrun(2, sources, places["two"])
    assert done.returncode == 0, done.stderr
    killed = torchrun(3, sources, places["three"], "--killed")
    assert killed.returncode != 0 and "exitcode: -9" in killed.stderr
    assert not (places["three"] / "student" / "metrics.json").exists()
    resumed = torchrun(2, sources, places["three"])
    assert resumed.returncode == 0, resumed.stderr
    killed = torchrun(2, sources, places["sharded"], "--sharded", "--killed")
    assert killed.returncode != 0 and "exitcode: -9" in killed.stderr
    sharded = torchrun(2, sources, places["sharded"], "--sharded")
    assert sharded.returncode == 0, sharded.stderr
    return places


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("number", "name"), [*product(["two", "three"], FLAGS), ("sharded", "teacher"), ("sharded", "student")]
)
def test_weights_metrics_and_ranks_are_those_of_one_process(number, name, places):
    alone, shared = places["one"] / name, places[number] / name
    files = {str(path.relative_to(alone)) for path in alone.rglob("*.safetensors")}
    assert files == {str(path.relative_to(shared)) for path in shared.rglob("*.safetensors")} and len(files) > 1
    for file in files:
        wanted, found = load_file(alone / file), load_file(shared / file)
        assert wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            if key.endswith("qkv.bias"):  # a bias of the keys has no gradient: Adam follows the rounding
                tensor.chunk(3)[1].zero_(), found[key].chunk(3)[1].zero_()
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)
    ranks = load_file(shared / "ranks.safetensors")
    assert {len(found) for found in ranks.values()} == {30} and max(found.max() for found in ranks.values()) > 9
    one, several = metrics_of(alone), metrics_of(shared)
    for same in ("valid", "test", "best_step", "steps", "protocol", "parameters"):
        assert one[same] == several[same]


def test_the_loss_of_each_step_is_that_of_the_whole_batch(places):
    for name in FLAGS:
        logs = []
        for path in (place / name / "log.jsonl" for place in places.values()):
            rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
            logs.append([row["loss"] for row in rows if "loss" in row])
        logs = [losses for losses in logs if losses]
        assert len(logs) == (3 if name == "sasrec" else 4)
        assert len(logs[0]) == 20 and np.ptp(logs[0]) > 1e-3  # the batches differ
        np.testing.assert_allclose(logs[1:], [logs[0]] * (len(logs) - 1), rtol=1e-5)


def test_records_say_how_many_processes_there_were(places):
    """The killed run goes on from its newest checkpoint: there is one after each epoch of four or five steps."""
    for place, expected in (("one", [(0, 1)]), ("two", [(0, 2)]), ("three", [(0, 3), (8, 2)])):
        starts = metrics_of(places[place] / "student")["starts"]
        assert [(start["step"], start["processes"]) for start in starts] == expected
    starts = metrics_of(places["sharded"] / "student")["starts"]
    assert [(start["step"], start["sharded"]) for start in starts] == [(0, True), (6, True)]


def test_what_cannot_be_sharded_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--train_strategy full trains the layers"):
        tiny_llm_rec(train_strategy="full").shard(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="among processes, and there is one"):
        train(tmp_path / "run")
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for flags, words in (
        ({"micro_batch_size": "auto"}, "give a number"),
        ({"train_strategy": "full"}, "trains the layers"),
        ({}, "start Model without it"),
    ):
        with pytest.raises(UserError, match=words):
            train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()
