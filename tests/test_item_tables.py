"""Item tables from titles and from files, several side by side, and one that a recommender starts from."""

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sequences, sasrec
from kills import contents
from safetensors.torch import load_file, save_file
from test_interface import GRU
from test_kill import sources  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedTokenizerFast

import distill
import extract_emb
import finetune
import train_sr_trad
from models.interface import Recommender
from models.llm.storage import load_llm_rec
from models.sr import MODELS
from utils import assets, cli
from utils.catalogue import Catalogue
from utils.data import Sequences
from utils.errors import UserError
from utils.import_table import import_table
from utils.item_tables import read_tables, whiten

SECTIONS = {"train_sr_trad": "sr", "extract_emb": "extract", "finetune": "teacher", "distill": "student"}
WORDS = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", "Film", *map(str, range(1, 41))])}
SHORT = ["--max_steps", 4, "--eval_steps", 2, "--batch_size", 8]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def save_text_model(folder: Path, config: object) -> Path:
    """A tiny text model, whose tokenizer puts special tokens around a text."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel(WORDS, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def place(sources, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A checkout with the dataset `kill`, a base model, and text models in place of the one that is fetched."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    encoder = save_text_model(tmp_path / "encoder", BertConfig(vocab_size=len(WORDS), **SIZES))
    save_text_model(tmp_path / "causal", LlamaConfig(vocab_size=len(WORDS), **SIZES))
    monkeypatch.setattr(assets, "encoder_path", lambda: encoder)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr("utils.run.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script: object, *flags: object) -> None:
    argv = ["--dataset", "data", *map(str, flags)]
    section = SECTIONS.get(script.__name__)
    inherits = getattr(script, "INHERITED", ())
    cli.run(script.main, section, argv, models=MODELS if section else None, inherits=inherits)


def table_of(name: str) -> tuple[torch.Tensor, dict]:
    folder = Path("outputs/kill", name)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "item_embeddings.safetensors")["item_table"], config


def refused(capsys, words: str, script: object, *flags: object) -> None:
    """One line with `words`, exit code 2, and not a byte has changed."""
    before = contents(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        start(script, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("texts: ")]
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert contents(Path()) == before


# --- titles ---


@torch.no_grad()
def expected_rows(folder: Path, texts: list[str], special: bool, dim: int) -> np.ndarray:
    """One text at a time, and principal components by NumPy in float64."""
    model, rows = AutoModel.from_pretrained(folder).double().eval(), []
    for text in texts:
        ids = [1, *(WORDS.get(word, 0) for word in text.split()), 2]
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = np.mean(states if special else states[1:-1], axis=0)
        rows.append(mean / np.linalg.norm(mean))
    rows = np.stack(rows) - np.mean(rows, axis=0)
    u = np.linalg.svd(rows, full_matrices=False)[0][:, :dim]
    return u / np.linalg.norm(u, axis=1, keepdims=True)


@pytest.mark.parametrize("which", ["encoder", "causal"])
def test_a_table_of_titles_is_that_of_a_plain_computation(which, place, capsys):
    catalogue = place / "data" / "items.tsv"
    rows = [f"id{n}\t{'Film ' * (n % 5)}{n}" for n in range(1, 41)]
    rows[6] = "id7\t"  # no title
    rows[9] = rows[3].replace("id4", "id10")  # the title of another
    rows[11] = "id12\t" + "Film " * 300  # longer than what is read
    catalogue.write_text("\n".join(["item_id\ttitle", *rows, ""]), encoding="utf-8")
    flags = [] if which == "encoder" else ["--text_model", "causal"]
    start(extract_emb, "--text", "titles", "--pca_dim", 6, *flags)
    table, config = table_of("item_embeddings-titles")
    titles = {n: row.split("\t")[1] for n, row in enumerate(rows, 1) if n != 7}
    titles[12] = " ".join(["Film"] * 254)  # beside two special tokens
    expected = expected_rows(place / which, list(titles.values()), which == "encoder", 6)
    found = table[list(titles)].double().numpy()
    # components have no sign of their own, which dot products do not see
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)
    assert table.shape == (41, 6) and not table[[0, 7]].any() and torch.equal(table[4], table[10])
    assert (config["zero_rows"], config["titles_cut"], config["item_dim"]) == (1, 1, 6)
    assert config["text_model"] == ("all-minilm-l6-v2" if which == "encoder" else "causal")
    assert "1 items without a title have rows of zeros" in capsys.readouterr().out
    before = contents(place / "outputs")
    start(extract_emb, "--text", "titles", "--pca_dim", 6, *flags)
    assert contents(place / "outputs") == before


def test_whitened_rows_have_independent_components_of_variance_1():
    table = torch.randn(200, 7) @ torch.randn(7, 7) + 3
    table[[0, 50]] = 0
    white, share = whiten(table, 7)
    given = torch.arange(200)[(table != 0).any(dim=1)]
    rows = table[given].double().numpy()
    rows -= rows.mean(axis=0)
    distance = np.sqrt(np.einsum("nd,dk,nk->n", rows, np.linalg.inv(rows.T @ rows / len(rows)), rows))  # Mahalanobis
    gram = rows @ np.linalg.inv(rows.T @ rows / len(rows)) @ rows.T / np.outer(distance, distance)
    np.testing.assert_allclose((white[given] @ white[given].T).numpy(), gram, atol=1e-5)
    assert not white[[0, 50]].any() and share == pytest.approx(1)
    assert torch.allclose(whiten(-table, 7)[0].abs(), white.abs(), atol=1e-5)


def untitled(place: Path) -> None:
    path = place / "data" / "items.tsv"
    rows = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([rows[0], *(row.split("\t")[0] + "\t" for row in rows[1:-1]), ""]), encoding="utf-8")


def foreign(place: Path) -> None:
    (place / "outputs/kill/item_embeddings-titles").mkdir(parents=True)
    text = '{"kind": "item_embeddings", "sr_dir": "x"}'
    (place / "outputs/kill/item_embeddings-titles/config.json").write_text(text)


TITLES = {
    # name: (flags, what is done first, words of the message)
    "other text": (["--text", "prices"], None, "expected one of titles"),
    "no titles": (["--text", "titles"], untitled, "has no titles: make it again with them"),
    "fewer items": (
        ["--text", "titles"],
        lambda p: (p / "data/items.tsv").write_text("item_id\ttitle\nid1\ta\n"),
        "has 1 items, not 40",
    ),
    "no tabs": (["--text", "titles"], lambda p: (p / "data/items.tsv").write_text("item_id\nid1\n"), "is damaged"),
    "more components than titles": (["--text", "titles", "--pca_dim", 39], None, "choose at most 38"),
    "more components than states": (["--text", "titles", "--pca_dim", 17], None, "choose at most 16"),
    "equal titles": (
        ["--text", "titles", "--pca_dim", 1],
        lambda p: (p / "data/items.tsv").write_text(
            "item_id\ttitle\n" + "".join(f"id{n}\tFilm\n" for n in range(1, 41))
        ),
        "they are all the same",
    ),
    "no such model": (
        ["--text", "titles", "--pca_dim", 2, "--text_model", "/no/such"],
        None,
        "--text_model /no/such: no model found",
    ),
    "an encoder of one's own": (
        ["--text", "titles", "--pca_dim", 2, "--text_model", "encoder"],
        None,
        "not a LLaMA-like decoder",
    ),
    "a damaged encoder": (
        ["--text", "titles", "--pca_dim", 2],
        lambda p: (p / "encoder/model.safetensors").write_bytes(b"cut off"),
        "remove it, it is fetched again",
    ),
    "no tokenizer": (
        ["--text", "titles", "--pca_dim", 2],
        lambda p: [path.unlink() for path in (p / "encoder").glob("tokenizer*")],
        "its tokenizer does not know most of the words",
    ),
    "NaN in its weights": (
        ["--text", "titles", "--pca_dim", 2],
        lambda p: save_file(
            {n: v * torch.nan for n, v in load_file(p / "encoder/model.safetensors").items()},
            p / "encoder/model.safetensors",
        ),
        "hold NaN or infinity",
    ),
    "foreign tokens": (
        ["--text", "titles", "--pca_dim", 2, "--text_model", "causal"],
        lambda p: AutoModel.from_config(LlamaConfig(vocab_size=9, **SIZES)).save_pretrained(p / "causal"),
        "which its embedding lacks",
    ),
    "two sources": (
        ["--text", "titles", "--import_table", "a.npy"],
        None,
        "--text and --import_table: a table is made",
    ),
    "a run and titles": (["--text", "titles", "--sr_dir", "a"], None, "--sr_dir and --text: a table is made from one"),
    "a model's name and titles": (["--text", "titles", "--model", "gru"], None, "--model and --text"),
    "the usual model and titles": (["--text", "titles", "--model", "sasrec"], None, "--model and --text"),
    "a model without text": (["--text_model", "causal"], None, "--text_model causal is of --text alone"),
    "components of a trained table": (["--pca_dim", 4], None, "--pca_dim 4 is of --text and --import_table alone"),
    "order of titles": (["--text", "titles", "--row_order", "id"], None, "--row_order id is of --import_table alone"),
    "over a table of another kind": (["--text", "titles"], foreign, "holds a table from --sr_dir"),
    "over a run": (["--text", "titles", "--output_dir", "base"], None, "holds something else"),
}


@pytest.mark.parametrize("case", TITLES)
def test_what_is_refused_of_titles(case, place, capsys, monkeypatch):
    flags, spoil, words = TITLES[case]
    monkeypatch.setitem(MODELS, "gru", GRU)
    if spoil:
        spoil(place)
    refused(capsys, words, extract_emb, *flags)


# --- files ---


def catalogue(*ids: object) -> Catalogue:
    return Catalogue([str(name) for name in ids], [""] * len(ids), np.ones(len(ids) + 1, int))


ROWS = np.array([[1, 2.5], [0, 0], [-3, 4], [5, 1e-3]], np.float32)
LETTERS, NUMBERS, SHUFFLED = catalogue("b", "a", "d,é", "c"), catalogue(1, 2, 3, 4), catalogue(3, 0, 2, 1)
PADDED = np.concatenate([np.zeros((1, 2), np.float32), ROWS])
GAPS = np.zeros((9, 2), np.float32)  # rows of no item are zeros
GAPS[[0, 5, 8, 1]] = ROWS
OF_STEP_2 = {"item_table": torch.from_numpy(PADDED), "item_ids": torch.arange(5)}
GOOD = {
    # name: (file, what it holds, items of the dataset, --row_order)
    "rows": ("t.npy", ROWS, LETTERS, None),
    "with padding": ("t.npy", PADDED, LETTERS, None),
    "in float64, by columns": ("t.npy", np.asfortranarray(ROWS.astype(">f8")), LETTERS, None),
    "in the only order there is": ("t.npy", PADDED, NUMBERS, None),
    "numbered from 1": ("t.npy", ROWS, NUMBERS, None),
    "in the order of the dataset": ("t.npy", ROWS, SHUFFLED, "dataset"),
    "by id": ("t.npy", ROWS[[1, 3, 2, 0]], SHUFFLED, "id"),
    "by id, with gaps": ("t.npy", GAPS, catalogue(0, 5, 8, 1), None),
    "safetensors": ("t.safetensors", {"x": torch.from_numpy(ROWS).double()}, LETTERS, None),
    "of step 2": ("t.safetensors", OF_STEP_2, LETTERS, None),
    "with ids": (
        "t.safetensors",
        {"x": torch.from_numpy(ROWS[::-1].copy()), "item_ids": torch.tensor([1, 2, 0, 3])},
        SHUFFLED,
        None,
    ),
    "csv": ("t.csv", 'item_id,0,1\na,0,0\n"d,é",-3,4\nb,1,2.5\n\nc,5,1e-3\n', LETTERS, None),
    "csv without a header": ("t.csv", '\ufeffa,0,0\r\n"d,é",-3,4\r\nb, 1, 2.5\r\nc,5,1e-3\r\n', LETTERS, None),
    "csv with the id behind": ("t.csv", 'x,y,item_id\n0,0,a\n-3,4,"d,é"\n1,2.5,b\n5,1e-3,c\n', LETTERS, None),
    "csv of pandas": ("t.csv", ",0,1\n3,1,2.5\n0,0,0\n2,-3,4\n1,5,1e-3\n", SHUFFLED, None),
    "semicolons": ("t.CSV", "id;a;b\n3;1;2.5\n0;0;0\n2;-3;4\n1;5;1e-3\n", SHUFFLED, None),
    "tsv": ("t.tsv", "a\t0\t0\nd,é\t-3\t4\nb\t1\t2.5\nc\t5\t1e-3", LETTERS, None),
    "RecBole": ("t.tsv", "iid:token\temb:float_seq\na\t0 0\nd,é\t-3 4\nb\t1 2.5\nc\t5 1e-3\n", LETTERS, None),
}  # fmt: skip


def write(path: Path, held: object) -> Path:
    if isinstance(held, dict):
        save_file(held, path)
    elif isinstance(held, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, held, allow_pickle=held.dtype == object)
    else:
        path.write_bytes(held.encode() if isinstance(held, str) else held)
    return path


@pytest.mark.parametrize("case", GOOD)
def test_a_file_gives_each_item_its_row(case, tmp_path):
    name, held, items, order = GOOD[case]
    table = import_table(write(tmp_path / name, held), order, items)
    assert table.dtype == torch.float32 and not table[0].any()
    np.testing.assert_array_equal(table[1:].numpy(), ROWS)


def changed(row: int, value: float) -> np.ndarray:
    rows = ROWS.astype(np.float64)
    rows[row, 1] = value
    return rows


BAD = {
    "no file": ("t.npy", None, LETTERS, None, "no such file"),
    "a pickle": ("t.pkl", pickle.dumps(ROWS), LETTERS, None, "may run code when it is read"),
    "a checkpoint": ("t.pt", b"PK", LETTERS, None, "may run code when it is read"),
    "another format": ("t.parquet", b"PAR1", LETTERS, None, "must end in .npy, .safetensors, .csv, .tsv"),
    "a pickle in npy": ("t.npy", np.array([[1, "a"]], object), LETTERS, None, "is no array of numbers"),
    "a pickle named npy": ("t.npy", pickle.dumps(ROWS), LETTERS, None, "is no array of numbers"),
    "cut off": ("t.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", LETTERS, None, "is no array of numbers"),
    "of words": ("t.npy", np.array([["a", "b"]] * 4), LETTERS, None, "no array of real numbers"),
    "complex": ("t.npy", ROWS + 1j, LETTERS, None, "no array of real numbers"),
    "a single vector": ("t.npy", ROWS[:, 0], LETTERS, None, "shape (4,)"),
    "three axes": ("t.npy", ROWS[None], LETTERS, None, "shape (1, 4, 2)"),
    "no column": ("t.npy", ROWS[:, :0], LETTERS, None, "shape (4, 0)"),
    "no row": ("t.npy", ROWS[:0], LETTERS, None, "shape (0, 2)"),
    "too few rows": ("t.npy", ROWS[:3], LETTERS, None, "has 3 rows"),
    "a row more": ("t.npy", PADDED[::-1], LETTERS, None, "the first of them not zero"),
    "too many rows": ("t.npy", np.concatenate([PADDED, PADDED]), LETTERS, None, "has 10 rows"),
    "NaN": ("t.npy", changed(2, np.nan), LETTERS, None, "row 3 holds NaN, infinity"),
    "infinity": ("t.npy", changed(0, -np.inf), LETTERS, None, "row 1 holds NaN, infinity"),
    "beyond float32": ("t.npy", changed(3, 1e39), LETTERS, None, "row 4 holds NaN, infinity"),
    "huge": ("t.npy", changed(3, 1e30), LETTERS, None, "scale them to about 1"),
    "zeros": ("t.npy", ROWS * 0, LETTERS, None, "scale them to about 1"),
    "two orders": ("t.npy", ROWS, SHUFFLED, None, "--row_order dataset or --row_order id"),
    "by names": ("t.npy", ROWS, LETTERS, "id", "as --row_order id"),
    "a row of no item": ("t.npy", PADDED + 1, NUMBERS, "id", "row 1 belongs to no item"),
    "ids beyond the rows": ("t.npy", ROWS, catalogue(1, 2, 3, 5), "id", "as --row_order id"),
    "two tensors": ("t.safetensors", {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}, LETTERS, None, "2 tensors (a, b)"),
    "no tensor": ("t.safetensors", {"item_ids": torch.arange(4)}, LETTERS, None, "0 tensors (none)"),
    "no safetensors": ("t.safetensors", b"safe", LETTERS, None, "is damaged"),
    "one number": ("t.safetensors", {"a": torch.tensor(1.0), "item_ids": torch.arange(1)}, LETTERS, None, "one row"),
    "truth": ("t.safetensors", {"a": torch.ones(4, 2, dtype=torch.bool)}, LETTERS, None, "no real numbers"),
    "too few ids": ("t.safetensors", {"a": torch.ones(4, 2), "item_ids": torch.arange(3)}, NUMBERS, None, "not one id"),
    "ids of another dataset": (
        "t.safetensors",
        {"a": torch.ones(4, 2), "item_ids": torch.tensor([1, 2, 3, 9])},
        NUMBERS,
        None,
        "1 ids are of no item of the dataset, '9' for one",
    ),
    "order of ids": ("t.csv", "3,1,2\n0,0,0\n2,3,4\n1,5,6\n", SHUFFLED, "id", "which say what its rows stand for"),
    "empty": ("t.csv", "", LETTERS, None, "no tab, comma or semicolon"),
    "row numbers of pandas": ("t.csv", ",item_id,x\n0,a,1\n1,b,2\n2,c,3\n", LETTERS, None, "are both of ids"),
    "row numbers before id": ("t.csv", ",id,x\n0,a,1\n1,b,2\n2,c,3\n", LETTERS, None, "are both of ids"),
    "header alone": ("t.csv", "item_id,a,b\n", LETTERS, None, "no row of numbers"),
    "latin-1": ("t.tsv", "é\t1\n".encode("latin-1"), LETTERS, None, "cannot be read as UTF-8"),
    "an open quote": ("t.csv", 'a,1\n"b,1\nc,1\n', LETTERS, None, "cannot be read as UTF-8 text"),
    "unknown id": ("t.tsv", "a\t1\nb\t2\nc\t1\nd,é\t2\ne\t3\n", LETTERS, None, "'e' for one"),
    "unknown id first": ("t.tsv", "x\t1\na\t1\nb\t2\nc\t1\nd,é\t2\n", LETTERS, None, "'x' for one"),
    "an item twice": ("t.tsv", "a\t1\nb\t2\nc\t1\nd,é\t2\nc\t3\n", LETTERS, None, "'c' has 2 rows"),
    "an item is missing": ("t.tsv", "a\t1\nb\t2\nd,é\t2\n", LETTERS, None, "1 items have no row, 'c' for one"),
    "no number": ("t.csv", "a,1\nb,one\n", LETTERS, None, "line 2: could not convert"),
    "another width": ("t.csv", "a,1,2\nb,1\n", LETTERS, None, "line 2: 1 numbers, but 2 in the first row"),
    "no numbers": ("t.csv", "a,\nb,\n", LETTERS, None, "shape (2, 0)"),
    "a gap": ("t.csv", "a,1,2\nb,,1\nc,1,\n", LETTERS, None, "line 2: a cell is empty"),
    "a gap in each row": ("t.csv", "a,1,,2\nb,,1,3\nc,1,2,\n", LETTERS, None, "line 1: a cell is empty"),
    "a column of nothing": ("t.csv", "item_id,x,y\na,1,\nb,2,\nc,3,\n", LETTERS, None, "line 2: a cell is empty"),
    "a row too short": ("t.csv", "a,1,2\nb,1\nc,1,2\n", LETTERS, None, "line 2: 1 numbers"),
    "nan in text": ("t.csv", "a,1\nb,nan\nc,1\n", LETTERS, None, "row 2 holds NaN"),
    "commas alone": ("t.csv", "a,1\n,\nb,2\n", LETTERS, None, "line 2: a cell is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused(case, tmp_path):
    name, held, items, order, words = BAD[case]
    path = tmp_path / name
    if held is not None:
        write(path, held)
    with pytest.raises(UserError) as error:
        import_table(path, order, items)
    assert words in str(error.value)


def test_an_imported_table_stands_in_a_folder_of_its_name(place, capsys):
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    rows[3] = 0
    np.save("mine.npy", rows)
    start(extract_emb, "--import_table", "mine.npy")
    table, config = table_of("item_embeddings-mine")
    np.testing.assert_array_equal(table[1:].numpy(), rows)
    assert config["import_table"] == "mine.npy" and config["zero_rows"] == 1 and config["item_dim"] == 5
    assert "1 items without numbers have rows of zeros" in capsys.readouterr().out
    start(extract_emb, "--import_table", "mine.npy", "--pca_dim", 3)
    table, _ = table_of("item_embeddings-mine")
    assert torch.equal(table, whiten(torch.from_numpy(np.pad(rows, ((1, 0), (0, 0)))), 3)[0])
    assert "is replaced" not in capsys.readouterr().err
    Path("other").mkdir()
    shutil.copy("mine.npy", "other/mine.npy")
    start(extract_emb, "--import_table", "other/mine.npy")
    assert (
        "held a table made from mine.npy, which is replaced; another --output_dir keeps both" in capsys.readouterr().err
    )
    shutil.copy("mine.npy", "my table.npy")
    refused(capsys, "give one with --output_dir", extract_emb, "--import_table", "my table.npy")
    start(extract_emb, "--import_table", "my table.npy", "--output_dir", "outputs/kill/item_embeddings-spaces")
    shutil.copy("mine.npy", "titles.npy")
    start(extract_emb, "--text", "titles", "--pca_dim", 2)
    refused(capsys, "holds a table from --text", extract_emb, "--import_table", "titles.npy")
    mine = "outputs/kill/item_embeddings-mine"
    again = ["--import_table", f"{mine}/item_embeddings.safetensors", "--row_order", "dataset", "--output_dir", mine]
    refused(capsys, "which is to be replaced; choose another place", extract_emb, *again)


# --- several tables ---


def put(name: str, table: torch.Tensor) -> None:
    """A table by the way of a file; row 0 is the padding's."""
    np.save(f"{name}.npy", table[1:].numpy())
    start(extract_emb, "--import_table", f"{name}.npy")


