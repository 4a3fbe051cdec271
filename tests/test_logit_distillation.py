"""The logit term: its value and gradients, where the teacher's user vectors come from, and what is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_of_each, make_sequences, tiny_llm_rec
from kills import contents, step
from test_kill import sources  # noqa: F401
from test_losses import NONE, batch, make

import distill
import extract_emb
import finetune
import train_sr_trad
from models import losses
from models.llm import kl_teacher
from models.llm.storage import load_llm_rec
from models.losses import distillation_kl
from models.slmrec import SLMRec
from models.sr import MODELS
from models.sr.sasrec import SASRec
from models.sr.storage import load_recommender
from utils import cli
from utils.data import Sequences, training_examples
from utils.memory import peak_extra_bytes

N, V = 7, 1000
SMALL = ["--item_dim", 8, "--num_layers", 1, "--max_seq_length", 9, "--train_targets", "all", "--learning_rate", 0.05]


def drawn(grad: bool = False) -> list[torch.Tensor]:
    """Vectors and items of a student with d = 16 and of a teacher with d = 5."""
    torch.manual_seed(0)
    student = [torch.randn(N, 16, requires_grad=grad), torch.randn(V + 1, 16, requires_grad=grad)]
    return [*student, torch.randn(N, 5), torch.randn(V + 1, 5)]


def numpy_kl(vectors, items, teacher_vectors, teacher_items, temperature: float, top: int) -> float:
    """One target after the other in float64, all others than the teacher's `top` items as one class."""
    values = []
    for v, t in zip(vectors.astype(np.float64), teacher_vectors.astype(np.float64), strict=True):
        logits = [items[1:].astype(np.float64) @ v, teacher_items[1:].astype(np.float64) @ t]
        q, p = (np.exp((x - x.max()) / temperature) for x in logits)
        q, p = q / q.sum(), p / p.sum()
        order = np.argsort(-p)
        best, rest = order[:top], order[top:]
        value = sum(p[i] * np.log(p[i] / q[i]) for i in best)
        value += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum()) if len(rest) else 0
        values.append(temperature**2 * value)
    return float(np.mean(values))


