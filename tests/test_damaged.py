"""Files that another program, a broken disk or a bored colleague left: one line, never a traceback, never a hang."""

import csv
import io
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences, sasrec, tiny_llm_rec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import recommend
from models.llm.storage import save_adapter
from models.llm.teacher_states import is_whole
from models.sr import MODELS
from utils import checked, cli, recipes
from utils.checked import fingerprint_of, load_tensors, read_array, read_json, read_yaml
from utils.data import Sequences
from utils.errors import RunError, UserError
from utils.files import sha256, write_json
from utils.flags import FLAGS, Flag, alternatives, choices, coerce
from utils.run_files import CONFIG, TYPES, read_config, read_metrics, read_state

# The same inputs each time, and no file of those that failed: a test that fails tells of a change.
MANY = settings(
    max_examples=860, deadline=5000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ODD = JSON | st.sampled_from([10**30, -1, 1e308, float("inf"), float("nan"), "2", True, [], {}, "x" * 10_000])


def answer(read, *args):
    """What a reader gives, None where it refuses in one line of a length that people read."""
    try:
        return read(*args)
    except UserError as error:
        assert 10 < len(" ".join(str(error).split())) < 1500, str(error)[:200]
        return None


# --- any bytes ---


def bitten(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with a part overwritten, cut off, or repeated."""
    place = st.integers(0, len(whole))
    return st.one_of(
        st.binary(max_size=200),
        st.builds(lambda at, new: whole[:at] + new + whole[at + len(new) :], place, st.binary(min_size=1, max_size=9)),
        st.builds(lambda at: whole[:at], place),
        st.builds(lambda at, n: whole[:at] + whole[at : at + n] * 3 + whole[at + n :], place, st.integers(1, 40)),
    )


def saved_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(12, dtype=np.int32))
    return file.getvalue()


TENSORS = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)})
CONFIG_TEXT = json.dumps({"kind": "sr", "num_layers": 2, "base_shape": {"model_type": "llama", "hidden_size": 8}})
YAML_TEXT = "data: {seed: 3}\nsr:\n  sasrec: &a {num_layers: 2}\n  gru4rec: {<<: *a, dropout: .1}\nteacher: {}\n"


@pytest.mark.parametrize(
    ("name", "whole", "read"),
    [
        ("a.json", CONFIG_TEXT.encode(), lambda path: read_json(path, "it is missing")),
        ("config.json", CONFIG_TEXT.encode(), lambda path: read_config(path.parent)),
        ("a.yaml", YAML_TEXT.encode(), read_yaml),
        ("recipe.yaml", YAML_TEXT.encode(), recipes.read_recipe),
        ("a.npy", saved_array(), read_array),
        ("a.safetensors", TENSORS, load_tensors),
    ],
    ids=["json", "config", "yaml", "recipe", "npy", "safetensors"],
)
def test_any_bytes_are_read_or_refused(name, whole, read, tmp_path):
    path = tmp_path / name
    path.write_bytes(whole)
    assert answer(read, path) is not None

    @MANY
    @given(bitten(whole))
    def some(contents):
        path.write_bytes(contents)
        answer(read, path)

    some()


# --- configurations ---


@pytest.mark.parametrize(("read", "name"), [(read_config, "config"), (read_metrics, "metrics"), (read_state, "state")])
def test_any_value_is_taken_or_refused(read, name, tmp_path):
    @MANY
    @given(st.dictionaries(st.sampled_from([*CONFIG, "valid", "test", "evaluations", "step", "seconds"]), ODD))
    def some(values):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        found = answer(read, tmp_path)
        assert found is None or found == values

    some()


@pytest.fixture
def run(tmp_path):
    """A finished run of a tiny SASRec."""
    data = make_sequences()
    small = {"item_dim": 16, "max_seq_length": 30, "num_layers": 2, "num_heads": 2, "dropout": 0.5, "loss": None}
    small |= {"num_negatives": 0, "calibration": None, "scale_items": False}
    save_file(sasrec(data).state_dict(), tmp_path / "model.safetensors")
    config = small | {"kind": "sr", "model": "sasrec", "title": "SASRec", "dataset": "d", "num_users": 60}
    config |= {"run_id": "r", "dataset_fingerprint": data.fingerprint, "dtype": "float32", "eval_batch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.json").write_text(json.dumps({"run_id": "r", "test": {"sampled": {}}, "valid": {}}))
    recommend.Catalogue.of(data).save(tmp_path)
    return tmp_path


def test_a_run_with_any_flag_changed_recommends_or_says_why_not(run):
    config = json.loads((run / "config.json").read_text())
    assert recommend.load(run).recommend([["1", "2"]], 3)[0].items

    @settings(MANY, max_examples=600)
    @given(st.sampled_from(sorted(config)), ODD | st.just("left out"))
    def some(name, value):
        changed = {key: entry for key, entry in config.items() if key != name or value != "left out"}
        changed |= {name: value} if value != "left out" else {}
        (run / "config.json").write_text(json.dumps(changed))
        found = answer(lambda: recommend.load(run).recommend([["1", "2"]], 3))
        assert found is None or found[0].items

    some()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": "2"}, "num_layers is '2', expected a whole number >= 1"),
        ({"num_layers": True}, "num_layers is True"),
        ({"max_seq_length": None}, "max_seq_length is None"),
        ({"base_shape": []}, "base_shape is list of 0, expected an object"),
        ({"base_shape": {"hidden_size": "8"}}, "base_shape.hidden_size is '8'"),
        ({"read_out": "items"}, "read_out is 'items', expected one of response, item"),
        ({"dropout": 1.5}, "dropout is 1.5, expected a number 0..1"),
        ({"scale_items": "no"}, "scale_items is 'no', expected true or false"),
        ({"model": "transformer"}, "model 'transformer' is not known"),
        ({"num_users": 0}, "num_users is 0"),
        ({"run_id": {}}, "run_id is FromFile of 0, expected text"),
    ],
)
def test_a_flag_that_no_command_line_would_take_is_named(run, change, words):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words.replace("FromFile", ".*")):
        recommend.load(run)


def test_the_types_of_flags_are_those_of_the_scripts():
    """utils/run_files.py may not import the scripts, and says again what their signatures say."""
    import distill
    import finetune
    import train_open_p5
    import train_sr_trad

    seen = set()
    for script in (train_sr_trad, finetune, distill, train_open_p5):
        for name, of in script.main.__annotations__.items():
            if name not in TYPES:
                continue
            seen.add(name)
            ours, theirs = (
                {option for option in alternatives(kind) if option is not type(None)} for kind in (TYPES[name], of)
            )
            assert choices(TYPES[name]) == choices(of) and (choices(of) or ours == theirs), (script.__name__, name)
    assert seen | {"eval_batch_size"} >= {name for name in TYPES if name in FLAGS} - {"sr_dir"}


def test_items_that_occur_without_end_take_no_memory(run):
    rows = [json.loads(line) | {"count": 2**62} for line in (run / "items.jsonl").read_text().splitlines()]
    (run / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert recommend.load(run).recommend([["1", "2"]], 3)[0].items


def test_weights_that_are_no_numbers_recommend_nothing(run):
    weights = load_tensors(run / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, run / "model.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        recommend.load(run)
    save_file({name: torch.full_like(value, 3e38) for name, value in weights.items()}, run / "model.safetensors")
    with pytest.raises(RunError, match="scores are no numbers"):
        recommend.load(run).recommend([["1", "2"]], 3)
    save_file({name: value.to(torch.int64) for name, value in weights.items()}, run / "model.safetensors")
    with pytest.raises(UserError, match="do not fit its flags"):
        recommend.load(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: np.save(path, np.zeros((4, 3), ">f4")),
        lambda path: np.save(path, np.zeros((4, 3))),
        lambda path: np.save(path, np.zeros((3, 3), np.float32)),
        lambda path: np.save(path, np.array([[{}] * 3] * 4)),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b""),
    ],
)
def test_answers_of_a_teacher_that_are_damaged_are_computed_anew(damage, tmp_path):
    """Also where the hash beside them is that of the damaged file."""
    path, of = tmp_path / "a.npy", (np.dtype(np.float32), (4, 3))
    np.save(path, np.zeros((4, 3), np.float32))
    path.with_suffix(".sha256").write_text(sha256(path))
    assert is_whole(path, *of)
    damage(path)
    path.with_suffix(".sha256").write_text(sha256(path))
    assert not is_whole(path, *of)
    for digest in (b"\xff\xfe", b""):
        path.with_suffix(".sha256").write_bytes(digest)
        assert not is_whole(path, *of)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"a\.npy is no plain file"):
        is_whole(path, *of)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_never_replaced(kind, tmp_path):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = path.stat().st_mode
    with pytest.raises(UserError, match="is no plain file"):
        write_json({}, path)
    assert path.stat().st_mode == before


def test_offsets_that_overflow_are_refused(tmp_path):
    data = make_sequences()
    items, offsets = data.items, np.array([0, 2**62 + 10, -(2**62) - 10, len(data.items)])
    info = {"name": "d", "items": data.num_items, "fingerprint": fingerprint_of(items, offsets, data.num_items)}
    np.save(tmp_path / "items.npy", items), np.save(tmp_path / "offsets.npy", offsets)
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"offsets\.npy does not fit"):
        Sequences.load(tmp_path)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (10**400, int, "at most 64 bits"),
        ("9" * 5000, int, "expected a whole number"),
        pytest.param(10**5000, float, "expected a number", id="long"),
        ("nan", float, "at most 64 bits"),
        ("a\0b", str, "no path or name"),
    ],
)
def test_values_that_no_flag_can_hold(value, annotation, words):
    with pytest.raises(UserError, match=words) as refused:
        coerce("--flag", value, Flag(annotation, None, "", ">= 0"))
    assert len(str(refused.value)) < 200


# --- what is no plain file, or has no end ---


def readers():
    missing = "it is missing"
    return [
        ("config.json", lambda path: read_json(path, missing)),
        ("r.yaml", recipes.read_recipe),
        ("items.npy", read_array),
        ("a.safetensors", load_tensors),
        ("items.jsonl", lambda path: recommend.Catalogue.load(path.parent)),
    ]


@pytest.mark.parametrize(("name", "read"), readers())
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge"])
def test_what_is_no_plain_file_is_refused_at_once(name, read, kind, tmp_path):
    path, begun = tmp_path / name, time.monotonic()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(2**40)
    with pytest.raises(UserError) as refused:
        read(path)
    assert time.monotonic() - begun < 5 and name in str(refused.value)


@pytest.mark.parametrize(("name", "read"), readers())
def test_a_file_of_another_user_is_not_called_damaged_or_missing(name, read):
    with tempfile.TemporaryDirectory() as folder:
        path, user = Path(folder) / name, os.geteuid()
        path.write_text("{}")
        with suppress(UserError):  # what the reader imports
            read(path)
        Path(folder).chmod(0o755)
        path.chmod(0 if user else 0o600)
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(UserError, match=f"{name} may not be read"):
                read(path)
        finally:
            os.seteuid(user)


BOMB = "\n".join(["a: &a0 [x, x]", *(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9))])
MERGES = "\n".join(["a: &a0 {x: 1}", *(f"b{n}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}" for n in range(9))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is no YAML"),
        ("{a: " * 100_000, "is no YAML"),
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("1: 2", "1 is no text"),
        ("sr: {3: 2}", "3 is no text"),
        ("sr: {true: 2}", "true is no text"),
        ("? [a, b]\n: c", "no text"),
        ("sr: 2024-99-99", "is no YAML"),
        ("sr: !!python/object:os.system x", "is no YAML"),
        ("- sr", "expected name: value lines"),
        ("sr: {seed: 1, seed: 2}", "stands twice"),
        ("sr: \x00", "is no YAML"),
        ('sr: {seed: !!int ""}', "is no YAML"),
        ('sr: {dropout: !!float "-"}', "is no YAML"),
    ],
)
def test_recipes_that_are_none(text, words, tmp_path):
    path, begun = tmp_path / "r.yaml", time.monotonic()
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        recipes.read_recipe(path)
    path.write_bytes("sr: {title: Küche}".encode("latin-1"))
    with pytest.raises(UserError, match=r"r\.yaml cannot be read"):
        recipes.read_recipe(path)
    assert time.monotonic() - begun < 5


def test_json_that_is_nested_without_end_or_holds_no_number(tmp_path):
    path = tmp_path / "a.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": NaN}', '{"a": -Infinity}', '{"a": ' + "9" * 10_000 + "}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json cannot be read"):
            read_json(path, "it is missing")
    path.write_text('{"weight": 1e999, "num_layers": 3}')
    with pytest.raises(UserError, match="weight is inf, expected a number"):
        checked.read_json(path, "it is missing", CONFIG)


# --- a whole run: what is left of a checkpoint ---


def test_a_checkpoint_of_another_run_or_beyond_the_end_is_refused(tmp_path, monkeypatch):
    from conftest import tiny_sources

    import train_sr_trad

    place = tiny_sources(tmp_path)
    words = ["--dataset", str(place / "data"), "--output_dir", str(tmp_path / "run"), "--max_steps", "6"]
    words += ["--eval_steps", "2", "--item_dim", "8", "--num_layers", "1", "--resume", "auto", "--batch_size", "8"]

    def train() -> None:
        train_sr_trad.main(**cli.resolve(train_sr_trad.main, "sr", words, models=MODELS))

    from utils.run import Run

    kept = Run.finish
    monkeypatch.setattr(Run, "finish", lambda *args, **more: 1 / 0)  # as if it were killed before its last files
    with pytest.raises(ZeroDivisionError):
        train()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    text, state = (saved / "state.json").read_text(), json.loads((saved / "state.json").read_text())
    weights = (saved / "model.safetensors").read_bytes()
    beyond = (
        {"step": 10**6},
        {"step": "6"},
        {"step": -1},
        {"best_step": 7},
        {"best_step": 0},
        {"evaluations": [3]},
        {"starts": {}},
    )
    beyond += ({"evaluated": 10**6}, {"step": 4}, {"starts": [{"step": 0, "micro_batch_size": -2}]})
    for change in (*beyond, {"evaluations": []}, {"train_seconds": None}):
        (saved / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=rf"{saved.name}"):
            train()
    (saved / "state.json").write_text(text)
    tensors = load_tensors(saved / "model.safetensors")
    for broken in ({"items.weight": torch.ones(3, 8)}, {"norm.bias": torch.ones(9)}):
        save_file(tensors | broken, saved / "model.safetensors")
        with pytest.raises(UserError, match=r"step-\d+ does not belong to this run"):
            train()
    (saved / "model.safetensors").write_bytes(weights)
    moments = (saved / "optimizer.safetensors").read_bytes()
    tensors = load_tensors(saved / "optimizer.safetensors")
    for broken in ({"exp_avg.norm.bias": torch.ones(8, dtype=torch.int64)}, {"step.norm.bias": torch.tensor(-1.0)}):
        save_file(tensors | broken, saved / "optimizer.safetensors")
        with pytest.raises(UserError, match=rf"{saved.name}"):
            train()
    save_file({k: v for k, v in tensors.items() if k != "exp_avg_sq.norm.bias"}, saved / "optimizer.safetensors")
    with pytest.raises(UserError, match="has no 'exp_avg_sq'"):
        train()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:9])
        with pytest.raises(UserError, match=rf"{saved.name}/{name} .*; remove .*{saved.name}, or pass --resume never"):
            train()
        (saved / name).write_bytes(moments if name == "optimizer.safetensors" else whole)
    (tmp_path / "run" / ".state.json.part").write_text("a stray file")
    (saved / "state.json.part").write_text("another")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('[1]\n"step"\n{"step": "4"}\n{"step": 1, "loss": "x"}\n{"step": 2, "loss": 1e400}\n')
        log.write('{"step": 3, "valid": {}}\n{"step": 4, "valid": 3}\n{"loss": 3}\n{"st')
    monkeypatch.setattr(Run, "finish", kept)
    train()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 6
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": "1"}))
    with pytest.raises(UserError, match="holds a run with num_layers"):
        train()
    words[words.index("auto")] = "never"  # what is to be replaced may hold anything
    train()
    assert read_config(tmp_path / "run")["num_layers"] == 1


def test_a_disk_that_is_full_when_peft_saves_is_told(tmp_path):
    resource = pytest.importorskip("resource")
    decoder, before = tiny_llm_rec().decoder, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))  # PEFT's card, its first file, is shorter
    try:
        with pytest.raises(UserError, match=r"adapter cannot be written: .*free space"):
            save_adapter(decoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- histories ---


@MANY
@given(st.lists(st.lists(st.text("abc1, \";\n\r\u2028'", max_size=6), max_size=4), max_size=5))
def test_every_history_that_is_written_is_read(tmp_path_factory, histories):
    path = tmp_path_factory.getbasetemp() / "histories"
    (path.with_suffix(".jsonl")).write_text("".join(json.dumps({"history": h}) + "\n" for h in histories), "utf-8")
    assert list(recommend.read_histories(str(path.with_suffix(".jsonl")))) == histories
    with open(path.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([cell.strip() for cell in history] for history in histories)
    expected = [[cell.strip() for cell in history if cell.strip()] for history in histories]
    assert list(recommend.read_histories(str(path.with_suffix(".csv")))) == expected


@MANY
@given(st.binary(max_size=60) | st.text("[]{}\"',:;history01\n\\", max_size=60).map(str.encode), st.sampled_from("jc"))
def test_any_bytes_are_histories_or_refused(tmp_path_factory, contents, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{'jsonl' if kind == 'j' else 'csv'}"
    path.write_bytes(contents)
    found = answer(lambda: list(recommend.read_histories(str(path))))
    if found is not None and kind == "j":  # every line is a history
        assert len(found) == sum(bool(line.strip()) for line in contents.decode("utf-8-sig").split("\n"))
