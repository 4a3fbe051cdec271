"""Online distillation: terms and gradients of both stacks against plain torch; what a run trains, saves, refuses."""

import json

import pytest
import torch
from conftest import last_of_each, tiny_llm_rec
from kills import contents, outcome, step
from test_kill import sources  # noqa: F401
from test_losses import WEIGHTS, batch
from test_losses import steps as optimise

import distill
import finetune
import recommend
import train_sr_trad
from models.llm.storage import count_parameters, load_llm_rec
from models.online import OnlineSLMRec
from models.sr import MODELS
from utils import cli
from utils.train import Loop

ONLINE = WEIGHTS | {"lambda_kl": 0.7, "lambda_ms_teacher": 0.4}


def make(**options) -> tuple[OnlineSLMRec, dict]:
    """A student of 4 layers, a teacher of 8 that trains its table too, and a batch."""
    teacher = tiny_llm_rec(8, seed=9, item_output="residual", item_rank=3)
    torch.nn.init.normal_(teacher.item_output.right, std=0.3)
    weights = ONLINE | {"norm_form": "l2", "block_reduction": "sum", "kl_blocks": False} | options
    model = OnlineSLMRec(tiny_llm_rec(4), teacher, num_blocks=4, **weights)
    data = batch()
    del data["teacher_states"]
    return model, data


def plain_terms(model: OnlineSLMRec, data: dict, reduction: str, kl_blocks: bool, form: str = "l2") -> dict:
    """All terms, written out, from the states that transformers' own forward pass gives."""
    mask = data["targets"] != 0
    targets, rows = data["targets"][mask] - 1, torch.arange(int(mask.sum()))
    sides = []
    for stack, heads in ((model.student, model.ms_heads), (model.online_teacher, model.teacher_ms_heads)):
        ends = [len(stack.base.layers) * k // 4 for k in (1, 2, 3, 4)]
        states = stack.plain_states(data["histories"], mask, ends).unbind(1)
        vectors = [states[k] @ head.weight.T for k, head in enumerate([*heads, stack.score])]
        log_p = [(v @ stack.item_vectors()[1:].T).log_softmax(1) for v in vectors]
        sides.append((states, log_p, [-x[rows, targets].mean() for x in log_p]))
    (states, log_q, losses), (taught, log_p, teacher_losses) = sides
    power = {"l2": 0.5, "squared": 1}[form]
    cosines = [((s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1))).mean() for s, t in zip(states, taught, strict=True)]
    distances = [(((s - t) ** 2).sum(1) ** power).mean() for s, t in zip(states, taught, strict=True)]
    log_p = [x.detach() for x in log_p]
    kl = [(p.exp() * (p - q)).sum(1).mean() for p, q in zip(log_p, log_q, strict=True)]
    over = {"sum": sum, "mean": lambda values: sum(values) / len(values)}[reduction]
    return {
        "ce": losses[3],
        "cos": over([1 - cosine for cosine in cosines]),
        "norm": 0.1 * over(distances),
        "ms": 0.5 * over(losses[:3]),
        "kl": 0.7 * (over(kl) if kl_blocks else kl[3]),
        "teacher_ce": teacher_losses[3],
        "teacher_ms": 0.4 * over(teacher_losses[:3]),
    }