@pytest.fixture
def tables(place) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    made = {"a": torch.randn(41, 8) * 3, "b": torch.randn(41, 5) / 50}
    for name, table in made.items():
        table[0] = 0
        table[[5, 6] if name == "b" else [6]] = 0
        put(name, table)
    return made


BOTH = "item_embeddings-a, outputs/kill/item_embeddings-b"  # a name and a path


def test_each_of_several_tables_is_normalized_by_itself(tables):
    """A row of zeros in one of them stays: nothing is known of that item there."""
    data = Sequences.load(Path("data"))
    names = ",".join(f"item_embeddings-{name}" for name in "ab")
    found, config = read_tables("--item_embeddings", names, data, normalize=True)
    low = 0
    for name in "ab":
        rows = tables[name].double().numpy()
        known = np.linalg.norm(rows, axis=1) > 0
        centred = rows - rows[known].mean(0)
        want = centred / np.linalg.norm(centred, axis=1, keepdims=True) * known[:, None]
        np.testing.assert_allclose(found[:, low : low + rows.shape[1]].numpy(), want, atol=1e-5)
        low += rows.shape[1]
    assert config["table_scales"] == pytest.approx([1, 1])


def test_several_tables_stand_side_by_side_at_one_scale(tables, place, capsys, monkeypatch):
    base = ["--base_model", "base", "--num_layers", 2, "--lora_r", 2, *SHORT]
    start(finetune, *base, "--item_embeddings", BOTH, "--output_dir", "outputs/kill/teacher-ab")
    config = json.loads(Path("outputs/kill/teacher-ab/config.json").read_text())
    of = [table_of(f"item_embeddings-{name}")[1] for name in "ab"]
    assert config["item_embeddings"] == "outputs/kill/item_embeddings-a,outputs/kill/item_embeddings-b"
    assert config["table_sha256"] == ",".join(one["table_sha256"] for one in of) and config["item_dim"] == 13
    a, b = (tables[name].double().numpy() for name in "ab")
    means = [np.mean([norm for norm in np.linalg.norm(rows[1:], axis=1) if norm]) for rows in (a, b)]
    assert config["table_scales"] == pytest.approx([1, means[0] / means[1]]) and config["table_dims"] == [8, 5]
    teacher = load_llm_rec("outputs/kill/teacher-ab")
    np.testing.assert_allclose(teacher.table[:, :8].numpy(), a, rtol=1e-6)
    np.testing.assert_allclose(teacher.table[:, 8:].numpy(), b * means[0] / means[1], rtol=1e-5)
    assert not teacher.table[6].any() and not teacher.table[5, 8:].any() and teacher.table[5, :8].any()
    histories = torch.tensor([[0, 1, 2], [3, 5, 6]])
    with torch.no_grad():
        vectors, scores = teacher.user_vectors(histories).double().numpy(), teacher.scores(histories).numpy()
    expected = vectors[:, :8] @ a.T + vectors[:, 8:] @ b.T * means[0] / means[1]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)

    student = ["--teacher", "outputs/kill/teacher-ab", "--num_layers", 1, "--num_blocks", 1, "--lambda_ms", 0]
    start(distill, *student, *SHORT, "--output_dir", "outputs/kill/student-ab")
    config = json.loads(Path("outputs/kill/student-ab/config.json").read_text())
    assert config["item_dim"] == 13 and config["table_sha256"] == ",".join(one["table_sha256"] for one in of)
    assert torch.equal(load_llm_rec("outputs/kill/student-ab").table, teacher.table)
    out = capsys.readouterr().out.rpartition("| test users")[2]
    assert "Teacher-2 (teacher-ab)" in out and "(student-ab)" in out
    assert json.loads(Path("outputs/kill/teacher-ab/config.json").read_text())["table_dims"] == [8, 5]

    again = [*base, "--output_dir", "outputs/kill/teacher-ab", "--resume", "auto", "--item_embeddings"]
    refused(capsys, "holds a run with item_embeddings=", finetune, *again, "item_embeddings-a")


