"""Open-P5 against transformers' own loss, forward pass and beam search on the rendered text, and its script."""

import copy
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import LORA, make_sequences, tiny_sources
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import distill
import evaluate
import extract_emb
import finetune
import train_open_p5
from models.llm.decoder import load_decoder, load_head
from models.llm.open_p5 import OpenP5, load_open_p5, sequential_index
from models.sr import MODELS
from recommend import load
from utils import cli
from utils.candidates import draw_negatives
from utils.data import TrainingPart, training_examples
from utils.errors import UserError

PROMPT, VOCABULARY = "what comes next : what next", 20
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY}


def part(num_items: int, seed: int = 0) -> TrainingPart:
    """Two users; some items are met twice, the last ones never."""
    items = np.random.default_rng(seed).integers(1, max(2, num_items - 1), 2 * num_items)
    return TrainingPart(num_items, 2, np.repeat([0, 1], num_items), items)


class Twin:
    """A model on random weights, and transformers' own model with tokenizer for the same text."""

    def __init__(self, num_items: int = 11, tied: bool = True, seed: int = 0, beam_width: int | None = None) -> None:
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(tie_word_embeddings=tied, **SIZES)).eval()
        words = {word: n for n, word in enumerate(["<unk>", *dict.fromkeys(PROMPT.split())])}
        fast = Tokenizer(models.WordLevel(words, "<unk>"))
        fast.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
        self.prefix_ids = self.tokenizer(PROMPT).input_ids
        self.item_tokens = sequential_index(part(num_items, seed))
        self.model = OpenP5(
            lm.model,
            lm.lm_head.weight,
            self.item_tokens,
            prefix_ids=self.prefix_ids,
            max_length=9,
            lora=LORA,
            beam_width=beam_width,
        ).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name or name == "tokens":
                torch.nn.init.normal_(parameter, std=0.3)
        # adapters stand in `lm` itself; its vocabulary grows by the new tokens
        self.lm, new = copy.deepcopy(lm), len(self.model.tokens)
        self.tokenizer.add_tokens([f"<unused{n}>" for n in range(VOCABULARY - len(words))])
        self.tokenizer.add_tokens([f"<item{n}>" for n in range(new)])
        self.lm.resize_token_embeddings(VOCABULARY + new, mean_resizing=False)
        with torch.no_grad():
            self.lm.get_input_embeddings().weight[VOCABULARY:] = self.model.tokens
            self.lm.get_output_embeddings().weight[VOCABULARY:] = self.model.tokens

    def text(self, items: list[int]) -> str:
        return PROMPT + "".join(f"<item{n}>" for item in items for n in self.item_tokens[item].tolist())

    def ids(self, items: list[int]) -> torch.Tensor:
        found = torch.tensor([self.tokenizer(self.text(items)).input_ids])
        assert found.shape[1] == len(self.prefix_ids) + 2 * len(items) and 0 not in found
        return found

    @torch.no_grad()
    def naive_scores(self, history: list[int]) -> np.ndarray:
        """(V,): a whole forward pass of transformers for every item."""
        found = []
        for item in range(1, len(self.item_tokens)):
            ids = self.ids([*history, item])
            logs = self.lm(ids).logits[0].double().log_softmax(-1)
            found.append(sum(logs[at - 1, ids[0, at]].item() for at in (-2, -1)))
        return np.array(found)


@pytest.mark.parametrize(("positions", "fits"), [(9 + 2 * 5, False), (10 + 2 * 5, True)])
def test_the_base_can_look_back_on_prompt_history_and_the_answers_first_token(positions, fits):
    lm = AutoModelForCausalLM.from_config(LlamaConfig(max_position_embeddings=positions, **SIZES))
    with nullcontext() if fits else pytest.raises(UserError, match="choose at most 4"):
        tokens = sequential_index(part(11))
        OpenP5(lm.model, lm.lm_head.weight, tokens, prefix_ids=[1] * 9, max_length=5, lora=LORA)


def padded(histories: list[list[int]]) -> torch.Tensor:
    width = max(map(len, histories))
    return torch.tensor([[0] * (width - len(history)) + history for history in histories])


HISTORIES = [[3, 1, 7, 7, 2], [5], [11, 4]]


