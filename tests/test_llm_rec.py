"""The fast computation of teacher and student against the plain one; loading; sizes."""

import copy
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LORA, make_sequences, sasrec, tiny_decoder, tiny_llm_rec
from torch import nn
from transformers import AutoModel, LlamaConfig

from benchmarks import cost
from benchmarks.llm_step import released_output, tokens, without
from models import losses
from models.dropout import Dropout
from models.llm import packing
from models.llm.decoder import block_boundaries, layer_flags, select_layers
from models.llm.recommender import PLAIN, LLMRec
from models.llm.storage import count_parameters
from models.sr import objectives
from models.sr.sasrec import SASRec
from utils import metrics
from utils.errors import UserError


def plain_states(model: LLMRec, histories: list[list[int]], lengths: int) -> tuple[torch.Tensor, ...]:
    """hidden_states of the released computation: every sample left-padded to `lengths` items, the prompt in each."""
    padded = torch.tensor([[0] * (lengths - len(h)) + h for h in histories])
    return released_output(model, padded, output_hidden_states=True).hidden_states


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def pad(histories: list[list[int]]) -> torch.Tensor:
    width = max(map(len, histories))
    return torch.tensor([[0] * (width - len(h)) + h for h in histories])


def mixed_histories() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(1, 41, (n,)).tolist() for n in torch.randperm(30).add(1).tolist()]


@pytest.mark.parametrize("strategy", ["lora", "full", "frozen"])
def test_user_vectors_and_gradients_equal_the_plain_computation(strategy):
    model = tiny_llm_rec(train_strategy=strategy).train()
    histories = mixed_histories()
    targets = torch.randint(1, 41, (30,))
    plain = model.score(plain_states(model, histories, 30)[-1][:, -1])
    F.cross_entropy(plain @ model.table[1:].T, targets - 1).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    batches = [[h for h in histories if len(h) <= 11], [h for h in histories if len(h) > 11]]  # batched by length
    order = [histories.index(h) for batch in batches for h in batch]
    got = []
    for batch in batches:
        ids = pad(batch)
        target_mask = torch.zeros_like(ids)
        target_mask[:, -1] = torch.stack([targets[histories.index(h)] for h in batch])
        got.append(model.user_vectors(ids))
        (model({"histories": ids, "targets": target_mask})["ce"] * len(batch) / 30).backward()
    assert relative(torch.cat(got), plain[order]) < 1e-4
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) >= 3
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in found.items():
        # relative to its own norm; gradients that vanish (a bias in front of a softmax, say) to the whole
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm() + 1e-7 * total, name


@pytest.mark.parametrize("targets", ["gate_proj,down_proj", "q_proj,k_proj,o_proj"])
def test_for_inference_answers_the_same_and_leaves_no_trace(targets):
    model = tiny_llm_rec(lora=LORA | {"target_modules": targets.split(",")}).eval()
    histories = mixed_histories()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model.score(plain_states(model, histories, 30)[-1][:, -1])
    apart = model.user_vectors(pad(histories))
    assert relative(apart, plain) < 1e-4
    passes = []
    handle = model.base.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    with model.for_inference(), torch.inference_mode():
        merged = [model.user_vectors(pad(histories)) for _ in range(3)]
    handle.remove()
    assert len(passes) == 4  # the prefix once
    assert relative(merged[0], plain) < 1e-4 and torch.equal(merged[0], merged[2])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.user_vectors(pad(histories)), apart)
    model.train()({"histories": torch.tensor([[1, 2]]), "targets": torch.tensor([[0, 3]])})[
        "ce"
    ].backward()  # and it trains on


@pytest.mark.parametrize("off", ["prefix_per_sample", "padding_too", "all_positions"])
def test_each_measure_switched_off_changes_cost_and_not_the_answer(off):
    """What benchmarks/cost.py compares is the same computation."""
    model, histories = tiny_llm_rec().eval(), pad(mixed_histories())
    counted = [0, 0]

    def counter(which: int):
        def count(module, args, output) -> None:
            counted[which] += output.shape[0] * output.shape[1]

        return count

    def run() -> torch.Tensor:
        counted[:] = [0, 0]
        return model.user_vectors(histories)

    model.base.layers[0].mlp.register_forward_hook(counter(0))
    model.base.layers[-1].mlp.down_proj.register_forward_hook(counter(1))
    expected, usual = run(), list(counted)
    with without(model, *cost.OFF[off][0]):
        assert relative(run(), expected) < 1e-5
        assert counted[1 if off == "all_positions" else 0] > usual[1 if off == "all_positions" else 0]
    assert torch.equal(run(), expected) and counted == usual
    assert usual == [11 + sum(range(1, 31)) + 30 * 3, 30]  # prefix, items, responses: no padding; what is read
    assert tokens(model, np.arange(1, 31), prefixes=1) == {
        "released": 11 + 30 + 3,
        "ours": pytest.approx(usual[0] / 30),
    }


