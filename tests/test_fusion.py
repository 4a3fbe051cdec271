"""Two recommenders as one: scores and ranks against NumPy, and evaluate.py --fuse from the flags to the tables."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences, sasrec, tiny_llm_rec
from kills import contents, step
from test_kill import sources  # noqa: F401
from test_logit_distillation import SMALL

import evaluate
import finetune
import recommend
import train_sr_trad
from models.fusion import Fusion, fuse, rank_with_weights
from models.interface import Recommender
from utils import cli, metrics
from utils.candidates import draw_negatives
from utils.checked import load_tensors
from utils.data import Sequences, split_examples
from utils.metrics import metrics_from_ranks, rank_users
from utils.report import closing_table

BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


def z_scores(scores: np.ndarray) -> np.ndarray:
    """(B, V + 1) in float64, each user's over the items."""
    scores = scores.astype(np.float64)
    return (scores - scores[:, 1:].mean(1, keepdims=True)) / scores[:, 1:].std(1, keepdims=True)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_fused_scores_are_weighted_z_scores(weight):
    torch.manual_seed(0)
    one, other = 3 * torch.randn(5, 41) + 100, 0.01 * torch.randn(5, 41)
    one[:, 0] = other[:, 0] = 1e6  # the padding counts not
    expected = (1 - weight) * z_scores(one.numpy()) + weight * z_scores(other.numpy())
    np.testing.assert_allclose(next(fuse([one, other], [weight]))[:, 1:], expected[:, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [0, 1])
def test_at_the_ends_it_is_the_one_model_untouched(weight):
    """Standardised, scores that differ in the last digit would become ties."""
    pair = [torch.nextafter(torch.full((2, 9), 1e4), torch.tensor(2e4)), torch.arange(18.0).view(2, 9)]
    pair[0][:, 1:5] = 1e4
    before = [scores.clone() for scores in pair]
    found = next(fuse(pair, [weight]))
    assert torch.equal(found, before[weight])
    found.fill_(0)  # as ranking overwrites what it gets
    assert all(map(torch.equal, pair, before))


def test_a_model_with_equal_scores_for_all_items_changes_nothing():
    one, other = torch.randn(3, 41), torch.full((3, 41), 7.0)
    expected = 0.4 * z_scores(one.numpy())
    np.testing.assert_allclose(next(fuse([one, other], [0.6]))[:, 1:], expected[:, 1:], atol=1e-5)


def fusion_of(data: Sequences, weight: float = 0.5, autocasts=(nullcontext, nullcontext)) -> Fusion:
    """A language model that reads 4 items and SASRec, which reads 9."""
    models = [tiny_llm_rec(2, max_length=4).eval(), sasrec(data, max_seq_length=9).eval()]
    return Fusion(models, [4, 9], autocasts, weight)


def ranks(fusion, weights, data, split="test", batch_size=7):
    negatives = draw_negatives(data, split, num=19)
    return rank_with_weights(fusion, weights, data, split, negatives, batch_size=batch_size, device="cpu")[0]


def test_the_ends_have_exactly_the_ranks_of_the_single_models(sequences):
    fusion = fusion_of(sequences)
    negatives = draw_negatives(sequences, "test", num=19)
    found = ranks(fusion, [0.0, 0.5, 1.0], sequences)
    singles = [
        rank_users(model, sequences, "test", negatives, max_length=length, batch_size=7)[0]
        for model, length in zip(fusion.models, fusion.max_lengths, strict=True)
    ]
    for at, single in ((0, singles[0]), (2, singles[1])):
        assert all((found[at][kind] == single[kind]).all() for kind in ("sampled", "full"))
    assert all((found[1]["full"] != single["full"]).any() for single in singles)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_fused_ranks_are_those_of_numpy(split, sequences):
    fusion, negatives = fusion_of(sequences), draw_negatives(sequences, split, num=19)
    weights = [0.2, 0.7]
    found = ranks(fusion, weights, sequences, split)
    again = Fusion(list(fusion.models), fusion.max_lengths, fusion.autocasts, weights[1])
    how = {"max_length": 9, "batch_size": 7}
    by_contract = rank_users(again, sequences, split, negatives, **how)[0]
    back = {"valid": 2, "test": 1}[split]
    for row, user in enumerate(sequences.users):
        whole = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].astype(np.int64)
        seen, target = whole[:-back], whole[-back]
        z = []
        for model, length in zip(fusion.models, fusion.max_lengths, strict=True):
            history = torch.from_numpy(seen[-length:])[None]
            z.append(z_scores(model.scores(history).detach().numpy())[0])
        for weight, result in zip(weights, found, strict=True):
            fused = (1 - weight) * z[0] + weight * z[1]
            others = [i for i in range(1, 41) if i not in seen and i != target]
            assert result["full"][row] == sum(fused[i] >= fused[target] for i in others)
            candidates = [i for i in negatives[row] if i]
            assert result["sampled"][row] == sum(fused[i] >= fused[target] for i in candidates)
        together = again.scores(torch.from_numpy(seen[-9:])[None]).detach()[0]
        np.testing.assert_allclose(together[1:], (0.3 * z[0] + 0.7 * z[1])[1:], atol=1e-4)
        some = torch.tensor([5, 2])
        assert torch.equal(again.scores(torch.from_numpy(seen[-9:])[None], items=some)[0], together[some])
    assert all((by_contract[kind] == found[1][kind]).all() for kind in ("sampled", "full"))