def test_a_table_of_titles_trains_a_teacher(place, capsys):
    start(extract_emb, "--text", "titles", "--pca_dim", 4)
    base = ["--base_model", "base", "--num_layers", 1, "--lora_r", 2, *SHORT]
    start(finetune, *base, "--item_embeddings", "item_embeddings-titles", "--output_dir", "outputs/kill/by-titles")
    assert "Teacher-1 (by-titles)" in capsys.readouterr().out
    assert torch.equal(load_llm_rec("outputs/kill/by-titles").table, table_of("item_embeddings-titles")[0])


def edit(path: str, **changes) -> None:
    held = Path("outputs/kill", path, "config.json")
    held.write_text(json.dumps(json.loads(held.read_text()) | changes))


def anew(place: Path, table: torch.Tensor) -> None:
    """Table b written anew in full, with its hash."""
    folder = place / "outputs/kill/item_embeddings-b"
    save_file({"item_table": table}, folder / "item_embeddings.safetensors")
    edit("item_embeddings-b", table_sha256=extract_emb.sha256(folder / "item_embeddings.safetensors"))


SIDE_BY_SIDE = {
    "one twice": ("item_embeddings-a,outputs/kill/../kill/item_embeddings-a", None, "is the same table as"),
    "a copy": (
        "item_embeddings-a,copy",
        lambda p: shutil.copytree(p / "outputs/kill/item_embeddings-a", p / "copy"),
        "copy is the same table as",
    ),
    "one is missing": ("item_embeddings-a,item_embeddings-c", None, "item_embeddings-c is no table, nor is there one"),
    "nothing behind the comma": ("item_embeddings-a,", None, "a name is missing beside a comma"),
    "commas alone": (",", None, "a name is missing beside a comma"),
    "of another dataset": (
        BOTH,
        lambda p: edit("item_embeddings-b", dataset_fingerprint="x"),
        "item_embeddings-b was made from another dataset",
    ),
    "no table": ("item_embeddings-a,base", None, "base was not written by extract_emb.py"),
    "another number of rows": (BOTH, lambda p: anew(p, torch.ones(40, 5)), "is (40, 5), not 41 x 5"),
    "no matrix": (BOTH, lambda p: anew(p, torch.ones(41)), "is (41,), not 41 x 5"),
    "not a number": (
        BOTH,
        lambda p: anew(p, torch.full((41, 5), torch.nan)),
        "holds NaN",
    ),
    "whole numbers": (BOTH, lambda p: anew(p, torch.ones(41, 5, dtype=torch.int64)), "no finite"),
    "changed since": (BOTH, lambda p: edit("item_embeddings-b", table_sha256="x"), "changed since"),
}


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_tables_that_do_not_go_together_are_refused(case, tables, place, capsys):
    names, spoil, words = SIDE_BY_SIDE[case]
    if spoil:
        spoil(place)
    refused(capsys, words, finetune, "--base_model", "base", "--num_layers", 1, "--item_embeddings", names)