@pytest.mark.parametrize("off", ["rows_apart", "keys_copied"])
def test_attention_without_shared_rows_and_keys_gives_the_same_gradients(off, monkeypatch):
    """Several targets per history; histories of 1 to 30 items, so that rows hold from one sample to many."""
    model, histories = tiny_llm_rec().train(), pad(mixed_histories())
    targets = torch.randint(1, 41, histories.shape) * (histories != 0) * (torch.rand(histories.shape) < 0.3)
    targets[:, -1] = torch.arange(1, 31)
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes, sdpa = [], F.scaled_dot_product_attention

    def spied(query: torch.Tensor, key: torch.Tensor, *args, **how) -> torch.Tensor:
        shapes.append((len(query), key.shape[1]))
        return sdpa(query, key, *args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)

    def run() -> torch.Tensor:
        shapes.clear()
        loss = model({"histories": histories, "targets": targets})["ce"]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    expected, (rows, heads) = run(), max(shapes)
    with without(model, *cost.OFF[off][0]):
        assert relative(run(), expected) < 1e-5
    assert rows < 20 and heads == 2
    assert max(shapes) == ((30, 2) if off == "rows_apart" else (rows, 4))
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 9, 2, 8, 3, 7, 4, 6, 5, 5], [36, *range(7, 36), *[8] * 30]])
def test_samples_share_rows_without_overlap(lengths):
    starts, rows = packing.fit_into_rows(lengths)
    width, taken = max(lengths), torch.zeros(rows * max(lengths), dtype=torch.long)
    for start, length in zip(starts, lengths, strict=True):
        assert start // width == (start + length - 1) // width  # in one row
        taken[start : start + length] += 1
    assert taken.max() == 1 and taken.view(rows, width).any(1).all()
    assert rows <= 11 / 9 * -(-sum(lengths) // width) + 6 / 9  # as best fit promises where whole rows can be filled


@pytest.mark.parametrize("off", ["adapters_apart", "prefix_every_batch"])
def test_each_measure_at_inference_switched_off_too(off):
    model, histories = tiny_llm_rec().eval(), pad(mixed_histories())
    with model.for_inference():
        expected = model.user_vectors(histories)
        assert model.base.layers[0].mlp.up_proj.merged and model.kept_prefix
    with without(model, *cost.OFF[off][0]), model.for_inference():
        assert relative(model.user_vectors(histories), expected) < 1e-5
        assert not (model.base.layers[0].mlp.up_proj.merged if off == "adapters_apart" else model.kept_prefix)


def test_for_inference_inside_itself_changes_nothing():
    model, histories = tiny_llm_rec().eval(), pad([[3, 4, 5]])
    apart = model.user_vectors(histories)
    with model.for_inference():
        once = model.user_vectors(histories)
        with model.for_inference():
            assert torch.equal(model.user_vectors(histories), once)
        assert torch.equal(model.user_vectors(histories), once)
    assert torch.equal(model.user_vectors(histories), apart)


def test_adapters_are_not_merged_where_their_sum_would_be_rounded():
    model = tiny_llm_rec().eval()
    with torch.autocast("cpu", torch.bfloat16), model.for_inference():
        assert not model.base.layers[0].mlp.up_proj.merged and model.kept_prefix


def everything_off() -> ExitStack:
    """Every fast computation becomes the plain one, until what is returned is closed."""
    trimmed = SASRec.states

    def untrimmed(self: SASRec, histories: torch.Tensor) -> torch.Tensor:
        missing = self.max_length - histories.shape[1]
        return trimmed(self, F.pad(histories, (missing, 0)))[:, missing:]

    plain = [(SASRec, "states", untrimmed), (LLMRec, "fast", PLAIN), (Dropout, "forward", nn.Dropout.forward)]
    plain += [(losses, "LOGITS_AT_ONCE", 2**62), (metrics, "SCORES_AT_ONCE", 2**62)]
    plain += [(objectives, name, 2**62) for name in ("GROUP", "PADDED")]
    plain += [(losses, "MANY_ITEMS", 2**62)]
    with ExitStack() as replaced:
        for owner, name, by in plain:
            replaced.enter_context(patch.object(owner, name, by))
        return replaced.pop_all()


def test_everything_off_is_the_plain_computation(monkeypatch, request):
    """Everything on and everything off is the same computation, and off is really off."""
    monkeypatch.setattr(objectives, "GROUP", 4)
    monkeypatch.setattr(objectives, "PADDED", 99)
    histories = pad(mixed_histories()[:6])
    targets = torch.zeros_like(histories)
    targets[:, -1], targets[2, -3:] = 7, torch.tensor([3, 0, 9])
    targets *= histories != 0
    width, found, through = histories.shape[1] + 2, [], []
    widths, groups = [], []
    for off in (False, True):
        stack = everything_off() if off else ExitStack()
        request.addfinalizer(stack.close)
        model = tiny_llm_rec(max_length=width)
        through.clear()
        for module in (model.base.layers[0].mlp.up_proj, model.base.layers[-1].mlp.up_proj):
            module.register_forward_hook(lambda module, args, output: through.append(output.shape[0] * output.shape[1]))
        loss = model({"histories": histories, "targets": targets})["ce"]
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        found.append([loss.item(), torch.cat([g.flatten() for g in gradients]), sum(through)])
        with model.for_inference():
            found[-1].append(model.user_vectors(histories))
            assert model.base.layers[0].mlp.up_proj.merged == (not off)
        torch.manual_seed(0)
        traditional = sasrec(make_sequences(), item_dim=8, max_seq_length=width, num_layers=1, dropout=0.0)
        traditional.blocks[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        found[-1].append(traditional.user_vectors(histories))
        traditional.norm.register_forward_pre_hook(lambda module, args: groups.append(len(args[0])))
        found[-1].append(traditional({"histories": histories, "targets": targets})["ce"].item())
    assert relative(found[1][3], found[0][3]) < 1e-5 and relative(found[1][4], found[0][4]) < 1e-5
    assert widths[0] == width - 2 and widths[3:] == [width, width] and groups == [4, 2, 6]
    assert found[1][5] == pytest.approx(found[0][5], rel=1e-5)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and relative(found[1][1], found[0][1]) < 1e-5
    # through both layers, for each target: prefix 11, all places for items, three response tokens
    assert found[0][2] < found[1][2] == 2 * int((targets != 0).sum()) * (11 + width + 3)
    assert losses.LOGITS_AT_ONCE == losses.MANY_ITEMS == metrics.SCORES_AT_ONCE == 2**62
    assert objectives.GROUP == objectives.PADDED == 2**62
    assert Dropout.forward is torch.nn.Dropout.forward and LLMRec.fast == PLAIN


@pytest.mark.parametrize("max_length", [30, 40])
def test_the_plain_method_is_the_released_computation(max_length):
    """One target, the newest: that of the benchmarks, written apart. All block boundaries."""
    model, histories = tiny_llm_rec(max_length=max_length).eval(), mixed_histories()
    model.fast = PLAIN
    newest = torch.zeros(30, 30, dtype=torch.bool)
    newest[:, -1] = True
    expected = plain_states(model, histories, max_length)
    found = model.states(pad(histories), newest, [1, 2, 3, 4])
    assert relative(found, torch.stack([states[:, -1] for states in expected[1:]], dim=1)) < 1e-6


def test_an_error_while_gradients_add_up_leaves_no_prefix_behind():
    model = tiny_llm_rec()
    with pytest.raises(KeyError), model.for_accumulation():
        assert model.kept_prefix
        raise KeyError
    assert model.kept_prefix is None


def test_copies_of_a_history_ask_for_the_same_targets():
    histories, targets = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 6, 7], [0, 3, 0, 9]])
    found = cost.copies({"histories": histories, "targets": targets})
    assert found["histories"].tolist() == [[0, 0, 0, 5], [0, 0, 5, 6], [0, 0, 1, 2], [1, 2, 3, 4]]
    assert found["targets"][:, -1].tolist() == [6, 7, 3, 9] and found["targets"][:, :-1].sum() == 0


