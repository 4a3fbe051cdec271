"""Layers by block influence: against a loop in float64, and from the command lines to an explicit list."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import tiny_decoder, tiny_sources
from kills import step
from transformers import AutoModel

import distill
import finetune
from models.llm.decoder import prompt_ids
from models.llm.influence import block_influence
from utils.errors import UserError


def looped_influence(decoder: torch.nn.Module, token_ids: list[int]) -> list[float]:
    """With transformers' own hidden states; the final norm is taken out, so that the last ones are before it."""
    decoder.norm = torch.nn.Identity()
    with torch.no_grad():
        output = decoder.eval()(input_ids=torch.tensor([token_ids]), output_hidden_states=True)
    states = [layer[0].numpy().astype(np.float64) for layer in output.hidden_states]
    found = []
    for before, after in itertools.pairwise(states):
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(before, after, strict=True)]
        found.append(1 - sum(cosines) / len(cosines))
    return found


def shake(decoder: torch.nn.Module, scales: list[float]) -> None:
    """Make the layers' changes differ: their output maps are multiplied."""
    for layer, scale in zip(decoder.layers, scales, strict=True):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= scale


def test_influence_equals_a_loop_in_float64():
    decoder, tokens = tiny_decoder(4), [3, 9, 1, 40, 7]
    shake(decoder, [5, 40, 10, 80])
    found = block_influence(decoder, tokens)
    np.testing.assert_allclose(found, looped_influence(decoder, tokens), rtol=1e-5)
    assert len(set(np.round(found, 3))) == 4 and min(found) > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sources with a base of 5 layers; which of them have the highest influence is computed by the loop."""
    place = tiny_sources(tmp_path_factory.mktemp("influence"), layers=5)
    base = AutoModel.from_pretrained(place / "base")
    shake(base, [1, 60, 2, 200, 30])
    base.save_pretrained(place / "base")
    prompt = prompt_ids(place / "base")
    influence = looped_influence(base, prompt["prefix_ids"] + prompt["response_ids"])
    return place, sorted(range(5), key=lambda layer: -influence[layer])


def train(script, place, *flags: object) -> dict:
    """The configuration that the run leaves."""
    section = "teacher" if script is finetune else "student"
    step(script, section, place, *flags)
    return json.loads((flags[-1] / "config.json").read_text())


def test_the_layers_of_the_highest_influence_are_kept_and_listed(place):
    place, order = place
    teacher = ["--base_model", place / "base", "--item_embeddings", place / "table", "--train_strategy", "frozen"]
    teacher += ["--layer_selection", "influence", "--num_layers", 3, "--resume", "auto"]
    student = ["--teacher", place / "teacher", "--num_blocks", 1, "--lambda_ms", 0, "--num_layers", 2]
    best = {number: ",".join(map(str, sorted(order[:number]))) for number in (2, 3)}
    assert best[3] != "0,1,2"
    for again in range(2):  # finished: the second call finds the same layers, so the same run
        config = train(finetune, place, *teacher, "--output_dir", place / "teacher")
        assert (config["layer_selection"], config["num_layers"]) == (best[3], 3), again
    config = train(distill, place, *student, "--layer_selection", "influence", "--output_dir", place / "student")
    assert config["layer_selection"] == best[2]
    with pytest.raises(UserError, match=f"the teacher keeps layers {best[3]} of its base; say which ones"):
        train(distill, place, *student, "--output_dir", place / "other")


def test_more_layers_than_the_base_has_are_refused(place):
    flags = ["--base_model", place[0] / "base", "--item_embeddings", place[0] / "table", "--num_layers", 6]
    with pytest.raises(UserError, match=r"--num_layers 6: the base model has 5 layers; choose 1\.\.5"):
        train(finetune, place[0], *flags, "--layer_selection", "influence", "--output_dir", place[0] / "none")
