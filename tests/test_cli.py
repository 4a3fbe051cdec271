"""Command lines: what is refused, in one line, with exit code 2, before any work."""

import ast
import dataclasses
import errno
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
import typing

import pytest
import torch
import yaml
from conftest import ROOT

import distill
import finetune
from models.interface import Recommender, flag
from models.sr import MODELS
from utils import cli, flags
from utils.cli import resolve
from utils.errors import UserError
from utils.flags import FLAGS, OF_TRAINED
from utils.recipes import RECIPE_SECTIONS

SCRIPTS = {"train_sr_trad": "sr", "extract_emb": "extract", "finetune": "teacher", "distill": "student"}
SCRIPTS |= {"train_open_p5": "open_p5"}
EVERY = SCRIPTS | dict.fromkeys(("recommend", "evaluate"))
CALLED = []


def main(
    *,
    dataset: str = "none-such",
    learning_rate: float = 1e-3,
    num_layers: int = 4,
    lora_r: int | None = None,
    resume: typing.Literal["auto", "never"] = "never",
    lora_dropout: float = 0.1,
    max_steps: int = -1,
    dtype: typing.Literal["float32", "bfloat16"] | None = None,
    output_dir: str | None = None,
) -> None:
    """Unused."""
    CALLED.append(dict(locals()))


def one_line(capsys, argv: list[str]) -> str:
    CALLED.clear()
    with pytest.raises(SystemExit) as stop:
        cli.run(main, "sr", argv)
    assert stop.value.code == 2 and not CALLED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rte", "1"], "did you mean --learning_rate"),
        (["--nonsense"], "unknown flag --nonsense"),
        (["--num_layers", "99999999999999999999"], "at most 64 bits"),
        (["--learning_rate", "1e300"], "at most 64 bits"),
        (["stray"], "stray word 'stray'"),
        (["--num_layers", "4", "8"], "stray word '8'"),
        (["-"], "stray"),
        (["--dataset", "a", "--lora_r", "4", "--dataset", "b"], "--dataset is given twice"),
        (["--dataset=a", "--dataset", "b"], "--dataset is given twice"),
        (["--learning-rate", "1", "--learning_rate=1"], "--learning_rate is given twice"),
        (["--resume", "--resume", "auto"], "--resume is given twice"),
        (["--num_layers", "0"], ">= 1"),
        (["--num_layers", "2.5"], "whole number"),
        (["--num_layers", "1e3"], "whole number"),
        (["--num_layers"], "whole number"),
        (["--num_layers", "four"], "whole number"),
        (["--learning_rate", "-1"], "> 0"),
        (["--learning_rate", "0"], "> 0"),
        (["--learning_rate", "nan"], "> 0"),
        (["--learning_rate", "inf"], "> 0"),
        (["--lora_dropout", "1"], "0..1"),
        (["--resume", "maybe"], "auto, never"),
        (["--dataset"], "needs a value"),
        (["--lora_r", "0"], ">= 1"),
        (["--max_steps", "0"], "-1 or >= 1"),
        (["--dtype", "float64"], "float32, bfloat16"),
        (["--dataset", "caf\udce9"], "--dataset is no text in UTF-8"),
    ],
)
def test_wrong_flags_are_refused_before_main_runs(argv, words, capsys):
    assert words in one_line(capsys, argv)


def test_values_arrive_with_their_annotated_types():
    cli.run(main, "sr", ["--learning-rate", "1e-4", "--dataset=7", "--lora_r", "none", "--num_layers=3"])
    got = CALLED[-1]
    assert got["learning_rate"] == 1e-4 and got["dataset"] == "7" and got["lora_r"] is None and got["num_layers"] == 3
    assert got["resume"] == "never"


def test_a_path_below_the_home_folder_may_follow_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, path in {"~/run": f"{tmp_path}/run", "~": f"{tmp_path}", "a~/b": "a~/b", "~x": "~x"}.items():
        assert cli.resolve(main, None, [f"--output_dir={text}"])["output_dir"] == path
    tables = cli.resolve(finetune.main, None, ["--item_embeddings=~/one,~/two,x,a~/b"])["item_embeddings"]
    assert tables == f"{tmp_path}/one,{tmp_path}/two,x,a~/b"