@pytest.mark.parametrize("many_items", [4096, V], ids=["all examples at once", "by examples"])
@pytest.mark.parametrize("at_once", [2**20, N * 300, 1], ids=["one chunk", "uneven chunks", "smallest chunks"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.2])
@pytest.mark.parametrize("top", [None, 1, 20, 600, V - 1, V, 5 * V])
def test_kl_equals_numpy_in_float64_with_its_gradients(top, temperature, at_once, many_items, monkeypatch):
    """The gradients by finite differences of the NumPy value, along random directions."""
    sizes = {"LOGITS_AT_ONCE": at_once, "MANY_ITEMS": many_items, "EXAMPLES_AT_ONCE": N - 1, "ITEMS_AT_ONCE": 300}
    for name, value in sizes.items():
        monkeypatch.setattr(losses, name, value)
    calls, in_parts = [], losses.in_parts
    counted = lambda loss, *rest: in_parts(lambda *part: calls.append(part) or loss(*part), *rest)  # noqa: E731
    monkeypatch.setattr(losses, "in_parts", counted)
    inputs = drawn(grad=True)
    loss = distillation_kl(*inputs, temperature, top)
    plain = [x.detach().numpy().astype(np.float64) for x in inputs]
    assert [len(part[0]) for part in calls] == ([N] if many_items > V else [N - 1, 1])
    expected = partial(numpy_kl, temperature=temperature, top=top or V)
    assert loss.item() == pytest.approx(expected(*plain), rel=1e-5)
    (3 * loss).backward()
    rng = np.random.default_rng(0)
    for number in (0, 1):
        direction = rng.standard_normal(plain[number].shape)
        ends = []
        for h in (1e-5, -1e-5):
            ends.append(expected(*(x + h * direction if n == number else x for n, x in enumerate(plain))))
        gradient = inputs[number].grad.numpy().astype(np.float64)
        scale = np.linalg.norm(gradient)
        assert (gradient * direction).sum() == pytest.approx(3 * (ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-3 * scale)
    assert not inputs[1].grad[0].any()  # the padding is no class


def test_padding_is_no_class():
    inputs = drawn()
    before = [distillation_kl(*inputs, 1.0, top) for top in (None, 5)]
    inputs[1][0] = inputs[3][0] = 100.0
    assert before == [distillation_kl(*inputs, 1.0, top) for top in (None, 5)]


@pytest.mark.parametrize("at_once", [2**20, 1])
@pytest.mark.parametrize("top", [None, 5])
def test_a_student_that_equals_its_teacher_has_no_divergence(top, at_once, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    vectors, items = drawn(grad=True)[:2]
    loss = distillation_kl(vectors, items, vectors, items, 2.0, top)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and vectors.grad.abs().max() < 1e-6
    assert distillation_kl(vectors + 0.1, items, vectors, items, 2.0, top).item() > 1e-3


@pytest.mark.parametrize("top", [None, 100])
def test_memory_stays_below_that_of_the_logits(top):
    """256 targets, 200,000 items: one array of logits would take 195 MiB, and the plain way needs several."""
    vectors, items = torch.randn(256, 8, requires_grad=True), torch.randn(200_001, 8)
    warm = torch.randn(256, 8, requires_grad=True), torch.randn(9000, 8)
    distillation_kl(*warm, *warm, 1.0, top).backward()  # what the libraries keep for themselves
    work = lambda: distillation_kl(vectors, items, vectors.detach() + 1, items, 1.0, top).backward()  # noqa: E731
    assert peak_extra_bytes(work, "cpu") < 100 * 2**20


def with_kl(**options) -> tuple[SLMRec, dict]:
    """A student of the logits of another recommender, with vectors of another width."""
    student = tiny_llm_rec(4)
    weights = NONE | {"norm_form": "l2", "block_reduction": "sum", "lambda_kl": 0.5, "temperature": 2.0} | options
    model = SLMRec(student, num_blocks=4, **weights)
    data = batch()
    torch.manual_seed(3)
    model.teacher_table = torch.randn(41, 6)
    data["teacher_vectors"] = torch.randn(int((data["targets"] != 0).sum()), 6)
    return model, data


@pytest.mark.parametrize("kl_items", [None, 3])
def test_the_term_is_that_of_the_students_user_vectors(kl_items):
    model, data = with_kl(kl_items=kl_items)
    del data["teacher_states"]  # no term reads them
    terms = model.eval()(data)
    assert set(terms) == {"ce", "kl"}
    mask = data["targets"] != 0
    with torch.no_grad():
        vectors = model.student.head(model.student.states(data["histories"], mask, [4])[:, 0])
    given = [x.numpy() for x in (vectors, model.student.table, data["teacher_vectors"], model.teacher_table)]
    assert terms["kl"].item() == pytest.approx(0.5 * numpy_kl(*given, 2.0, kl_items or 40), rel=1e-5)
    terms["kl"].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name or "score" in name)
    assert not [name for name in model.state_dict() if "teacher" in name]


def test_without_weight_the_term_is_neither_computed_nor_logged():
    data = batch()
    assert set(make({**NONE, "lambda_cos": 1.0})(data)) == {"ce", "cos"}


def test_every_target_has_its_own_history():
    data = make_sequences(users=40, high=20)
    for name, length in (("all", 5), ("3", 4), ("last", 6)):
        examples = training_examples(data, name, length)
        single = examples.single_targets(data.offsets, 9)
        expected = []
        for user, first, end in zip(examples.users, examples.first, examples.end, strict=True):
            whole = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
            for position in range(first - data.offsets[user], end - data.offsets[user] + 1):
                expected.append((user, whole[max(0, position - 9) : position], whole[position]))
        found = []
        for row in range(len(single)):
            one = single.batch(np.array([row]))
            found.append((one["users"].item(), one["histories"][0].tolist(), one["targets"][0, -1].item()))
        assert found == expected and len(single) == examples.num_targets.sum()


# --- the step ---


@pytest.fixture(scope="module")
def runs(sources, tmp_path_factory):  # noqa: F811
    """SASRec, which reads 9 items, a teacher of two layers, which reads 5, and one that reads 3."""
    place = tmp_path_factory.mktemp("runs")
    step(train_sr_trad, "sr", sources, *SMALL, "--output_dir", place / "sasrec")
    common = ["--base_model", sources / "base", "--item_embeddings", sources / "table", "--num_layers", 2]
    common += ["--lora_r", 2, "--train_targets", "all"]
    for name, length in (("teacher", 5), ("short", 3)):
        step(finetune, "teacher", sources, *common, "--max_seq_length", length, "--output_dir", place / name)
    return place


ALONE = ["--lambda_cos", 0, "--lambda_norm", 0, "--lambda_ms", 0]


def student(runs, sources, name: str, *flags) -> list[dict]:  # noqa: F811
    """Train one of one layer; the rows of its log."""
    usual = ["--teacher", runs / "teacher", "--num_layers", 1, "--num_blocks", 1, "--lambda_ms", 0]
    step(distill, "student", sources, *usual, *flags, "--output_dir", runs / name)
    return [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]


def watch_vectors(monkeypatch) -> list:
    """What `teacher_vectors` returns in a run."""
    found, real = [], kl_teacher.teacher_vectors
    monkeypatch.setattr(kl_teacher, "teacher_vectors", lambda *a: found.append(real(*a)) or found[-1])
    return found


def plain_vectors(model, data: Sequences, examples, length: int) -> np.ndarray:
    """The user vector of each target, from the `length` items before it, one after the other."""
    rows = []
    for row in range(len(examples)):
        for position in range(examples.first[row], examples.end[row] + 1):
            low = max(int(data.offsets[examples.users[row]]), position - length)
            history = torch.from_numpy(data.items[low:position].astype(np.int64))[None]
            rows.append(model.user_vectors(history)[0].detach().numpy())
    return np.stack(rows)


def test_sasrec_teaches_with_histories_of_its_own_length(runs, sources, capsys, monkeypatch):  # noqa: F811
    found = watch_vectors(monkeypatch)
    rows = student(runs, sources, "of-sasrec", *ALONE, "--lambda_kl", 2, "--kl_teacher", runs / "sasrec")
    data = Sequences.load(sources / "data")
    config = json.loads((runs / "sasrec/config.json").read_text())
    model = load_recommender(runs / "sasrec", config, data.training_part())
    expected = plain_vectors(model, data, training_examples(data, "all", 5), 9)
    np.testing.assert_allclose(found[0].array, expected[found[0].rows], rtol=1e-4, atol=1e-5)
    out = capsys.readouterr().out
    assert "teacher states" not in out and "teacher vectors" in out and not (runs / "teacher/states").exists()
    trained = [row for row in rows if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["ce"] + row["kl"]) and row["kl"] > 0 for row in trained)
    assert all({"ce", "kl"} == set(row["gradient_share"]) for row in rows if "gradient_share" in row)
    assert (runs / "of-sasrec/curve.png").stat().st_size
    config = json.loads((runs / "of-sasrec/config.json").read_text())
    assert (config["lambda_kl"], config["temperature"], config["kl_items"]) == (2, 1, None)
    student(runs, sources, "again", *ALONE, "--lambda_kl", 1, "--kl_items", 3, "--kl_teacher", runs / "sasrec")
    assert "(found)" in capsys.readouterr().out and (found[1].array == found[0].array).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["from its states", "in a pass of their own"])