def test_each_model_scores_once_and_users_come_in_blocks(monkeypatch):
    data = make_sequences(users=300)
    fusion, calls, sizes = fusion_of(data), [], []
    whole = ranks(fusion, [0.0, 0.3, 1.0], data, batch_size=150)
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 1)
    rank_block = metrics.rank_block
    monkeypatch.setattr(metrics, "rank_block", lambda *a: sizes.append(len(a[0])) or rank_block(*a))
    for model in fusion.models:
        real = model.user_vectors
        monkeypatch.setattr(model, "user_vectors", lambda h, users, real=real: calls.append(h.shape) or real(h, users))
    blocks = ranks(fusion, [0.0, 0.3, 1.0], data, batch_size=150)
    assert len(calls) == 4  # two models, two batches, three weights
    assert sizes == 2 * ([16] * 27 + [6] * 3)
    for one, other in zip(whole, blocks, strict=True):
        assert all((one[kind] == other[kind]).all() for kind in ("sampled", "full"))


@pytest.mark.parametrize("autocasts", [(BFLOAT16, nullcontext), (nullcontext, BFLOAT16)], ids=["first", "second"])
def test_each_model_computes_in_its_own_precision(autocasts, sequences):
    fusion = fusion_of(sequences, autocasts=autocasts)
    found = ranks(fusion, [0.0, 1.0], sequences, batch_size=64)
    assert not torch.is_autocast_enabled("cpu")
    negatives = draw_negatives(sequences, "test", num=19)
    for at, autocast in enumerate(autocasts):
        model, length = fusion.models[at], fusion.max_lengths[at]
        how = {"max_length": length, "batch_size": 64, "autocast": autocast}
        single = rank_users(model, sequences, "test", negatives, **how)[0]
        assert all((found[at][kind] == single[kind]).all() for kind in ("sampled", "full"))
    exact, reduced = ranks(fusion_of(sequences), [0.0, 1.0], sequences, batch_size=64), autocasts.index(BFLOAT16)
    assert (exact[reduced]["full"] != found[reduced]["full"]).any()


def test_between_blocks_the_precision_is_the_callers(sequences):
    with BFLOAT16():
        for _ in sasrec(sequences).eval().score_blocks(torch.ones(9, 3, dtype=torch.long), None, 2):
            assert torch.is_autocast_enabled("cpu")


class Generative(Recommender):
    """Scores without vectors: the newest item's neighbours by number."""

    def scores(self, histories, users=None, items=None):
        return -(histories[:, -1:] - torch.arange(41)).abs().float()


def test_a_model_without_vectors_is_fused_too(sequences):
    fusion = Fusion([Generative(None, None), sasrec(sequences).eval()], [1, 30], [nullcontext] * 2, 0.5)
    found = ranks(fusion, [0.0], sequences)[0]
    examples = split_examples(sequences, "test", 30)
    last, target = sequences.items[examples.end - 1], sequences.items[examples.end]
    seen = [set(sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]].tolist()) for u in sequences.users]
    expected = [
        sum(abs(i - last[u]) <= abs(target[u] - last[u]) for i in range(1, 41) if i not in seen[u])
        for u in range(len(seen))
    ]
    assert found["full"].tolist() == expected