@pytest.mark.parametrize("num_items", [1, 2, 11, 16, 17, 100])
def test_items_are_numbered_as_users_meet_them(num_items):
    data, order = part(num_items), []
    for item in [*data.items.tolist(), *range(1, num_items + 1)]:
        if item not in order:
            order.append(item)
    width = math.ceil(num_items**0.5)
    tokens = sequential_index(data)
    firsts = len({n // width for n in range(num_items)})
    for n, item in enumerate(order):
        assert tokens[item].tolist() == [n // width, firsts + n % width]
    assert len({tuple(pair) for pair in tokens[1:].tolist()}) == num_items


@pytest.mark.parametrize("train_targets", ["last", "all", "3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_transformers_on_the_text(tied, train_targets):
    twin, data = Twin(40, tied), make_sequences(users=7, num_items=40)
    examples = training_examples(data, train_targets, 9)
    batch = examples.batch(np.arange(len(examples)))
    total = count = 0
    for history, targets in zip(batch["histories"].tolist(), batch["targets"].tolist(), strict=True):
        items = [item for item in [*history, targets[-1]] if item]
        asked = [target != 0 for target in targets][-len(items) + 1 :]
        ids = twin.ids(items)
        labels = torch.full_like(ids, -100)
        for at, wanted in enumerate(asked, 1):
            if wanted:
                place = slice(len(twin.prefix_ids) + 2 * at, len(twin.prefix_ids) + 2 * at + 2)
                labels[0, place] = ids[0, place]
        total += twin.lm(ids, labels=labels).loss.item() * 2 * sum(asked)
        count += 2 * sum(asked)
    assert count == 2 * examples.num_targets.sum()
    assert twin.model(batch)["ce"].item() == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_a_forward_pass_per_item(tied):
    twin = Twin(tied=tied)
    scores = twin.model.scores(padded(HISTORIES))
    with twin.model.for_inference():
        merged = twin.model.scores(padded(HISTORIES))
    for found in (scores, merged):
        for row, history in zip(found, HISTORIES, strict=True):
            np.testing.assert_allclose(row[1:], twin.naive_scores(history), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_items", [2, 5, 11, 17, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_finds_what_transformers_finds_and_it_exists(seed, num_items):
    """transformers' beam search, constrained by a dictionary of prefixes, on random weights."""
    width = min(3, num_items, math.ceil(num_items**0.5))
    twin = Twin(num_items, seed=seed, beam_width=width)
    exists = {tuple((pair + VOCABULARY).tolist()): item for item, pair in enumerate(twin.item_tokens) if item}
    ids = twin.ids([2, 1])

    def allowed(batch: int, so_far: torch.Tensor) -> list[int]:
        begun = tuple(so_far[ids.shape[1] :].tolist())
        return sorted({pair[len(begun)] for pair in exists if pair[: len(begun)] == begun})

    how = {"max_new_tokens": 2, "num_beams": width, "num_return_sequences": width, "do_sample": False}
    how |= {"length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    theirs = twin.lm.generate(ids, prefix_allowed_tokens_fn=allowed, eos_token_id=None, **how)
    answers = [exists[tuple(sequence[-2:].tolist())] for sequence in theirs.sequences]
    [scores] = twin.model.scores(torch.tensor([[2, 1]]))
    best = scores[1:].sort(descending=True, stable=True)
    assert (best.indices[:width] + 1).tolist() == answers
    np.testing.assert_allclose(best.values[:width], theirs.sequences_scores, rtol=1e-4)
    # what fell out of the beam shares the lowest score
    exact = twin.naive_scores([2, 1])
    firsts = twin.item_tokens[1:, 0]
    out = [item for item in range(num_items) if not np.isclose(scores[1 + item], exact[item], rtol=1e-4)]
    assert len(set(firsts[out].tolist())) == max(0, len(set(firsts.tolist())) - width)
    assert all(scores[1 + item] == scores[1:].min() for item in out)


@torch.no_grad()
def test_candidates_alone_make_the_tree():
    """Of exact scores they are a selection; a narrow beam follows the first tokens of candidates only."""
    items = torch.tensor([4, 9, 2, 7])
    twin, history = Twin(), padded([[3, 1]])
    exact = twin.model.scores(history)
    torch.testing.assert_close(twin.model.scores(history, items=items), exact[:, items])
    narrow = Twin(beam_width=1).model.scores(history, items=items)
    tokens = twin.item_tokens[items]
    logs = twin.lm(twin.ids([3, 1])).logits[0, -1].log_softmax(-1)
    best = tokens[:, 0] == tokens[logs[VOCABULARY + tokens[:, 0]].argmax(), 0]
    torch.testing.assert_close(narrow[:, best], exact[:, items][:, best])
    assert narrow[:, ~best].max() < narrow[:, best].min()


@torch.no_grad()
def test_padding_changes_nothing():
    model = Twin().model
    together = model.scores(padded(HISTORIES))
    for row, history in zip(together, HISTORIES, strict=True):
        torch.testing.assert_close(model.scores(torch.tensor([history]))[0], row, rtol=1e-5, atol=1e-5)


def test_what_trains_gets_a_gradient_and_nothing_else_does():
    twin = Twin(40)
    examples = training_examples(make_sequences(users=5, num_items=40), "all", 9)
    twin.model(examples.batch(np.arange(5)))["ce"].backward()
    for name, parameter in twin.model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name or name == "tokens")


def save_base(place, config) -> str:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_that_of_the_base(tmp_path, tied):
    base = save_base(tmp_path, LlamaConfig(tie_word_embeddings=tied, **SIZES))
    decoder = load_decoder(base, 1, "first", torch.float32)
    head = load_head(base, decoder, [1, 2])
    assert (head is decoder.get_input_embeddings().weight) == tied
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [(GemmaConfig(head_dim=8, **SIZES), "scales"), (CohereConfig(logit_scale=0.1, **SIZES), "scales")],
    ids=["gemma", "cohere"],
)
def test_a_base_that_computes_logits_otherwise_is_refused(tmp_path, config, message):
    base = save_base(tmp_path, config)
    with pytest.raises(UserError, match=message):
        load_head(base, load_decoder(base, 1, "first", torch.float32), [1, 2])


# --- the script ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run in place/run, beside what it was made from."""
    place = tiny_sources(tmp_path_factory.mktemp("open-p5"))
    start(train_open_p5, "open_p5", place, "--output_dir", place / "run")
    return place


def start(script, section, place, *flags) -> None:
    own = f"--base_model {place}/base --num_layers 2 --lora_r 2 --max_steps 4 --eval_steps 2 --batch_size 8"
    words = [*(own.split() if script is train_open_p5 else []), *map(str, flags)]
    words = ["--dataset", str(place / "data"), *words]
    script.main(**cli.resolve(script.main, section, words, models=MODELS))


def test_a_run_is_saved_loaded_and_measured_again(place):
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["seconds"]["score_test"] > 0 and metrics["parameters"]["lora"] > 0
    trained = load(place / "run")
    data = make_sequences(users=30)
    options = {"max_length": 30, "batch_size": 7}
    found, _ = evaluate.evaluate(trained.model, data, "test", draw_negatives(data, "test"), **options)
    assert found == metrics["test"]
    [answer] = trained.recommend([["id1", "id2"]], k=40)
    assert {item.id for item in answer.items} == {f"id{n}" for n in range(3, 41)}
    adapted = PeftModel.from_pretrained(
        load_decoder(place / "base", 2, "first", torch.float32), place / "run" / "adapter"
    )
    saved = trained.model.decoder.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in adapted.state_dict().items() if "lora_" in name)


def test_a_run_in_bfloat16_is_loaded_too(place):
    start(train_open_p5, "open_p5", place, "--dtype", "bfloat16", "--output_dir", place / "reduced")
    trained = load(place / "reduced")
    with trained.autocast():
        assert torch.isfinite(trained.model.scores(torch.tensor([[0, 1], [2, 3]]))).all()


def test_a_run_with_other_weights_or_another_base_is_refused(place):
    config = json.loads((place / "run" / "config.json").read_text())
    for name, value, message in (("lora_r", 3, "do not fit"), ("base_fingerprint", "0", "fingerprint")):
        (place / "odd").mkdir(exist_ok=True)
        for file in ("rec_heads.safetensors", "adapter"):
            if not (place / "odd" / file).exists():
                (place / "odd" / file).symlink_to(place / "run" / file)
        (place / "odd" / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=message):
            load_open_p5(place / "odd")


@pytest.mark.parametrize(
    ("script", "section", "flags", "message"),
    [
        (distill, "student", "--teacher {0}/run", "is no run of finetune.py"),
        (extract_emb, "extract", "--sr_dir {0}/run", "is no run of train_sr_trad.py"),
        (
            finetune,
            "teacher",
            "--base_model {0}/base --num_layers 1 --item_embeddings {0}/table --lambda_kl 1 --kl_teacher {0}/run",
            "--kl_teacher .* is no run of",
        ),
        (evaluate, None, "--run {0}/run --layers all", "is no run of finetune.py or distill.py"),
        (
            finetune,
            "teacher",
            "--base_model {0}/base --num_layers 1 --item_embeddings {0}/run",
            "was not written by extract_emb.py",
        ),
        (train_open_p5, "open_p5", "--max_seq_length 2000", "choose at most 9[0-9][0-9]$"),
        (train_open_p5, "open_p5", "--beam_width 0", "--beam_width 0: expected a number >= 1"),
        (train_open_p5, "open_p5", "--read_out item", "unknown flag --read_out"),
        (train_open_p5, "open_p5", "--num_layers 3", "the base model has 2 layers"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(place, tmp_path, script, section, flags, message):
    out = [] if script is evaluate else ["--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=message):
        start(script, section, place, *flags.format(place).split(), *out)
    assert not (tmp_path / "out").exists()


def test_it_can_be_fused_with_another_run(place):
    start(train_open_p5, "open_p5", place, "--seed", 1, "--output_dir", place / "second")
    evaluate.fuse_runs(str(place / "run"), str(place / "second"), str(place / "data"), 8, str(place / "both"))
    found = json.loads((place / "both" / "metrics.json").read_text())
    assert found["weight"] == max(found["weights"], key=lambda row: row["valid"])["weight"]