def test_the_teachers_own_vectors(way, dtype, runs, sources, monkeypatch):  # noqa: F811
    shutil.rmtree(runs / "teacher/states", ignore_errors=True)
    found = watch_vectors(monkeypatch)
    flags = [] if way == "from its states" else ALONE
    rows = student(runs, sources, "own", *flags, "--lambda_kl", 1, "--temperature", 2, "--dtype", dtype)
    assert all({"ce", "kl"} <= set(row) for row in rows if "loss" in row)
    assert len(list((runs / "teacher/states").glob("*.npy"))) == 1 + (way == "from its states")
    model, data = load_llm_rec(runs / "teacher"), Sequences.load(sources / "data")
    examples, expected = training_examples(data, "all", 5), []
    for row in range(len(examples)):
        one = examples.batch(np.array([row]))
        with torch.no_grad():
            expected.append(model.head(model.states(one["histories"], one["targets"] != 0, [2])[:, 0]))
    tolerance = 1e-5 if dtype == "float32" else 0.05
    vectors, expected = found[0].array, torch.cat(expected).numpy()[found[0].rows]
    assert np.abs(vectors - expected).max() < tolerance * np.abs(expected).max()
    assert vectors.dtype == np.float32 and vectors.shape == expected.shape


def test_a_student_may_have_no_teacher_at_all(runs, sources, capsys):  # noqa: F811
    """Also where a recipe sets the rest of the logit term: --lambda_kl 0 switches it off."""
    rows = student(runs, sources, "plain", *ALONE, "--lambda_kl", 0, "--temperature", 2, "--kl_items", 3)
    assert all("kl" not in row and row["loss"] == row["ce"] for row in rows if "loss" in row)
    assert "teacher states" not in capsys.readouterr().out