def got(values: dict, name: str) -> object:
    return values[name] if name in values else getattr(values["model_config"], name)


@pytest.mark.parametrize("name", EVERY)
def test_every_flag_can_be_given(name):
    """Its default, or a value of its annotated type where the default is None, comes back as given."""
    function = importlib.import_module(name).main
    samples = {int: 3, float: 0.25, str: "text"}
    for flag_name, known in flags.flags_of(function, MODELS).items():
        value = "sasrec" if flag_name == "model" else known.default
        if value is None:
            value = (flags.choices(known.annotation) or [samples[flags.alternatives(known.annotation)[0]]])[-1]
        argv = [f"--{flag_name}", str(value)]
        argv += ["--dataset", "none-such"] if EVERY[name] and flag_name != "dataset" else []
        assert got(resolve(function, EVERY[name], argv, models=MODELS), flag_name) == value


@pytest.mark.parametrize("name", EVERY)
def test_help_shows_every_flag_with_type_default_and_meaning(name, capsys):
    module = importlib.import_module(name)
    cli.run(module.main, EVERY[name], ["--help"], models=MODELS)
    text = capsys.readouterr().out
    for flag_name, known in flags.flags_of(module.main, MODELS).items():
        part = text[text.index(f"--{flag_name}=") :].split("\n    --")[0]
        assert "Type:" in part and known.meaning in part
        if known.default is not None:
            assert str(known.default) in part


def test_what_a_recipe_or_another_flag_switches_off_is_refused():
    def teacher(*argv):
        return resolve(finetune.main, "teacher", list(argv), models=MODELS)

    with pytest.raises(UserError, match=r"num_epochs 5 has no effect beside max_steps=1500 of cloth.yaml: add --max"):
        teacher("--dataset", "cloth", "--num_epochs", "5")
    assert teacher("--dataset", "cloth", "--num_epochs", "5", "--max_steps", "-1")["num_epochs"] == 5
    assert teacher("--dataset", "cloth", "--num_epochs", "5", "--max_steps", "9")["max_steps"] == 9
    assert teacher("--dataset", "movie", "--num_epochs", "5")["num_epochs"] == 5
    for strategy, name, value in (("full", "lora_r", "8"), ("frozen", "lora_target_modules", "q_proj")):
        argv = ["--dataset", "none-such", "--train_strategy", strategy, f"--{name}", value]
        with pytest.raises(UserError, match=f"{name} has no effect with --train_strategy {strategy}"):
            teacher(*argv)
    argv = ["--dataset", "none-such", "--train_strategy", "full", "--lora_r", "8"]
    assert teacher(*argv, "--item_output", "residual")["lora_r"] == 8
    assert resolve(distill.main, "student", argv, models=MODELS, inherits=distill.INHERITED)["lora_r"] == 8


def test_every_documented_flag_is_one_of_some_script():
    used = {p for name in EVERY for p in inspect.signature(importlib.import_module(name).main).parameters}
    assert used - {"model_config"} == set(FLAGS)
    trained, training = (
        {p for name in names for p in inspect.signature(importlib.import_module(name).main).parameters}
        for names in (("evaluate", "recommend"), set(EVERY) - {"evaluate", "recommend"})
    )
    assert trained - training == OF_TRAINED