# --- evaluate.py --fuse ---


@pytest.fixture(scope="module")
def place(sources, tmp_path_factory):  # noqa: F811
    """Runs of one dataset: a language model that reads 4 items, and SASRec, which reads 9."""
    place = tmp_path_factory.mktemp("outputs") / "kill"
    step(train_sr_trad, "sr", sources, *SMALL, "--output_dir", place / "sasrec")
    base = ["--base_model", sources / "base", "--item_embeddings", sources / "table", "--num_layers", 2]
    step(finetune, "teacher", sources, *base, "--max_seq_length", 4, "--lora_r", 2, "--output_dir", place / "llm")
    return place


def run(*words: object) -> None:
    cli.run(evaluate.main, None, [str(word) for word in words])


def fingerprint(sources) -> str:  # noqa: F811
    return json.loads((sources / "data" / "dataset.json").read_text())["fingerprint"]


def fused(place, sources, *more) -> tuple[dict, dict]:  # noqa: F811
    run("--run", place / "llm", "--fuse", place / "sasrec", "--dataset", sources / "data", *more)
    folder = place / "llm-with-sasrec"
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))


def test_the_weight_is_chosen_on_validation_and_measured_on_test(place, sources, capsys):  # noqa: F811
    config, found = fused(place, sources)
    capsys.readouterr()
    assert [row["weight"] for row in found["weights"]] == [k / 10 for k in range(11)]
    values = [row["valid"] for row in found["weights"]]
    assert found["weight"] == config["weight"] == values.index(max(values)) / 10
    assert found["valid"]["sampled"]["NDCG@10"] == max(values)
    ends = [json.loads((place / name / "metrics.json").read_text()) for name in ("llm", "sasrec")]
    assert [values[0], values[-1]] == [end["valid"]["sampled"]["NDCG@10"] for end in ends]
    data = Sequences.load(sources / "data")
    parts = [recommend.load(place / name) for name in ("llm", "sasrec")]
    fusion = Fusion([part.model for part in parts], [4, 9], [nullcontext] * 2, 0.5)
    negatives = draw_negatives(data, "test")
    [expected], _ = rank_with_weights(fusion, [found["weight"]], data, "test", negatives, batch_size=512, device="cpu")
    assert found["test"] == {kind: metrics_from_ranks(values) for kind, values in expected.items()}
    kept = load_tensors(place / "llm-with-sasrec/ranks.safetensors")
    assert all((kept[f"test_{kind}"].numpy() == values).all() for kind, values in expected.items()) and len(kept) == 2
    for key in ("total", "trained"):
        assert found["parameters"][key] == sum(end["parameters"][key] for end in ends)
    assert found["environment"]["git_commit"] and found["seconds"]["score_test"] > 0
    assert found["protocol"]["max_seq_length"] == 9 and config["run_id"] == found["run_id"]


def test_the_fusion_has_a_row_and_is_a_run_to_all(place, sources, capsys):  # noqa: F811
    config, found = fused(place, sources)
    row = next(line for line in closing_table(place, fingerprint(sources)).splitlines() if "with" in line)
    assert "Teacher-2 + SASRec (llm-with-sasrec)" in row and f"{found['test']['sampled']['NDCG@10']:.4f}" in row
    capsys.readouterr()
    run("--run", place / "llm-with-sasrec", "--dataset", sources / "data")
    assert f"{found['test']['full']['NDCG@10']:.4f}" in capsys.readouterr().out
    [answer] = recommend.load(place / "llm-with-sasrec").recommend([["id3", "id7"]], k=5)
    history = torch.tensor([[3, 7]])
    z = [z_scores(recommend.load(place / n).model.scores(history).detach().numpy())[0] for n in ("llm", "sasrec")]
    scores = (1 - config["weight"]) * z[0] + config["weight"] * z[1]
    scores[[0, 3, 7]] = -np.inf
    assert [item.id for item in answer.items] == [f"id{n}" for n in np.argsort(-scores)[:5]]