def refused(runs, sources, capsys, flags: list) -> str:  # noqa: F811
    common = ["--dataset", sources / "data", "--teacher", runs / "teacher", "--num_layers", 1, "--num_blocks", 1]
    argv = [*common, *ALONE, "--max_steps", 1, "--output_dir", runs / "new", *flags]
    before = contents(runs)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(distill.main, "student", last_of_each(argv), models=MODELS, inherits=distill.INHERITED)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and contents(runs) == before, lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--temperature 2", "--temperature 2.0 has no effect without the logit term: add --lambda_kl"),
        ("--kl_items 9", "--kl_items 9 has no effect"),
        ("--kl_teacher {0}/sasrec", "sasrec has no effect"),
        ("--lambda_kl -1", ">= 0"),
        ("--lambda_kl 1 --temperature 0", "> 0"),
        ("--lambda_kl 1 --kl_items 0", ">= 1"),
        ("--lambda_kl 1 --kl_teacher {0}/none", "--kl_teacher {0}/none holds no finished run"),
        ("--lambda_kl 1 --kl_teacher {0}", "holds no finished run"),
        ("--lambda_kl 1 --kl_teacher {0}/unfinished", "holds no finished run"),
        ("--lambda_kl 1 --kl_teacher {0}/other", "another dataset"),
        ("--lambda_kl 1 --kl_teacher {0}/fusion", "is no run of train_sr_trad.py, finetune.py or distill.py"),
        ("--lambda_kl 1 --kl_teacher {0}/short", "--max_seq_length 5: --kl_teacher {0}/short reads 3 items"),
        ("--lambda_kl 1 --kl_teacher {0}/damaged", "damaged"),
        ("--lambda_kl 1 --kl_teacher {0}/elsewhere", "; it is of --dataset there/elsewhere"),
        ("--lambda_kl 1 --kl_teacher {0}/sasrec/model.safetensors", "model.safetensors holds no finished run"),
        ("--teacher {0}/sasrec", "its logits alone can be learned: --kl_teacher {0}/sasrec"),
        ("--teacher {0}/teacher/config.json", "config.json holds no finished teacher"),
        ("--train_strategy frozen --lora_alpha 4", "--lora_alpha has no effect with --train_strategy frozen"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(flags, words, runs, sources, capsys):  # noqa: F811
    changes = {"other": {"dataset_fingerprint": "f" * 64}, "fusion": {"kind": "fusion"}, "unfinished": {"run_id": "x"}}
    changes |= {"elsewhere": {"dataset_fingerprint": "f" * 64, "dataset": "there/elsewhere"}}
    for name, change in ({"damaged": {}} | changes).items():
        shutil.copytree(runs / "sasrec", runs / name, dirs_exist_ok=True)
        config = json.loads((runs / name / "config.json").read_text())
        (runs / name / "config.json").write_text(json.dumps(config | change))
    (runs / "damaged/model.safetensors").write_bytes(b"nonsense")
    assert words.format(runs) in refused(runs, sources, capsys, flags.format(runs).split())


def test_a_run_is_not_written_over_its_own_teacher(runs, sources, capsys):  # noqa: F811
    student(runs, sources, "once", *ALONE)
    flags = ["--lambda_kl", 1, "--kl_teacher", runs / "once", "--output_dir", runs / "once"]
    before = set(runs.rglob("*.npy"))
    assert "is where this run is written" in refused(runs, sources, capsys, [*flags, "--lambda_cos", 1])
    assert set(runs.rglob("*.npy")) == before, "no state of a teacher was computed for nothing"
    student(runs, sources, "twice", *ALONE, *flags[:4])  # a student teaches as well


def test_a_model_without_user_vectors_teaches_no_logits(runs, sources, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(SASRec, "scores", lambda self, histories, users=None, items=None: None, raising=False)
    words = refused(runs, sources, capsys, ["--lambda_kl", 1, "--kl_teacher", runs / "sasrec"])
    assert "SASRec scores items by no dot product" in words


@pytest.fixture(scope="module")
def table_of_sasrec(runs, sources):  # noqa: F811
    flags = ["--dataset", sources / "data", "--sr_dir", runs / "sasrec", "--output_dir", runs / "table"]
    cli.run(extract_emb.main, "extract", [str(word) for word in flags], models=MODELS)
    return runs / "table"


def teacher_with_logits(runs, sources, *flags) -> list[str]:  # noqa: F811
    common = ["--dataset", sources / "data", "--base_model", sources / "base", "--num_layers", 2, "--lora_r", 2]
    common += ["--train_targets", "all", "--max_seq_length", 5, "--max_steps", 2, "--batch_size", 8]
    cli.run(finetune.main, "teacher", [str(word) for word in (*common, *flags)], models=MODELS)


def test_a_teacher_learns_the_logits_of_the_model_whose_table_it_reads(runs, sources, table_of_sasrec, monkeypatch):  # noqa: F811
    found, place = watch_vectors(monkeypatch), runs / "taught"
    flags = ["--item_embeddings", table_of_sasrec, "--lambda_kl", 2, "--output_dir", place]
    teacher_with_logits(runs, sources, *flags)
    data = Sequences.load(sources / "data")
    config = json.loads((runs / "sasrec/config.json").read_text())
    sasrec = load_recommender(runs / "sasrec", config, data.training_part())
    expected = plain_vectors(sasrec, data, training_examples(data, "all", 5), 9)
    np.testing.assert_allclose(found[0].array, expected[found[0].rows], rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert all(row["kl"] > 0 and row["loss"] == pytest.approx(row["ce"] + row["kl"]) for row in rows if "loss" in row)
    config = json.loads((place / "config.json").read_text())
    assert Path(config["kl_teacher"]).name == "sasrec" and config["kind"] == "teacher" and config["temperature"] == 1
    assert load_llm_rec(place).num_layers == 2  # it is saved as any teacher is, and teaches
    usual = ["--teacher", place, "--num_layers", 1, "--num_blocks", 1, *ALONE, "--lambda_kl", 1]
    step(distill, "student", sources, *usual, "--output_dir", runs / "of-taught")
    assert Path(json.loads((runs / "of-taught/config.json").read_text())["kl_teacher"]).name == "taught"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--item_embeddings {1} --lambda_kl 1", "--lambda_kl 1.0: no single run made the item table"),
        ("--item_embeddings {0}/table --temperature 2", "--temperature 2.0 has no effect"),
        ("--item_embeddings {0}/table --lambda_kl 1 --kl_teacher {0}/none", "holds no finished run"),
        ("--item_embeddings {0}/table --lambda_kl 1 --kl_teacher {0}/short", "--kl_teacher {0}/short reads 3 items"),
    ],
)
def test_a_teachers_flags_are_refused_too(flags, words, runs, sources, table_of_sasrec, capsys):  # noqa: F811
    before = contents(runs)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        teacher_with_logits(
            runs, sources, *flags.format(runs, sources / "table").split(), "--output_dir", runs / "refused"
        )
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and contents(runs) == before, lines
    assert words.format(runs) in lines[0]


def test_logits_of_other_weights_than_those_of_the_table_are_refused(runs, sources, table_of_sasrec, capsys):  # noqa: F811
    """The run was trained again after its table was taken; a run that is named may have other weights."""
    path = table_of_sasrec / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"sr_weights_sha256": "0" * 64}))
    flags = ["--item_embeddings", table_of_sasrec, "--output_dir", runs / "refused"]
    with pytest.raises(SystemExit) as stopped:
        teacher_with_logits(runs, sources, *flags, "--lambda_kl", 2)
    words = capsys.readouterr().err
    assert stopped.value.code == 2 and "sasrec was trained again since" in words and "run extract_emb.py again" in words
    assert not (runs / "refused").exists()
    teacher_with_logits(runs, sources, *flags)  # without them nothing depends on it
    path.write_text(whole)