def what_is_read(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Variables, and keys as in `config["key"]` or `config.get("key")`, that are read other than to be shown."""
    variables, keys, queue = set(), set(), [tree]
    while queue:
        node = queue.pop()
        match node:
            case ast.JoinedStr() | ast.Call(func=ast.Name("print")):
                continue
            case ast.Name(name, ast.Load()):
                variables.add(name)
            case ast.Subscript(ast.Name("config") | ast.Attribute(attr="config"), ast.Constant(key), ast.Load()):
                keys.add(key)
            case ast.Call(
                ast.Attribute(ast.Name("config") | ast.Attribute(attr="config"), "get"), [ast.Constant(key), *_]
            ):
                keys.add(key)
        queue += ast.iter_child_nodes(node)
    return variables, keys


def unread_flags(source: str) -> set[str]:
    """Flags of a script's main that neither it reads nor, from `config`, the project's modules that it imports."""
    script = ast.parse(source)
    (main,) = (node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    read = what_is_read(main)[0] | what_is_read(script)[1]
    for node in script.body:
        path = ROOT / f"{(getattr(node, 'module', '') or '').replace('.', '/')}.py"
        if isinstance(node, ast.ImportFrom) and path.is_file():
            read |= what_is_read(ast.parse(path.read_text(encoding="utf-8")))[1]
    return {argument.arg for argument in main.args.kwonlyargs} - read


@pytest.mark.parametrize("name", MODELS)
def test_every_flag_of_a_model_is_read(name):
    modules = {inspect.getmodule(kind) for kind in MODELS[name].__mro__ if kind.__module__.startswith("models.sr.")}
    nodes = [node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config"}
    assert {field.name for field in dataclasses.fields(MODELS[name].Config)} <= read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    """Fault 6: flags that nothing reads."""
    assert unread_flags((ROOT / f"{name}.py").read_text(encoding="utf-8")) == set()


def test_a_flag_that_is_only_shown_or_part_of_another_name_is_unread():
    source = """
from utils.train import Run
def main(*, base_model="x", mode="y", model="z", seed=1, warmup_steps=2, lora_r=3, rank=4, depth=5, new=6):
    config = dict(locals())
    print(mode)
    config["new"] = f"{rank}"
    use(base_model, config["depth"])
"""
    assert unread_flags(source) == {"mode", "model", "lora_r", "rank", "new"}


def test_a_path_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no text in UTF-8"):
        cli.portable_path(tmp_path / os.fsdecode(b"caf\xe9"))


def recipe_file(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    monkeypatch.setattr(cli, "ROOT", tmp_path)


def test_recipe_stands_between_defaults_and_flags(tmp_path, monkeypatch, capsys):
    text = "data: {lora_dropout: 0.3}\nsr: {learning_rate: 0.5, num_layers: 2}\nteacher: {num_layers: 9}\n"
    recipe_file(tmp_path, monkeypatch, text)
    got = resolve(main, "sr", ["--dataset", "mine", "--num_layers", "7"])
    assert (got["learning_rate"], got["num_layers"], got["lora_dropout"], got["resume"]) == (0.5, 7, 0.3, "never")
    assert "learning_rate=0.5" in capsys.readouterr().out


def test_the_data_section_does_not_overrule_what_a_step_inherits(tmp_path, monkeypatch):
    """The earlier run may have had another value on its command line."""
    recipe_file(
        tmp_path, monkeypatch, "data: {lora_r: 4, dtype: bfloat16, lora_dropout: 0.3}\nstudent: {dtype: float32}\n"
    )
    argv = ["--dataset", "mine"]
    got = resolve(main, "student", argv, inherits=["lora_r", "dtype"])
    assert (got["lora_r"], got["dtype"], got["lora_dropout"]) == (None, "float32", 0.3)
    assert resolve(main, "student", [*argv, "--lora_r", "2"], inherits=["lora_r"])["lora_r"] == 2
    assert resolve(main, "teacher", argv)["lora_r"] == 4  # nothing to inherit from


def test_distill_inherits_what_the_teacher_was_trained_with(tmp_path, monkeypatch):
    recipe_file(tmp_path, monkeypatch, "data: {max_seq_length: 10, train_targets: all, lora_r: 3, batch_size: 7}\n")
    distill = importlib.import_module("distill")
    got = resolve(distill.main, "student", ["--dataset", "mine"], inherits=distill.INHERITED, models=MODELS)
    assert got["max_seq_length"] is got["train_targets"] is got["lora_r"] is None and got["batch_size"] == 7
    assert "inherits=INHERITED" in inspect.getsource(distill)


TRAINING = {name: section for name, section in SCRIPTS.items() if name != "extract_emb"}


def test_a_dataset_that_is_the_working_folder_has_the_recipe_of_its_name(tmp_path, monkeypatch):
    recipe_file(tmp_path, monkeypatch, "data: {max_seq_length: 10}\n")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for name in (".", "../mine", str(tmp_path / "mine")):
        assert cli.resolve(finetune.main, "teacher", ["--dataset", name])["max_seq_length"] == 10


@pytest.mark.parametrize("script", TRAINING)
def test_each_step_has_its_own_way_to_select_weights_from_recipe_or_command_line(script, tmp_path, monkeypatch):
    text = f"data: {{select_by: full/NDCG@10, patience: 3}}\n{TRAINING[script]}: {{patience: none}}\n"
    recipe_file(tmp_path, monkeypatch, text)
    module = importlib.import_module(script)

    def values(*argv: str) -> tuple:
        inherits = getattr(module, "INHERITED", [])
        got = resolve(module.main, TRAINING[script], list(argv), inherits=inherits, models=MODELS)
        return got["select_by"], got["patience"]

    assert values() == ("sampled/NDCG@10", None)
    assert values("--dataset", "mine") == ("full/NDCG@10", None)
    assert values("--dataset", "mine", "--select_by", "sampled/MRR", "--patience", "2") == ("sampled/MRR", 2)
    for flag_of in ("NDCG@10", "sampled/ndcg@10", "full/NDCG@20", "test/MRR", "valid/sampled/MRR", "full/", "MRR/full"):
        with pytest.raises(UserError, match=f"--select_by {flag_of}: expected one of sampled/HR@1, .*full/MRR"):
            values("--select_by", flag_of)
    for number in ("0", "-1", "1.5", "two", "1e2"):
        with pytest.raises(UserError, match=f"--patience {number}: expected a"):
            values("--patience", number)


@pytest.mark.parametrize("order", [("data", "sr"), ("sr", "data")])
def test_the_order_of_sections_does_not_matter(order, tmp_path, monkeypatch):
    lines = {"data": "data: {learning_rate: 0.1, lora_dropout: 0.3}\n", "sr": "sr: {learning_rate: 0.5}\n"}
    recipe_file(tmp_path, monkeypatch, "".join(lines[title] for title in order))
    got = resolve(main, "sr", ["--dataset", "mine"])
    assert (got["learning_rate"], got["lora_dropout"]) == (0.5, 0.3)


def failing(error: Exception):
    def main(
        *,
        dataset: str = "none-such",
        micro_batch_size: int | None = None,
        eval_batch_size: int = 1,
        resume: str = "never",
    ) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 2, "No space left on device: /a/b; free space"),
        (OSError(errno.EFBIG, "File too large"), 2, "File too large; free space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a"),
            2,
            "Permission denied: /a; ask its owner, or ch",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 2, "Read-only file system: /a; choose a place that you"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files; allow more open files"),
        (OSError(errno.EIO, "Input/output error", "/a"), 2, "Input/output error: /a\n"),
        (ConnectionError("the host does not answer"), 2, "the host does not answer\n"),
        (
            MemoryError(),
            1,
            "; a smaller --micro_batch_size, --eval_batch_size, or model needs less; these sizes may change with --res",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory; a smaller --micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; a smaller --micro_batch_size"),
        (KeyboardInterrupt(), 130, "interrupted; start it again with --resume auto to go on"),
    ],
)
def test_errors_of_the_system_get_the_advice_that_fits(error, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(failing(error), "sr", [])
    lines = capsys.readouterr().err
    assert stop.value.code == code and len(lines.splitlines()) == 1 and words in lines


@pytest.mark.parametrize(
    ("error", "told"), [(MemoryError(), "out of memory"), (KeyboardInterrupt(), "interrupted; start it again")]
)
def test_advice_names_flags_that_the_script_has_alone(error, told, capsys):
    def neither(*, dataset: str = "none-such") -> None:
        raise error

    def batches(*, dataset: str = "none-such", batch_size: int = 1, eval_batch_size: int = 1) -> None:
        raise error

    for main, sizes in ((neither, ""), (batches, "--eval_batch_size, --batch_size, or ")):
        advice = f"; a smaller {sizes}model needs less" if "memory" in told else ""
        with pytest.raises(SystemExit):
            cli.run(main, "sr", [])
        assert capsys.readouterr().err == f"test_cli.py: {told}{advice}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        cli.run(failing(RuntimeError("a mistake in the code")), "sr", [])


def text_calls(tree: ast.AST):
    """Calls that read or write text, or start a process whose output is text, and the names of their keywords."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in ("os.open", "archive.open"):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {word.arg for word in node.keywords}
        constants = [str(part.value) for arg in node.args for part in ast.walk(arg) if isinstance(part, ast.Constant)]
        binary = any(re.fullmatch("[rwax+]*b[+]?", text) for text in constants)
        is_method = isinstance(node.func, ast.Attribute)
        is_file = (is_method and name in ("read_text", "write_text")) or (name == "open" and not binary)
        if is_file or {"text", "universal_newlines"} & words:
            yield ast.unparse(node), words


def test_text_is_utf_8_whatever_the_locale():
    """Each call names its encoding, in every file of the product."""
    folders = (ROOT, *(ROOT / name for name in ("utils", "models", "models/sr", "datasets", "benchmarks")))
    product = [path for folder in folders for path in folder.glob("*.py")]
    assert len(product) > 20
    calls = [(path.name, *call) for path in product for call in text_calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(calls) > 10
    assert [(name, call) for name, call, words in calls if "encoding" not in words] == []


def test_a_recipe_in_utf_8_is_read_under_an_ascii_locale(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from utils import cli, flags
import train_sr_trad
cli.ROOT = Path({str(tmp_path)!r})
cli.run(train_sr_trad.main, "sr", ["--dataset", "mine"], models=train_sr_trad.MODELS)
"""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# na\u00efve\nsr: {seed: 3, output_dir: caf\u00e9}\n", "utf-8")
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_only, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and b"neither datasets/mine" in done.stderr, done.stderr
    assert b"recipe mine.yaml: seed=3, output_dir=caf\\xe9" in done.stdout


@dataclasses.dataclass(frozen=True)
class OtherConfig(Recommender.Config):
    width: int = flag(5, "an own flag", ">= 1")


class Other(Recommender):
    Config = OtherConfig


TWO = {"sasrec": MODELS["sasrec"], "other": Other}


def test_a_model_brings_its_own_flags_help_and_recipe(tmp_path, monkeypatch, capsys):
    train = importlib.import_module("train_sr_trad").main
    text = "sr: {seed: 3, other: {width: 7, batch_size: 9}, sasrec: {num_heads: 4}}\n"
    recipe_file(tmp_path, monkeypatch, text)
    argv = ["--dataset", "mine", "--model"]
    values = resolve(train, "sr", [*argv, "other"], models=TWO)
    assert values["model_config"] == OtherConfig(width=7) and (values["batch_size"], values["seed"]) == (9, 3)
    values = resolve(train, "sr", [*argv, "sasrec", "--num_heads", "1"], models=TWO)
    assert values["model_config"].num_heads == 1 and values["batch_size"] == 256
    assert resolve(train, "sr", [*argv, "other", "--width", "8"], models=TWO)["model_config"].width == 8
    with pytest.raises(UserError, match=r"unknown flag --num_heads .*a flag of --model sasrec"):
        resolve(train, "sr", [*argv, "other", "--num_heads", "2"], models=TWO)
    with pytest.raises(UserError, match="expected a number >= 1"):
        resolve(train, "sr", [*argv, "other", "--width", "0"], models=TWO)
    with pytest.raises(UserError, match="--model third: expected one of sasrec, other"):
        resolve(train, "sr", [*argv, "third"], models=TWO)
    for words in (["--model", "other", "--help"], ["--model=other", "--help"]):
        cli.run(train, "sr", words, models=TWO)
        out = capsys.readouterr().out
        assert "--width=WIDTH" in out and "an own flag" in out and "--num_heads" not in out


def test_help_as_a_value_is_a_value(capsys):
    CALLED.clear()
    cli.run(main, "sr", ["--output_dir", "help"])
    assert CALLED[0]["output_dir"] == "help"
    cli.run(main, "sr", ["help"])
    assert len(CALLED) == 1 and "--learning_rate" in capsys.readouterr().out


def test_a_recipe_may_name_the_model(tmp_path, monkeypatch):
    recipe_file(tmp_path, monkeypatch, "sr: {model: other, other: {width: 2}}\n")
    values = resolve(importlib.import_module("train_sr_trad").main, "sr", ["--dataset", "mine"], models=TWO)
    assert values["model"] == "other" and values["model_config"].width == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sr: {sasrec: {width: 2}}", r"sr\.sasrec\.width is no flag"),
        ("sr: {other: 3}", "section sr.other: expected name: value"),
        ("sr: {other: {with: 3}}", r"unknown key sr\.other\.with"),
        ("teacher: {with: 3}", r"unknown key teacher\.with"),
        ("sr: {third: {width: 3}}", r"unknown key sr\.third"),
        ("data: {other: {width: 3}}", r"unknown key data\.other"),
        ("teacher: {other: {width: 3}}", r"unknown key teacher\.other"),
        ("sr: {model: [other]}", r"--model \['other'\]: expected one of"),
        ("data: {negatives: 99}", r"unknown key data\.negatives"),
    ],
)
def test_bad_values_for_a_model_are_refused(text, words, tmp_path, monkeypatch):
    recipe_file(tmp_path, monkeypatch, text)
    with pytest.raises(UserError, match=words):
        resolve(importlib.import_module("train_sr_trad").main, "sr", ["--dataset", "mine"], models=TWO)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sr: {learning_rte: 1}", "unknown key sr.learning_rte"),
        ("se: {learning_rate: 1}", "unknown section se"),
        ("sr: {num_layers: 2.5}", "whole number"),
        ("sr: [", "no YAML"),
        ("sr: 3", "expected name: value"),
        ("- sr", "expected name: value lines"),
        ("sr: {seed: 3, max_steps: 1, seed: 4}", "line 1: seed stands twice"),
        ("sr:\n  max_steps: 1\nsr:\n  num_layers: 2", "line 3: sr stands twice"),
        ("sr: {output_dir: {a: 1}}", "expected a single value"),
        ("sr: {output_dir: [a]}", "expected a single value"),
    ],
)
def test_bad_recipes_are_refused(text, words, tmp_path, monkeypatch):
    recipe_file(tmp_path, monkeypatch, text)
    with pytest.raises(UserError, match=words):
        resolve(main, "sr", ["--dataset", "mine"])


def test_all_recipes_resolve_for_every_step(monkeypatch):
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert {"ml-100k", "cloth", "movie", "music", "sport"} <= {path.stem for path in recipes}
    for path in recipes:
        assert set(yaml.safe_load(path.read_text())) <= set(RECIPE_SECTIONS)
        assert path.read_text().startswith("#"), "a recipe opens with where its values come from"
    for name in SCRIPTS:
        called = {}
        monkeypatch.setattr(cli, "run", lambda main, called=called, **how: called.update(how, main=main))
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        assert called.pop("section") == SCRIPTS[name]
        for path in recipes:
            assert resolve(called["main"], SCRIPTS[name], ["--dataset", path.stem], models=called.get("models"))


def test_paper_recipes_hold_table_8():
    finetune, distill = importlib.import_module("finetune"), importlib.import_module("distill")
    expected = {"cloth": (0.003, 1500, 50, 1.0), "movie": (0.001, -1, 50, 1.0), "music": (0.002, 800, 100, 0.01)}
    for name, (rate, steps, warmup, lambda_ms) in (expected | {"sport": (0.002, 2000, 50, 0.1)}).items():
        for module, section in ((finetune, "teacher"), (distill, "student")):
            got = resolve(module.main, section, ["--dataset", name], models=MODELS)
            assert (got["learning_rate"], got["max_steps"], got["warmup_steps"]) == (rate, steps, warmup)
            assert got["lr_scheduler"] == "cosine" and got["max_grad_norm"] == 1.0 and got["batch_size"] == 256
        assert (got["lambda_cos"], got["lambda_norm"], got["lambda_ms"]) == (1.0, 0.1, lambda_ms)
        assert (got["num_blocks"], got["norm_form"], got["block_reduction"]) == (4, "l2", "sum")
