"""Layers by an explicit list: from the command lines of teacher and student to the weights that they compute with."""

import json

import pytest
import torch
from kills import step
from test_kill import sources  # noqa: F401
from transformers import AutoModel

import distill
import finetune
from models.llm.storage import load_llm_rec
from utils.errors import UserError

STUDENT = ["--num_blocks", 1, "--lambda_ms", 0]


@pytest.fixture
def base(sources):  # noqa: F811
    return AutoModel.from_pretrained(sources / "base")  # of 2 layers


@pytest.fixture
def train(sources, tmp_path):  # noqa: F811
    """train(name, flags): a teacher, or a student of `teacher`; its resolved flags and its weights."""

    def one(name: str, *flags: object) -> tuple[dict, dict]:
        own = ["--base_model", sources / "base", "--item_embeddings", sources / "table"]
        script, section = (finetune, "teacher") if name == "teacher" else (distill, "student")
        own = own if name == "teacher" else ["--teacher", tmp_path / "teacher", *STUDENT]
        step(script, section, sources, *own, "--train_strategy", "frozen", *flags, "--output_dir", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config, load_llm_rec(tmp_path / name).base.layers.state_dict()

    return one


def is_layer(found: dict, layer: torch.nn.Module) -> bool:
    return all(torch.equal(found[f"0.{name}"], value) for name, value in layer.state_dict().items())


def test_teacher_and_student_keep_the_layers_that_are_listed(train, base):
    config, found = train("teacher", "--layer_selection", "1")
    assert (config["num_layers"], config["layer_selection"], config["title"]) == (1, "1", "Teacher-1")
    assert is_layer(found, base.layers[1]) and not is_layer(found, base.layers[0])
    for number, flags in enumerate([["--num_layers", 1], ["--layer_selection", "1"], ["--layer_selection", "0"]]):
        config, found = train(f"student-{number}", *flags)
        assert config["num_layers"] == 1 and config["layer_selection"] == "011"[-number - 1]
        assert is_layer(found, base.layers[int(config["layer_selection"])])


def test_a_student_that_keeps_fewer_layers_than_its_teacher_lists_must_say_which(train, base, tmp_path):
    config, _ = train("teacher", "--layer_selection", "0, 1", "--num_layers", 2)
    assert config["layer_selection"] == "0,1"
    with pytest.raises(UserError, match=r"teacher keeps layers 0,1 of its base; say which .* --layer_selection 0$"):
        train("student", "--num_layers", 1)
    assert not (tmp_path / "student").exists()
    for selection, layer in (("first", 0), ("1", 1)):
        config, found = train(selection, "--num_layers", 1, "--layer_selection", selection)
        assert config["layer_selection"] == selection and is_layer(found, base.layers[layer])