def test_for_inference_restores_after_an_error():
    model = tiny_llm_rec().eval()
    expected = model.user_vectors(pad([[3, 4, 5]]))
    with pytest.raises(ZeroDivisionError), model.for_inference():
        raise ZeroDivisionError
    assert torch.equal(model.user_vectors(pad([[3, 4, 5]])), expected)


def test_trimming_does_not_move_items():
    model = tiny_llm_rec().eval()
    history = [[3, 9, 4]]
    alone = model.user_vectors(pad(history))
    with_padding = model.user_vectors(pad([*history, list(range(1, 31))]))[:1]
    assert relative(alone, with_padding) < 1e-5
    shifted = tiny_llm_rec(max_length=10).eval()  # the same model with items nearer to the prefix answers differently
    assert relative(shifted.user_vectors(pad(history)), alone) > 1e-4


def test_many_targets_of_a_history_equal_one_copy_each():
    """Branch t of a window of T items is the plain computation of items[:t + 1], laid out for max_length - (T - 1 - t)
    items: the same distances to the prefix as in the window."""
    model = tiny_llm_rec().eval()
    windows = [list(range(1, 31)), [7, 3, 9, 12], [40, 2, 11, 5, 6, 8, 1]]
    histories = pad(windows)
    target_mask = torch.zeros_like(histories, dtype=torch.bool)
    wanted = [(0, 29), (0, 28), (0, 3), (1, 3), (2, 0), (2, 6)]  # (window, items before the target - 1)
    for row, t in wanted:
        target_mask[row, 30 - len(windows[row]) + t] = True
    got = model.states(histories, target_mask, [2, 4])
    wanted.sort()
    for i, (row, t) in enumerate(wanted):
        layout = 30 - (len(windows[row]) - 1 - t)
        states = plain_states(model, [windows[row][: t + 1]], layout)
        for k, end in enumerate([2, 4]):
            assert relative(got[i, k], states[end][0, -1]) < 1e-5, (row, t, end)


