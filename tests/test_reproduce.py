"""reproduce.py shows finished runs, and writes records only when it is asked to."""

import json

import numpy as np
import pytest
from kills import contents
from test_train import finish, train

import reproduce
from utils import assets, cli


@pytest.mark.parametrize("asked", [False, True])
def test_records_are_written_only_when_asked(asked, tmp_path, monkeypatch, capsys):
    run, model, state = train(tmp_path / "outputs" / "synthetic" / "ablation")
    finish(run, model, state)
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "items.npy", run.data.items)
    np.save(folder / "offsets.npy", run.data.offsets)
    info = {"name": "synthetic", "items": run.data.num_items, "fingerprint": run.data.fingerprint}
    (folder / "dataset.json").write_text(json.dumps(info))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "synthetic-ablation.json").write_text("a committed record")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(assets, "DATASETS", tmp_path)
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "runs")
    before = contents(tmp_path / "runs")
    cli.run(reproduce.main, None, ["--dataset", "data", *(["--record"] if asked else [])])
    assert "SASRec (ablation)" in capsys.readouterr().out
    assert (contents(tmp_path / "runs") == before) != asked
    if asked:
        record = json.loads((tmp_path / "runs" / "synthetic-ablation.json").read_text())
        assert record["metrics"] == json.loads((run.folder / "metrics.json").read_text())
