"""What the README and docs/ claim and code can break: files, links, commands and their flags, worked examples."""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections import Counter
from itertools import product

import pytest
import torch
import yaml
from conftest import ROOT, TITLES, forget, make_sequences
from kills import step
from test_kill import sources  # noqa: F401

import extract_emb
import recommend
import reproduce
import train_sr_trad
from models.llm.decoder import select_layers
from models.sr import MODELS
from models.sr.sasrec import SASRec
from utils import cli
from utils.checked import load_tensors
from utils.flags import FLAGS, coerce, flags_of

PATHS = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README, EXTEND, DIFFERENCES = (PAGES[name] for name in ("README.md", "docs/extend.md", "docs/differences.md"))
SECTIONS = {"train_sr_trad": "sr", "extract_emb": "extract", "finetune": "teacher", "distill": "student"}
MADE = {
    "models/sr/youtube_dnn.py",
    "tests/test_youtube_dnn.py",
    "recipes/mine.yaml",
    "recipes/paper/relations.yaml",
}  # by who follows a page
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page) if found == language]


def each(pattern: str, *, fences: bool = True) -> list:
    """Parameters (page, match) for all that a pattern finds in the pages."""
    texts = {name: text if fences else FENCE.sub("", text) for name, text in PAGES.items()}
    return [
        pytest.param(n, m, id=f"{n}: {m}") for n, text in texts.items() for m in sorted({*re.findall(pattern, text)})
    ]


def test_the_readme_is_read_once():
    assert len(README.splitlines()) <= 170 and len(README.split()) <= 1800


@pytest.mark.parametrize(("page", "name"), each(r"`([\w/.-]+\.(?:py|yaml|md|svg))`"))
def test_files_that_are_named_exist(page, name):
    places = [ROOT] if "/" in name else [ROOT, ROOT / "datasets"]
    assert name in MADE or any((place / name).is_file() for place in places)


@pytest.mark.parametrize(("page", "name"), each(r"`((?:\w+/)+)`"))
def test_folders_that_are_named_exist(page, name):
    assert (ROOT / name).is_dir() or name.startswith(("outputs/", "datasets/raw/", "adapter/"))


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "link"), each(r"\]\(([^)\s]+)\)", fences=False))
def test_links_resolve(page, link):
    path, _, anchor = link.partition("#")
    if path.startswith("https://"):
        return
    target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert target.is_file()
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def test_no_page_needs_a_file_that_is_not_here():
    assert not [name for name, text in PAGES.items() if re.search(r"PAPER\.md|DESIGN\.md|\.\./shared", text)]


def test_the_tree_names_every_file_of_the_product_once():
    named = []
    for line in README.split("## Where things are")[1].split("```")[1].splitlines():
        first, *others = re.findall(r"(?:^|(?<=  ))[\w/]+\.py(?=  )", line) if re.match(r"[\w/]+\.py", line) else [""]
        named += [first, *(other if "/" not in first else first.rpartition("/")[0] + "/" + other for other in others)]
    git = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    rooms = ("tests/", "benchmarks/", "datasets/")  # one line each
    product = [name for name in git.stdout.split() if not name.startswith(rooms) and (ROOT / name).stat().st_size]
    assert sorted(filter(None, named)) == sorted(product)


# --- commands ---


def commands() -> list:
    """Parameters (page, script, arguments) for every `python SCRIPT.py ...` of the pages."""
    found = {}
    for name, text in PAGES.items():
        lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
        spans = [" ".join(span.split()) for span in re.findall(r"`(python [^`]+)`", FENCE.sub("", text))]
        for line in lines + spans:
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and words[1].endswith(".py"):
                words = words[: words.index(">")] if ">" in words else words
                found[name, *words] = pytest.param(name, words[1], words[2:], id=f"{name}: {' '.join(words)}"[:120])
    assert len(found) >= 40
    return list(found.values())