def test_block_states_are_transformers_hidden_states():
    model = tiny_llm_rec(num_layers=4).eval()
    history = [[5, 8, 2, 30]]
    ids = pad(history)
    target_mask = torch.zeros_like(ids, dtype=torch.bool)
    target_mask[:, -1] = True
    states = model.states(ids, target_mask, block_boundaries(4, 4))
    plain = plain_states(model, history, 30)
    for k in range(4):
        assert relative(states[0, k], plain[k + 1][0, -1]) < 1e-5
    normed = model.base.norm(states[0, 3])
    assert relative(normed, states[0, 3]) < 0.5 and relative(model.base.norm(states[0, 2]), states[0, 2]) > 1e-3


def test_padding_item_is_seen_by_nobody():
    model = tiny_llm_rec().eval()
    before = model.user_vectors(torch.tensor([[0, 0, 4, 5]]))
    model.table[0] = 1e3
    assert torch.equal(model.user_vectors(torch.tensor([[0, 0, 4, 5]])), before)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4, 30, "first"), [0, 1, 2, 3]),
        ((4, 8, "interval"), [0, 2, 4, 6]),
        ((3, 8, "interval"), [0, 2, 5]),
        ((4, 30, "0,1,2,5"), [0, 1, 2, 5]),
        ((1, 30, "29"), [29]),
    ],
)
def test_layer_selection(arguments, expected):
    assert select_layers(*arguments) == expected


@pytest.mark.parametrize(
    ("num_layers", "selection", "resolved"),
    [
        (None, "first", (8, "first")),
        (4, "interval", (4, "interval")),
        (3, None, (3, None)),
        (None, None, (8, None)),
        (None, "0,1,2,5", (4, "0,1,2,5")),
        (4, " 0, 01 ,2,5", (4, "0,1,2,5")),
    ],
)
def test_a_list_of_layers_says_how_many_they_are(num_layers, selection, resolved):
    assert layer_flags(num_layers, selection, default=8) == resolved