@pytest.mark.parametrize("form", ["l2", "squared"])
@pytest.mark.parametrize("kl_blocks", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_term_and_its_gradient_in_both_stacks_equal_plain_torch(reduction, kl_blocks, form):
    model, data = make(block_reduction=reduction, kl_blocks=kl_blocks, norm_form=form)
    terms, expected = model(data), plain_terms(model, data, reduction, kl_blocks, form)
    assert terms.keys() == expected.keys()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
        found, wanted = (
            torch.autograd.grad(x, list(trained.values()), retain_graph=True, allow_unused=True)
            for x in (terms[name], value)
        )
        for own, of_plain, where in zip(found, wanted, trained, strict=True):
            own, of_plain = (torch.zeros(()) if g is None else g for g in (own, of_plain))
            scale = max(of_plain.norm().item(), 1e-3)
            assert (own - of_plain).norm() < 1e-4 * scale, (name, where)
        reached = {where.split(".")[0] for g, where in zip(found, trained, strict=True) if g is not None and g.any()}
        both, of_teacher = name in ("cos", "norm"), name.startswith("teacher")
        assert ("student" in reached, "online_teacher" in reached) == (both or not of_teacher, both or of_teacher), name


def test_without_weight_a_term_is_neither_computed_nor_logged():
    none = dict.fromkeys(ONLINE, 0.0)
    assert set(make(**none | {"lambda_norm": 1})[0](batch())) == {"ce", "teacher_ce", "norm"}
    model, data = make(**none | {"lambda_kl": 1})
    assert set(model(data)) == {"ce", "teacher_ce", "kl"} and not len(model.ms_heads) + len(model.teacher_ms_heads)


@pytest.mark.parametrize("kl_blocks", [False, True])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(kl_blocks):
    model, whole = make(kl_blocks=kl_blocks)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(model(whole).values()), trained)
    number = (whole["targets"] != 0).sum(1).tolist()
    with model.for_accumulation():
        assert model.student.kept_prefix and model.online_teacher.kept_prefix
        for row, n in enumerate(number):
            part = {name: value[row : row + 1] for name, value in whole.items()}
            (sum(model(part).values()) * n / sum(number)).backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.norm().item())


def test_training_lowers_both_cross_entropies_and_the_student_answers():
    model, data = make()
    before = {name: value.item() for name, value in model(data).items()}
    optimise(model, data, 20)
    after = {name: value.item() for name, value in model(data).items()}
    assert all(after[name] < before[name] - 0.3 for name in ("ce", "teacher_ce")), (before, after)
    histories = data["histories"]
    assert torch.equal(model.eval().user_vectors(histories), model.student.user_vectors(histories))
    assert torch.equal(model.item_vectors(), model.student.item_vectors())
    heads = {id(p) for p in model.head_parameters()}
    outside = {id(p) for n, p in model.named_parameters() if p.requires_grad and "decoder" not in n}
    assert heads == outside  # of both sides


# --- the step ---

LOGITS = "--lambda_kl 1 --kl_blocks true --lambda_ms_teacher 0.5 --lambda_cos 0 --lambda_norm 0"
ONE_BLOCK = "--num_layers 1 --num_blocks 1 --lambda_ms 0"
NAMES = {"ce", "teacher_ce", "cos", "norm", "ms"}


@pytest.fixture(scope="module")
def runs(sources, tmp_path_factory):  # noqa: F811
    """Two teachers of the same configuration and other weights, and a traditional model."""
    place = tmp_path_factory.mktemp("runs")
    common = ["--base_model", sources / "base", "--item_embeddings", sources / "table", "--num_layers", 2]
    common += ["--lora_r", 2, "--train_targets", "all", "--item_dropout", 0.1, "--item_output", "residual"]
    for name, rate in (("teacher", 1e-3), ("other", 1e-1)):
        step(finetune, "teacher", sources, *common, "--learning_rate", rate, "--output_dir", place / name)
    step(train_sr_trad, "sr", sources, "--item_dim", 8, "--num_layers", 1, "--output_dir", place / "sasrec")
    return place


def student(runs, sources, name: str, flags: str = "", teacher: str = "teacher") -> list[dict]:  # noqa: F811
    usual = ["--teacher", runs / teacher, "--num_layers", 2, "--num_blocks", 2, "--mode", "online"]
    step(distill, "student", sources, *usual, *flags.format(runs).split(), "--output_dir", runs / name)
    rows = [json.loads(line) for line in (runs / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row | {"samples_per_second": 0} if "loss" in row else row for row in rows]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", NAMES),
        ("--micro_batch_size 3 --dtype bfloat16", NAMES),
        (LOGITS, {"ce", "teacher_ce", "ms", "teacher_ms", "kl"}),
        (f"--lambda_kl 1 --kl_items 3 {ONE_BLOCK}", NAMES - {"ms"} | {"kl"}),
        ("--lambda_kl 1 --kl_teacher {0}/sasrec", NAMES | {"kl"}),
    ],
    ids=["default", "bfloat16", "logits", "last logits", "another run's"],
)  # fmt: skip
def test_a_run_trains_both_and_saves_the_student_alone(flags, names, runs, sources, capsys):  # noqa: F811
    rows = student(runs, sources, "online", flags)
    out = capsys.readouterr().out
    assert "teacher states" not in out and ("teacher vectors" in out) == ("--kl_teacher" in flags)
    common = {"step", "loss", "grad_norm", "lr", "samples_per_second"}
    trained = [row for row in rows if "loss" in row]
    assert all(row.keys() - common == names for row in trained), trained[0]
    assert all(row["loss"] == pytest.approx(sum(row[name] for name in names)) for row in trained)
    assert all(set(row["gradient_share"]) == names for row in rows if "gradient_share" in row)
    model, config = load_llm_rec(runs / "online"), json.loads((runs / "online/config.json").read_text())
    own, size = count_parameters(model), json.loads((runs / "online/metrics.json").read_text())["parameters"]
    assert (size["total"], size["lora"]) == (own["total"], own["lora"]) and size["trained"] > 1.5 * own["trained"]
    assert config["mode"] == "online" and config["title"].endswith(", online")
    assert len(recommend.load(runs / "online").recommend([["id4", "id5"]], k=3)[0].items) == 3
    assert contents(runs / "online").keys() == contents(runs / "teacher").keys()