@pytest.mark.parametrize(("page", "script", "arguments"), commands())
def test_commands_use_flags_that_exist(page, script, arguments, monkeypatch):
    """Their values are of the right type too, but for benchmarks."""
    for flag in re.findall(r'^ *"(\w+)": \("', PAGES[page], re.M):  # which the page itself adds
        if f"--{flag}" in arguments:
            at = arguments.index(f"--{flag}")
            arguments = arguments[:at] + arguments[at + 2 :]
    arguments = [word for word in arguments if word != "--help"]
    if script.startswith("benchmarks/"):
        source = (ROOT / script).read_text(encoding="utf-8")
        source += '"--out"' * (f'command_line(__doc__, "{script[len("benchmarks/") : -3]}")' in source)
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    elif script == "reproduce.py":
        reproduce.command_line().parse_args(arguments)
    elif script == "datasets/process.py":
        spec = importlib.util.spec_from_file_location("process_of_commands", ROOT / script)
        process = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(process)
        process.parse(arguments)
    else:
        monkeypatch.setitem(MODELS, "youtube_dnn", SASRec)
        name = script.removesuffix(".py")
        cli.resolve(importlib.import_module(name).main, SECTIONS.get(name), arguments, models=MODELS)


def test_flags_that_are_named_exist():
    """Of some script, those alone that stand in code spans without a command."""
    known = {flag for kind in MODELS.values() for flag in kind.Config.__dataclass_fields__} | set(FLAGS)
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("datasets/*.py"), ROOT / "reproduce.py"):
        known |= set(re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8")))
    for name, text in PAGES.items():
        spans = re.findall(r"`(?!python)([^`]*--[^`]*)`", FENCE.sub("", text)) if name != "datasets/README.md" else []
        flags = {flag for span in spans for flag in re.findall(r"--(\w+)", span)}
        assert flags <= known | {"help"}, name


@pytest.mark.parametrize(("page", "target"), each(r"(?m)(?:`|^)make (\w+)"))
def test_targets_of_make_exist(page, target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


# --- worked examples ---


def test_what_the_readme_does_in_python_works(sources, tmp_path, monkeypatch, capsys):  # noqa: F811
    """With a small run in place of its own; it has none of the items, so that the popular ones are recommended."""
    step(train_sr_trad, "sr", sources, "--item_dim", 8, "--output_dir", tmp_path / "run")
    load, (code,) = recommend.load, blocks(README, "python")
    monkeypatch.setattr(recommend, "load", lambda folder: load(tmp_path / "run"))
    capsys.readouterr()
    exec(code, {})
    first, second = ast.literal_eval(capsys.readouterr().out)
    assert len(first) == 3 and first == second and set(first) <= {*TITLES.values(), *(f"Film {n}" for n in range(41))}


@pytest.fixture
def youtube_dnn(monkeypatch) -> types.ModuleType:
    """The module and the test of docs/extend.md, registered as it says."""
    model, registry, test, *_ = blocks(EXTEND, "python")
    module, registered = types.ModuleType("models.sr.youtube_dnn"), {"MODELS": dict(MODELS)}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(model, module.__dict__)
    exec(registry, registered)
    assert registered["MODELS"] == MODELS | {"youtube_dnn": module.YouTubeDNN}
    monkeypatch.setitem(MODELS, "youtube_dnn", module.YouTubeDNN)
    exec(test, module.__dict__)
    return module


def test_the_model_of_extend_trains_and_gives_its_table(youtube_dnn, sources, tmp_path):  # noqa: F811
    youtube_dnn.test_padding_changes_no_user_vector()
    flags = ["--model", "youtube_dnn", "--item_dim", 6, "--hidden_dim", 5, "--learning_rate", 1, "--warmup_steps", 1]
    step(train_sr_trad, "sr", sources, *flags, "--output_dir", tmp_path / "run")
    argv = ["--dataset", sources / "data", "--model", "youtube_dnn", "--sr_dir", tmp_path / "run"]
    argv = [*map(str, argv), "--output_dir", str(tmp_path / "table")]
    extract_emb.main(**cli.resolve(extract_emb.main, "extract", argv, models=MODELS))
    table = load_tensors(tmp_path / "table" / "item_embeddings.safetensors")["item_table"]
    assert torch.equal(table, load_tensors(tmp_path / "run" / "model.safetensors")["items.weight"])


def test_the_states_of_the_model_of_extend_are_those_of_each_history_alone(youtube_dnn):
    config = youtube_dnn.YouTubeDNN.Config(item_dim=8, hidden_dim=6)
    model = youtube_dnn.YouTubeDNN(config, make_sequences().training_part()).eval()
    histories = torch.tensor([[0, 0, 3, 1, 2], [9, 8, 7, 6, 5], [0, 0, 0, 0, 4]])
    found = model.states(histories)
    for row, history in enumerate(histories):
        own = history[history != 0]
        for t in range(len(own)):
            expected = model.network(model.items(own[: t + 1]).mean(0))
            assert torch.allclose(found[row, len(history) - len(own) + t], expected, atol=1e-6)


def test_the_recipe_of_extend_names_flags_of_its_model(youtube_dnn):
    text = blocks(EXTEND, "yaml")[0]
    flags = flags_of(train_sr_trad.main, MODELS, "youtube_dnn")
    assert set(yaml.safe_load(text)["sr"]["youtube_dnn"]) <= set(flags)


def test_the_table_of_extend_is_read(tmp_path, monkeypatch):
    run, table = (textwrap.dedent(text) for text in blocks(EXTEND, "yaml")[1:])
    place = tmp_path / "recipes" / "paper"
    place.mkdir(parents=True)
    runs = (ROOT / "recipes/paper/runs.yaml").read_text(encoding="utf-8")
    (place / "runs.yaml").write_text(runs + textwrap.indent(run, "  "), encoding="utf-8")
    (place / "relations.yaml").write_text(table, encoding="utf-8")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    forget()
    try:
        found = [(e.name, e.seed) for _, e in reproduce.read_table("relations").experiments()]
    finally:
        forget()
    assert found == [(name, seed) for seed in (42, 1, 2) for name in ("student", "student, relations")]


# --- released scripts | their flags | what became of them | here ---

FLAG_MAP = re.findall(r"^\| (.+?\.py`) \| (.+?) \| (same|renamed|fixed|dead there) \| (.+?) \|$", DIFFERENCES, re.M)


def scripts_and_flags(row: tuple[str, ...]) -> tuple[list[str], list[str]]:
    return re.findall(r"`(\w+)\.py`", row[0]), re.findall(r"`([\w-]+)`", row[1])


def test_the_map_of_released_flags_names_each_of_them_once():
    """The released parsers (commit 0555b8d) have 15, 34 and 48 flags; extract_emb.py has none."""
    named = Counter((script, flag) for row in FLAG_MAP for script, flag in product(*scripts_and_flags(row)))
    assert set(named.values()) == {1}
    assert Counter(script for script, _ in named) == {"train_sr_trad": 15, "finetune": 34, "distill": 48}


@pytest.mark.parametrize("row", FLAG_MAP, ids=lambda row: f"{row[2]}: {row[1]}")
def test_the_map_of_released_flags_leads_to_flags_that_exist(row):
    """With the values that it names; `--flag` of `script.py` is one of that script, any other one of all in its row."""
    scripts, released = scripts_and_flags(row)
    here = re.findall(r"`--(\w+) ?([\w.,]*)`(?: of `(\w+)\.py`)?", row[3])
    if row[2] == "same":
        here = [(flag, "", "") for flag in released]
    assert here or row[2] != "renamed" or "`HF_HUB_CACHE`" in row[3]
    for flag, value, only in here:
        for script in [only] if only else scripts:
            main = importlib.import_module(script).main
            flags = {name: known for model in MODELS for name, known in flags_of(main, MODELS, model).items()}
            assert flag in flags, script
            if value:
                assert coerce(f"--{flag}", value, flags[flag]) is not None
    files = re.findall(r"`([a-z_/]+\.py)`", row[3])
    assert files or row[2] != "fixed", "where it is fixed"
    assert all((ROOT / path).is_file() for path in files)


def test_the_lists_of_layers_are_those_that_the_released_interval_keeps():
    """LLaMA's 32 layers without every (n + 1)-th, by the released condition."""
    shown = dict(re.findall(r"`interval_nums` (\d): `--layer_selection ([\d,]+)`", DIFFERENCES))
    assert len(shown) == 2
    for n, layers in shown.items():
        kept = [index for index in range(32) if (index + 1) % (int(n) + 1) != 0]
        assert select_layers(len(kept), 32, layers) == kept


def test_faults_are_numbered():
    numbers = re.findall(r"^\| (\d+) \|", DIFFERENCES, re.M)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and len(numbers) == 9
