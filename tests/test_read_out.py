"""Vectors read at items, and what else changes between item table and decoder, each against a plain computation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LORA, make_sequences, tiny_llm_rec

from models.llm.recommender import PLAIN, ItemOutput, LLMRec
from models.slmrec import SLMRec
from utils.data import split_examples, training_examples
from utils.errors import UserError
from utils.item_tables import normalized

P = 11  # tokens of the tiny model's prefix


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def pad(histories: list[list[int]]) -> torch.Tensor:
    width = max(map(len, histories))
    return torch.tensor([[0] * (width - len(h)) + h for h in histories])


def lengths_1_to_50() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(1, 41, (n,)).tolist() for n in torch.randperm(50).add(1).tolist()]


def cut_after_each_item(model: LLMRec, histories: list[list[int]]) -> torch.Tensor:
    """(N, h) of transformers' forward pass: one copy of a history per item, cut after it, at its place in the whole."""
    embed, found = model.base.get_input_embeddings(), []
    model.top.positions = None
    for history in histories:
        n = len(history)
        copies = model.input_proj(model.table[torch.tensor([history] * n)])  # (n, n, h)
        inputs = torch.cat([embed(model.prefix_ids).expand(n, -1, -1), copies], dim=1)
        mask = torch.cat([torch.ones(n, P), torch.ones(n, n).tril()], dim=1).long()
        position = torch.cat([torch.arange(P), P + model.max_length - n + torch.arange(n)]).expand(n, -1)
        output = model.decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=position, use_cache=False)
        found.append(output.last_hidden_state[torch.arange(n), P + torch.arange(n)])
    return torch.cat(found)


def by_row(histories: list[list[int]]) -> torch.Tensor:
    """All positions of the padded batch, row by row: every item has a target."""
    return pad(histories) != 0