def test_a_fusion_of_runs_that_were_trained_anew_is_told(place, sources, capsys):  # noqa: F811
    fused(place, sources)
    path = place / "sasrec" / "config.json"
    text = path.read_text()
    for name in ("config", "metrics"):
        part = place / "sasrec" / f"{name}.json"
        part.write_text(json.dumps(json.loads(part.read_text()) | {"run_id": "anew"}))
    table = closing_table(place, fingerprint(sources))
    assert "+ SASRec" not in table.split("| test users")[1] and "trained anew since they were fused" in table
    with pytest.raises(SystemExit) as stop:
        run("--run", place / "llm-with-sasrec", "--dataset", sources / "data")
    assert stop.value.code == 2 and "fuse them again" in capsys.readouterr().err
    for name in ("sasrec", "gone"):  # a part that is not there any more, and back
        (place / name).rename(place / ("gone" if name == "sasrec" else "sasrec"))
        if name == "sasrec":
            with pytest.raises(SystemExit) as stop:
                run("--run", place / "llm-with-sasrec", "--dataset", sources / "data")
            assert stop.value.code == 2 and "sasrec, part of a fusion, is gone" in capsys.readouterr().err
    fused(place, sources)  # which replaces the earlier one
    assert (
        "+ SASRec" in closing_table(place, fingerprint(sources)).split("| test users")[1] and path.read_text() != text
    )


def refused(place: Path, sources: Path, capsys, argv: list[str], default: str, told: str) -> None:  # noqa: F811
    """evaluate.py ends with one line, exit code 2 and untouched files; without --run it is given `default`."""
    argv += [] if "--run" in argv else ["--run", str(place / default)]
    argv += [] if "--dataset" in argv else ["--dataset", str(sources / "data")]
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and contents(place) == before, lines
    assert told in lines[0], lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--fuse {0}/sasrec --split valid", "leave out --split, --negatives and --candidate_seed"),
        ("--fuse {0}/sasrec --negatives 9", "leave out --split"),
        ("--fuse {0}/sasrec --candidate_seed 9", "leave out --split"),
        ("--output_dir {0}/new", "add --fuse"),
        ("--fuse {0}/none", "--fuse {0}/none holds no finished run"),
        ("--run {0}/none --fuse {0}/sasrec", "--run {0}/none holds no finished run"),
        ("--fuse {0}/unfinished", "holds no finished run"),
        ("--run {0}/odd --fuse {0}/sasrec", "selected_by 'valid by eye'; train the run again"),
        ("--fuse {0}/llm", "is the run of --run"),
        ("--fuse {0}/other", "was trained on elsewhere, --run {0}/llm on"),
        ("--fuse {0}/fusion", "is a fusion: give a run of a training script"),
        ("--run {0}/fusion --fuse {0}/sasrec", "is a fusion"),
        ("--fuse {0}/damaged", "damaged"),
        ("--fuse {0}/sasrec --output_dir {0}/sasrec", "holds something else"),
        ("--fuse {0}/sasrec --output_dir {0}/sasrec/log.jsonl", "is a file"),
        ("--fuse {0}/sasrec --output_dir {0}/strange", "holds something else (config.json)"),
        ("--fuse {0}/sasrec --eval_batch_size 0", ">= 1"),
        ("--fuse", "needs a value"),
        ("--fuse {0}/sasrec --dataset none-such", "none-such"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(words, told, place, sources, capsys):  # noqa: F811
    changes = {"other": {"dataset_fingerprint": "f" * 64, "dataset": "elsewhere", "run_id": "o"}}
    changes |= {"fusion": {"kind": "fusion"}, "unfinished": {"run_id": "x"}, "damaged": {}, "strange": {}}
    for name, change in changes.items():
        shutil.copytree(place / "sasrec", place / name, dirs_exist_ok=True)
        for file in ("config", "metrics")[: 1 if name == "unfinished" else 2]:
            path = place / name / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | (change if file == "config" else {})))
    path = place / "other/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "o"}))
    shutil.copytree(place / "llm", place / "odd", dirs_exist_ok=True)
    path = place / "odd/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"selected_by": "valid by eye"}))
    (place / "damaged/model.safetensors").write_bytes(b"nonsense")
    [path.unlink() for path in (place / "strange").iterdir() if path.name != "config.json"]
    refused(place, sources, capsys, words.format(place).split(), "llm", told.format(place))
