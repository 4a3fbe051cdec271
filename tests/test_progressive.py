"""Progressive distillation: a student that teaches the next one, in a chain of three runs."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_sources
from kills import step

import distill
import finetune
from models.llm.storage import HEADS_FILE, load_llm_rec
from utils.checked import load_tensors
from utils.data import Sequences, training_examples
from utils.errors import UserError


@pytest.fixture(scope="module", params=["item", "response"])
def chain(request, tmp_path_factory):
    """A teacher of 4 layers, its student of 2, and the student's student of 1; what the two students learned from."""
    place, learned = tiny_sources(tmp_path_factory.mktemp("chain"), layers=4), []
    common = ["--base_model", place / "base", "--item_embeddings", place / "table", "--num_layers", 4, "--lora_r", 2]
    common += ["--train_targets", "all", "--max_seq_length", 5, "--learning_rate", 0.01]
    more = ["--read_out", request.param, "--item_output", "residual", "--output_dir", place / "teacher"]
    step(finetune, "teacher", place, *common, *more)
    logits = distill.give_logits

    def logits_given(model, *others):
        logits(model, *others)
        learned.append((model.teacher_states, model.teacher_vectors, model.teacher_table))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "give_logits", logits_given)
        for teacher, name, layers, blocks in (("teacher", "student", 2, 2), ("student", "last", 1, 1)):
            flags = ["--teacher", place / teacher, "--num_layers", layers, "--num_blocks", blocks, "--lambda_kl", 1]
            step(distill, "student", place, *flags, "--lambda_ms", 0, "--output_dir", place / name)
    return place, learned


@pytest.mark.parametrize(("number", "name", "boundaries"), [(0, "teacher", [2, 4]), (1, "student", [2])])
def test_states_and_logits_are_those_of_the_teachers_plain_computation(chain, number, name, boundaries):
    """Of a copy of the history per target, as transformers computes it; logits in float64."""
    place, learned = chain
    states, vectors, table = learned[number]
    teacher, data = load_llm_rec(place / name), Sequences.load(place / "data")
    examples = training_examples(data, "all", 5)
    batch = examples.batch(np.arange(len(examples)))
    with torch.no_grad():
        expected = teacher.plain_states(batch["histories"], batch["targets"] != 0, boundaries).numpy()
    visited, rows = states.rows, np.arange(len(expected))
    assert 0 < len(visited) < len(expected)  # four batches of eight, which are no epoch
    np.testing.assert_allclose(states[visited], expected[visited], rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError, match="was not asked for"):
        states[rows]
    heads = {key: value.double().numpy() for key, value in load_tensors(place / name / HEADS_FILE).items()}
    items = heads["item_table"] + heads["item_output.left"] @ heads["item_output.right"]
    logits = expected[:, -1].astype(np.float64) @ heads["score.weight"].T @ items.T
    np.testing.assert_allclose(vectors[visited] @ table.numpy().T, logits[visited], rtol=1e-3, atol=1e-4)


def test_a_short_training_reads_answers_of_all_examples_where_they_are(chain, capsys):
    """And asks for no more than it visits where they are not."""
    place, _ = chain
    flags = ["--teacher", place / "teacher", "--num_layers", 2, "--num_blocks", 2, "--lambda_ms", 0, "--lambda_kl", 1]
    ended, files = [], []
    for name, steps in (("short", 2), ("long", 20), ("again", 2)):
        more = ["--max_steps", steps, "--micro_batch_size", "auto"]  # which tries examples that training visits
        step(distill, "student", place, *flags, *more, "--output_dir", place / name)
        ended.append(load_tensors(place / name / "adapter" / "adapter_model.safetensors"))
        files.append(set((place / "teacher" / "states").glob("*.npy")))
        assert ("(found)" in capsys.readouterr().out) == (name == "again")
    assert files[0] < files[1] == files[2]
    for name, value in ended[2].items():  # the answers were computed in other batches
        torch.testing.assert_close(ended[0][name], value, atol=1e-6, rtol=1e-4)


def test_each_run_of_the_chain_inherits_from_the_one_before(chain):
    place, _ = chain
    configs = [json.loads((place / name / "config.json").read_text()) for name in ("teacher", "student", "last")]
    assert [config["title"] for config in configs] == ["Teacher-4", "SLMRec-2<-4", "SLMRec-1<-2<-4"]
    assert [config["num_layers"] for config in configs] == [4, 2, 1] and configs[2]["teacher_layers"] == 2
    for config in configs[1:]:
        assert {n: config.get(n) for n in distill.INHERITED} == {n: configs[0].get(n) for n in distill.INHERITED}
    tables = [load_tensors(place / name / HEADS_FILE)["item_table"] for name in ("teacher", "last")]
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--output_dir", "{0}/student"], "student is where this run is written; choose another --output_dir"),
        (["--num_layers", 3], "--num_layers 3: the teacher has 2 layers, a student needs no more"),
        (["--num_layers", 2, "--num_blocks", 4], "--num_blocks 4 does not divide the 2 layers"),
    ],
)
def test_a_student_is_refused_what_a_teacher_is(chain, flags, told):
    place, _ = chain
    before = (place / "student" / "config.json").read_text()
    more = ["--num_layers", 1, "--num_blocks", 1, "--lambda_ms", 0, *(str(flag).format(place) for flag in flags)]
    with pytest.raises(UserError, match=told):
        step(distill, "student", place, "--teacher", place / "student", *more)
    assert (place / "student" / "config.json").read_text() == before