def test_the_teachers_trained_weights_are_not_read(runs, sources):  # noqa: F811
    """Only its configuration and the item table are."""
    assert contents(runs / "teacher")["rec_heads.safetensors"] != contents(runs / "other")["rec_heads.safetensors"]
    one, same, unlike = (
        student(runs, sources, f"of-{name}{flags[7:]}", flags, teacher=name)
        for name, flags in (("teacher", ""), ("other", ""), ("teacher", "--seed 5"))
    )
    assert one == same != unlike and outcome(runs / "of-teacher") == outcome(runs / "of-other")


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", ["", LOGITS], ids=["states", "logits"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(flags, runs, sources, monkeypatch):  # noqa: F811
    whole = student(runs, sources, "whole", flags)
    real = Loop.one_step

    def one_step(self, at):
        if at == 3:
            raise Killed
        return real(self, at)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loop, "one_step", one_step)
        student(runs, sources, "cut", flags)
    resumed = student(runs, sources, "cut", f"{flags} --resume auto")
    assert resumed == whole and outcome(runs / "cut") == outcome(runs / "whole")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode offline --kl_blocks true --lambda_kl 1", "--kl_blocks true is for a teacher that trains too"),
        ("--mode offline --lambda_ms_teacher 1", "--lambda_ms_teacher is for a teacher that trains too"),
        ("--mode on", "expected one of offline, online"),
        ("--teacher_states per_batch", "--teacher_states per_batch is for --mode offline"),
        ("--lambda_ms 0 --lambda_ms_teacher 1 --num_blocks 1", "leaves no block before the last for --lambda_ms_teach"),
        ("--lambda_ms_teacher -1", ">= 0"),
        ("--kl_blocks true", "no effect without the logit term: add --lambda_kl"),
        ("--kl_blocks true --lambda_ms_teacher 1", "no effect without the logit term: add --lambda_kl"),
        ("--kl_blocks 2 --lambda_kl 1", "true or false"),
        ("--kl_blocks true --lambda_kl 1", "--lambda_ms and --lambda_ms_teacher above 0"),
        ("--kl_blocks true --lambda_kl 1 --lambda_ms 0 --lambda_ms_teacher 1", "needs heads on both sides"),
        ("--kl_blocks true --lambda_kl 1 --lambda_ms_teacher 1 --kl_teacher {0}/sasrec", "or --kl_teacher out"),
        ("--kl_teacher {0}/sasrec", "no effect without the logit term"),
        ("--lambda_cos 0 --lambda_norm 0", "compares nothing with its teacher"),
        ("--lambda_cos 0 --lambda_norm 0 --lambda_kl 1 --kl_teacher {0}/sasrec", "compares nothing with its teacher"),
        ("--teacher {0}/none", "holds no finished teacher"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(flags, words, runs, sources, capsys):  # noqa: F811
    argv = ["--dataset", sources / "data", "--teacher", runs / "teacher", "--num_layers", 2, "--num_blocks", 2]
    argv += ["--mode", "online", "--max_steps", 1, "--output_dir", runs / "new", *flags.format(runs).split()]
    before = contents(runs)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(distill.main, "student", last_of_each(argv), models=MODELS, inherits=distill.INHERITED)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and contents(runs) == before and words in lines[0], lines