@pytest.mark.parametrize(
    ("num_layers", "selection", "words"),
    [
        (None, "0,1,1", "ascend, each once, as in 0,1"),
        (None, "2,1,0", "ascend, each once, as in 0,1,2"),
        (None, "0,3,2", "ascend"),
        (None, "-1,2", "numbers of layers from 0"),
        (None, "-1", "numbers of layers from 0"),
        (None, ",", "numbers of layers from 0"),
        (None, "0,1,", "numbers of layers from 0"),
        (None, ",0", "numbers of layers from 0"),
        (None, " ", "numbers of layers from 0"),
        (None, "0-3", "numbers of layers from 0"),
        (None, "0;1", "numbers of layers from 0"),
        (None, "0 1", "numbers of layers from 0"),
        (None, "[0,1]", "numbers of layers from 0"),
        (None, "0,1.0", "numbers of layers from 0"),
        (None, "0,²", "numbers of layers from 0"),
        (None, "0,٣", "numbers of layers from 0"),
        (None, "9" * 5000, "numbers of layers from 0"),
        (None, "First", "expected first, interval"),
        (None, "first,1", "expected first, interval"),
        (3, "0,1", "lists 2; make them agree, as with --num_layers 2"),
    ],
)
def test_lists_of_layers_that_cannot_be_are_refused(num_layers, selection, words):
    with pytest.raises(UserError, match=words) as error:
        layer_flags(num_layers, selection, default=8)
    assert "\n" not in str(error.value)


def test_more_layers_than_the_base_and_blocks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="the base model has 30 layers"):
        select_layers(31, 30, "first")
    with pytest.raises(UserError, match=r"--layer_selection 0,30: the base model has 30 layers; choose from 0\.\.29"):
        select_layers(2, 30, "0,30")
    with pytest.raises(UserError, match="lists 2; make them agree"):
        select_layers(3, 30, "0,1")
    with pytest.raises(UserError, match="does not divide"):
        block_boundaries(8, 3)
    assert block_boundaries(8, 4) == [2, 4, 6, 8]


@pytest.mark.parametrize(("layers", "total", "lora"), [(32, 6.631, 0.023), (4, 0.944, 0.003)])
def test_table_7_parameter_counts(layers, total, lora):
    """The LLaMA-7B shape on the meta device, where nothing is allocated (the paper's table 7, billions)."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers)
    options = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}
    with torch.device("meta"):
        model = LLMRec(
            AutoModel.from_config(config),
            torch.empty(100, 128),
            prefix_ids=[1],
            response_ids=[2],
            max_length=30,
            lora=options | {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        )
    assert all(p.is_meta for p in model.parameters())
    counts = count_parameters(model)
    assert counts["total"] / 1e9 == pytest.approx(total, abs=0.002)
    assert counts["lora"] / 1e9 == pytest.approx(lora, abs=0.0005)
    maps = 128 * 4096 + 4096 + 4096 * 128
    assert counts["trained"] == counts["lora"] + maps


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_items_start_at_the_scale_of_the_prompts_words(scale):
    table = scale * torch.randn(2001, 64)
    table[0] = 0
    model = LLMRec(
        tiny_decoder(), table, prefix_ids=[3, 4, 5], response_ids=[6], max_length=30, train_strategy="frozen"
    )
    words = model.base.get_input_embeddings().weight[[3, 4, 5]]
    assert model.input_proj(model.table[1:]).std().item() == pytest.approx(words.std().item(), rel=0.1)


def test_what_trains_by_strategy():
    heads = {"input_proj.weight", "input_proj.bias", "score.weight"}
    for strategy in ("lora", "full", "frozen"):
        model = tiny_llm_rec(train_strategy=strategy)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert heads <= trained
        rest = trained - heads
        if strategy == "lora":
            assert rest and all("lora_" in name for name in rest)
        elif strategy == "full":
            assert rest and not any("embed_tokens" in name for name in rest)
        else:
            assert not rest
        assert not model.table.requires_grad


def test_a_copy_answers_as_the_original_does():
    model = tiny_llm_rec().eval()
    histories = pad([[3, 4, 5], [6]])
    expected = model.user_vectors(histories)
    other = copy.deepcopy(model)
    plain_states(model, [[1, 2]], 30)  # leaves the original reading all positions
    assert torch.equal(other.user_vectors(histories), expected)


def test_histories_longer_than_the_model_reads_are_an_error():
    with pytest.raises(ValueError, match="histories of 6 items, the model reads 5"):
        tiny_llm_rec(max_length=5).user_vectors(torch.ones(1, 6, dtype=torch.long))