def test_the_folder_of_a_single_table_may_have_a_comma_in_its_name(tables, place):
    shutil.move("outputs/kill/item_embeddings-a", "a,b")
    base = ["--base_model", "base", "--num_layers", 1, "--lora_r", 2, *SHORT]
    start(finetune, *base, "--item_embeddings", "a,b", "--output_dir", "run")
    assert torch.equal(load_llm_rec("run").table, tables["a"])
    config = json.loads(Path("run/config.json").read_text())
    assert config["item_embeddings"] == "a,b" and "table_scales" not in config


# --- the start of a recommender ---


@pytest.mark.parametrize("kind", ["sasrec", "gru"])
def test_a_recommender_starts_from_a_table_at_its_own_scale(kind):
    data = make_sequences()

    def fresh() -> Recommender:
        torch.manual_seed(0)
        return sasrec(data) if kind == "sasrec" else GRU(GRU.Config(width=16), data.training_part())

    rows = torch.randn(41, 16) * 7
    rows[[4, 9]] = 0
    plain, model = fresh(), fresh()
    model.init_items(rows)
    own = plain.item_table().detach().double().numpy()
    scale = np.sqrt(np.mean(own[1:] ** 2)) / np.sqrt(np.mean(np.delete(rows.double().numpy(), [0, 4, 9], axis=0) ** 2))
    expected = rows.double().numpy() * scale
    expected[[0, 4, 9]] = own[[0, 4, 9]]
    np.testing.assert_allclose(model.item_table().detach().numpy(), expected, rtol=1e-5)
    others = [name for name, value in plain.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert others == ["items.weight"]


class Computed(GRU):
    """Its item vectors are computed from its table."""

    @dataclass(frozen=True)
    class Config(GRU.Config):
        pass

    def item_vectors(self):
        return self.items.weight * 2


@pytest.mark.parametrize(
    ("model", "width", "words"),
    [
        ("sasrec", ["--item_dim", 8], "its table has width 5, the model's 8"),
        ("gru", ["--width", 4], "its table has width 5, the model's 4"),
        ("computed", ["--width", 5], "the item table of Computed is computed"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(model, width, words, tables, capsys, monkeypatch):
    for name, kind in (("gru", GRU), ("computed", Computed)):
        monkeypatch.setitem(MODELS, name, kind)
    refused(capsys, words, train_sr_trad, "--model", model, *width, "--init_items", "item_embeddings-b")


def test_a_run_from_a_table_records_it_and_goes_on_with_no_other(tables, place, capsys):
    flags = ["--item_dim", 8, "--num_layers", 1, *SHORT, "--learning_rate", "1e-12", "--output_dir", "run"]
    start(train_sr_trad, *flags, "--init_items", "item_embeddings-a")
    config, table = json.loads(Path("run/config.json").read_text()), tables["a"]
    assert config["init_items"] == "outputs/kill/item_embeddings-a"
    assert config["init_items_sha256"] == table_of("item_embeddings-a")[1]["table_sha256"]
    trained = load_file("run/model.safetensors")["items.weight"]
    cosine = torch.cosine_similarity(trained, table)
    assert (cosine[(table != 0).any(dim=1)] > 0.9999).all()  # at that learning rate nothing moves
    refused(capsys, "run with init_items=", train_sr_trad, *flags, "--resume", "auto")
    put("a", table + torch.eye(41, 8))
    again = [*flags, "--init_items", "item_embeddings-a", "--resume", "auto"]
    refused(capsys, "run with init_items_sha256=", train_sr_trad, *again)
    edit("item_embeddings-a", dataset_fingerprint="x")
    refused(capsys, "made from another dataset", train_sr_trad, *again)
    refused(capsys, "a,b is no table", train_sr_trad, *flags, "--init_items", "a,b")