@pytest.mark.parametrize("strategy", ["lora", "full", "frozen"])
@pytest.mark.parametrize("micro", [50, 7])
def test_vectors_and_gradients_equal_one_copy_of_the_history_per_item(strategy, micro):
    model = tiny_llm_rec(train_strategy=strategy, max_length=50, read_out="item").train()
    histories = lengths_1_to_50()
    count = sum(map(len, histories))
    targets = torch.randint(1, 41, (count,))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = model.score(cut_after_each_item(model, histories))
    F.cross_entropy(plain @ model.table[1:].T, targets - 1).backward()
    expected = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad(set_to_none=True)

    got, at = [], 0
    with model.for_accumulation():
        for low in range(0, 50, micro):
            part = histories[low : low + micro]
            mask, size = by_row(part), sum(map(len, part))
            asked = torch.zeros_like(pad(part))
            asked[mask] = targets[at : at + size]
            at += size
            got.append(model.head(model.states(pad(part), mask, [4])[:, 0]).detach())
            (model({"histories": pad(part), "targets": asked})["ce"] * size / count).backward()
    assert relative(torch.cat(got), plain) < 1e-5
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (trained[name].grad - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * total, name


def test_inference_reads_the_newest_item_and_equals_the_copy():
    model, histories = tiny_llm_rec(max_length=50, read_out="item").eval(), lengths_1_to_50()
    last = torch.tensor([len(h) for h in histories]).cumsum(0) - 1
    expected = model.score(cut_after_each_item(model, histories))[last]
    with model.for_inference(), torch.inference_mode():
        found = model.user_vectors(pad(histories))
    assert relative(found, expected) < 1e-4 and relative(model.user_vectors(pad(histories)), expected) < 1e-4


@pytest.mark.parametrize("boundaries", [[4], [1, 2, 3, 4]])
def test_the_plain_method_reads_the_same_states(boundaries):
    model, histories = tiny_llm_rec(max_length=32, read_out="item").eval(), [[5, 6, 7], [9], list(range(1, 31))]
    mask = by_row(histories)
    mask[2, :-7] = False  # some positions only
    found = model.states(pad(histories), mask, boundaries)
    model.fast = PLAIN
    assert relative(found, model.states(pad(histories), mask, boundaries)) < 1e-5


def test_only_items_and_one_prefix_run():
    model, histories, through = tiny_llm_rec(max_length=50, read_out="item"), lengths_1_to_50(), []
    model.base.layers[0].register_forward_hook(lambda module, args, output: through.append(args[0].shape[1]))
    model.states(pad(histories), by_row(histories), [4])
    assert sum(through) == P + sum(map(len, histories))


def test_a_later_item_changes_no_earlier_vector():
    model = tiny_llm_rec(read_out="item").eval()
    found = [model.states(pad([history]), pad([history]) != 0, [4]) for history in ([3, 4, 5, 6], [3, 4, 9, 6])]
    assert torch.equal(found[0][:2], found[1][:2]) and relative(found[0][2:], found[1][2:]) > 1e-3


@pytest.mark.parametrize("options", [{"item_dropout": 0.5}, {"state_dropout": 0.5}])
def test_dropout_trains_only_and_keeps_the_mean(options):
    """Of the vectors that are read, or of the states before `score`: both maps are linear, so the mean stays."""
    model = tiny_llm_rec(**options).train()
    items, states = torch.arange(1, 41), torch.randn(40, model.hidden_size)
    noisy = model.read_items if "item_dropout" in options else model.head
    given = items if "item_dropout" in options else states
    draws = torch.stack([noisy(given) for _ in range(3000)]).detach()
    plain = noisy.__func__(model.eval(), given)
    assert torch.equal(noisy(given), plain) and not torch.equal(draws[0], draws[1])
    assert ((draws.mean(0) - plain).abs() < 6 * draws.std(0) / 3000**0.5 + 1e-6).all()
    other = model.head if "item_dropout" in options else model.read_items
    assert torch.equal(*(other(states if "item_dropout" in options else items) for _ in range(2)))


def test_normalized_rows_are_centred_and_of_length_one():
    table = torch.randn(30, 6) * 3 + 2
    table[0], table[7] = 0, 0  # the padding, and an item without a vector
    rows = table.numpy().astype(np.float64)
    known = [i for i in range(30) if i not in (0, 7)]
    mean = rows[known].mean(0)
    found = normalized(table)
    for i in range(30):
        want = (rows[i] - mean) / np.linalg.norm(rows[i] - mean) if i in known else np.zeros(6)
        np.testing.assert_allclose(found[i].numpy(), want, atol=1e-6)


def test_equal_rows_cannot_be_normalized():
    table = torch.full((31, 6), 0.1)
    table[0] = 0
    with pytest.raises(UserError, match="--normalize_items leaves nothing"):
        normalized(table)
    table[1:] += 1e-3 * torch.randn(30, 6)
    assert normalized(table)[1:].norm(dim=1).allclose(torch.ones(30))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_items_start_at_the_scale_of_words_through_two_layers_too(scale):
    torch.manual_seed(0)
    model = tiny_llm_rec(input_map="mlp")
    model.table.copy_(torch.randn(41, 8) * scale)
    model.init_input_proj(model.base.get_input_embeddings())
    words = model.base.get_input_embeddings().weight[3:14]
    assert model.read_items(torch.arange(1, 41)).std().item() == pytest.approx(words.std().item(), rel=0.35)


@pytest.mark.parametrize("kind", ["residual", "trained"])
def test_a_trained_output_starts_as_the_frozen_table_and_leaves_it(kind):
    torch.manual_seed(0)
    model, frozen = tiny_llm_rec(item_output=kind, item_rank=2), tiny_llm_rec()
    before = model.table.clone()
    assert torch.equal(model.item_vectors(), before) and torch.equal(frozen.item_vectors(), frozen.table)
    assert {id(p) for p in model.item_output.parameters()} < {id(p) for p in model.head_parameters()}
    optimizer = torch.optim.SGD(model.head_parameters(), 1.0)
    for _ in range(2):
        model({"histories": torch.tensor([[3, 4]]), "targets": torch.tensor([[0, 7]])})["ce"].backward()
        optimizer.step()
    moved = model.item_vectors() - before
    assert torch.equal(model.table, before) and moved[1:].abs().sum(1).gt(0).all()
    assert torch.linalg.matrix_rank(moved) == 2 if kind == "residual" else moved[0].abs().sum() == 0


def test_the_residual_is_the_product_of_its_factors():
    table = torch.randn(9, 4)
    output = ItemOutput("residual", table, 3)
    torch.nn.init.normal_(output.right)
    want = [
        [table[i, j] + sum(output.left[i, k] * output.right[k, j] for k in range(3)) for j in range(4)]
        for i in range(9)
    ]
    assert relative(output(table), torch.tensor(want)) < 1e-6


@pytest.mark.parametrize("read_out", ["response", "item"])
def test_states_of_the_teacher_per_batch_are_those_that_are_stored(read_out):
    """The loss and its gradient are the same, in every order of examples."""
    data = make_sequences(users=20)
    examples = training_examples(data, "all", 12)
    teacher = tiny_llm_rec(num_layers=4, max_length=12, read_out=read_out).eval()
    terms = {"lambda_cos": 1.0, "lambda_norm": 0.1, "lambda_ms": 0.0, "norm_form": "l2", "block_reduction": "sum"}
    model = SLMRec(tiny_llm_rec(num_layers=2, max_length=12, read_out=read_out, seed=1), num_blocks=2, **terms)
    everything = examples.batch(np.arange(len(examples)))
    with torch.no_grad():
        stored = teacher.states(everything["histories"], everything["targets"] != 0, [2, 4])
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    index, rng = np.random.default_rng(0).permutation(len(examples))[:8], np.random.default_rng(0)
    for model.teacher, model.teacher_states in ((None, stored.numpy()), ((teacher, [2, 4]), None)):
        batch = model.batch(examples, index, rng)
        assert ("teacher_states" in batch) == (model.teacher is None)
        loss = sum(model(batch).values())
        found.append((loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])))
    assert relative(found[1][0], found[0][0]) < 1e-5 and relative(found[1][1], found[0][1]) < 1e-4


def test_every_position_trains_and_the_split_is_ranked_by_the_newest():
    """All targets of the training part are asked once, and each vector depends on the items before its target alone."""
    data = make_sequences(users=12, low=8, high=30)
    examples = training_examples(data, "all", 9)
    assert examples.num_targets.sum() == sum(stop - 3 for stop in np.diff(data.offsets)[data.users])
    model = tiny_llm_rec(max_length=9, read_out="item", lora=LORA).eval()
    batch = split_examples(data, "test", 9).batch(np.arange(len(data.users)))
    newest = torch.zeros_like(batch["histories"], dtype=torch.bool)
    newest[:, -1] = True
    every = model.states(batch["histories"], batch["histories"] != 0, [4])[:, 0]
    ends = (batch["histories"] != 0).sum(1).cumsum(0) - 1
    assert relative(model.user_vectors(batch["histories"]), model.score(every[ends])) < 1e-5
