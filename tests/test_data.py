"""Sequences, splits, training examples, batches; making and reading dataset folders."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from conftest import make_sequences
from test_process import process

from utils.catalogue import Catalogue
from utils.checked import fingerprint_of
from utils.data import (
    Sequences,
    shuffled_batches,
    sorted_batches,
    split_examples,
    training_examples,
    visited_examples,
)
from utils.errors import UserError


def users(data: Sequences) -> list[list[int]]:
    return [data.items[data.offsets[u] : data.offsets[u + 1]].tolist() for u in data.users]


def pairs(data: Sequences, examples) -> list[tuple[tuple[int, ...], int]]:
    """(history, target) of every asked target, read off the batches."""
    found = []
    for index in sorted_batches(examples.lengths, 7):
        batch = examples.batch(index)
        for history, targets in zip(batch["histories"].tolist(), batch["targets"].tolist(), strict=True):
            for t, target in enumerate(targets):
                if target:
                    found.append((tuple(i for i in history[: t + 1] if i), target))
    return sorted(found)


def test_leave_one_out_against_a_naive_loop(sequences):
    for split, cut in (("valid", 2), ("test", 1)):
        naive = sorted((tuple(s[:-cut][-5:]), s[-cut]) for s in users(sequences))
        assert pairs(sequences, split_examples(sequences, split, 5)) == naive


@pytest.mark.parametrize("train_targets", ["last", "all", "1", "3", "100"])
def test_training_targets_against_a_naive_loop(sequences, train_targets):
    limit, naive = 5, []
    for sequence in users(sequences):
        train = sequence[:-2]
        places = list(range(1, len(train)))
        places = places if train_targets == "all" else places[-int(train_targets.replace("last", "1")) :]
        for t in places:
            window = (len(train) - 1 - t) // limit  # counted from the newest target
            start = max(0, len(train) - 1 - (window + 1) * limit)
            naive.append((tuple(train[start:t]), train[t]))
    assert pairs(sequences, training_examples(sequences, train_targets, limit)) == sorted(naive)


def test_released_protocol_is_one_example_a_user_with_the_newest_history(sequences):
    examples = training_examples(sequences, "last", 4)
    expected = sorted((tuple(s[:-3][-4:]), s[-3]) for s in users(sequences) if len(s) > 3)
    assert pairs(sequences, examples) == expected and (examples.num_targets == 1).all()


def test_held_out_items_never_train():
    """The last two items of a user appear in no history and no target."""
    data = make_sequences(users=20, num_items=400, low=5, high=12)
    held = {(u, item) for u, s in enumerate(users(data)) for item in s[-2:]}
    examples = training_examples(data, "all", 50)
    assert len(examples) == 20
    for i in range(20):
        batch = examples.batch(np.array([i]))
        touched = set(batch["histories"].flatten().tolist()) | set(batch["targets"].flatten().tolist())
        assert not {item for user, item in held if user == i} & touched


def test_training_counts(sequences):
    naive = np.zeros(sequences.num_items + 1, int)
    for s in users(sequences):
        for item in s[:-2]:
            naive[item] += 1
    assert (sequences.training_part().counts() == naive).all()


def test_target_rows_follow_the_batches(sequences):
    examples = training_examples(sequences, "3", 5)
    rows = np.arange(examples.num_targets.sum())
    everything = np.concatenate(
        [examples.batch(np.array([i]))["targets"].numpy().ravel() for i in range(len(examples))]
    )
    flat = everything[everything != 0]
    index = np.array([5, 0, 17])
    targets = examples.batch(index)["targets"].numpy()
    assert (flat[rows[examples.target_rows(index)]] == targets[targets != 0]).all()


def test_batches_hold_every_example_once_and_depend_on_seed_and_epoch_only():
    batches = shuffled_batches(1000, 16, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1000)) and [len(b) for b in batches] == [16] * 62 + [8]
    again = shuffled_batches(1000, 16, seed=1, epoch=0)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    for other in (shuffled_batches(1000, 16, seed=1, epoch=1), shuffled_batches(1000, 16, seed=2, epoch=0)):
        assert sum((a == b).sum() for a, b in zip(batches, other, strict=True)) < 20


@pytest.mark.parametrize("bad", ["0", "-3", "some", "1.5", ""])
def test_bad_train_targets(sequences, bad):
    with pytest.raises(UserError, match="train_targets"):
        training_examples(sequences, bad, 5)


# --- dataset folders ---


def test_items_in_another_order_are_refused_and_other_titles_are_not(tmp_path):
    (tmp_path / "a.txt").write_text("1 30 20 10 40\n2 10 20 30\n")
    assert not process("sequences", "--input", tmp_path / "a.txt", "--name", "d", "--output", tmp_path).returncode
    path, data = tmp_path / "d" / "items.tsv", Sequences.load(tmp_path / "d")
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    assert Catalogue.of(data).ids == [row.split("\t")[0] for row in rows]
    path.write_text("".join(f"{row}a title\n" for row in (header, *rows)), encoding="utf-8")
    assert Catalogue.of(data).titles == ["a title"] * 4
    for changed in (rows[::-1], [*rows[:-1], "50\t"]):
        path.write_text("".join(f"{row}\n" for row in (header, *changed)), encoding="utf-8")
        with pytest.raises(UserError, match=r"items\.tsv has other ids, or the same in another order"):
            Catalogue.of(data)


def test_interactions_become_sequences_in_time_order(tmp_path):
    """Fault 3: the released notebook keeps file order. Ties keep file order here, and are counted."""
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(9)}", f"i{rng.integers(30)}", int(rng.integers(40))) for _ in range(300)]
    source = tmp_path / "raw.inter"
    lines = [f"{u}\t{i}\t3\t{t}\n" for u, i, t in rows]
    source.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(lines))
    done = process("interactions", "--input", source, "--name", "toy", "--output", tmp_path, "--timestamp", "timestamp")
    assert done.returncode == 0, done.stderr
    data = Sequences.load(tmp_path / "toy")
    names = [line.split("\t")[0] for line in (tmp_path / "toy" / "items.tsv").read_text().splitlines()[1:]]
    ids = (tmp_path / "toy" / "user_ids.txt").read_text().split()
    ties = total = 0
    for user, sequence in zip(ids, users(data), strict=True):
        mine = sorted(((t, n, i) for n, (u, i, t) in enumerate(rows) if u == user), key=lambda row: row[:2])
        assert [names[item - 1] for item in sequence] == [i for _, _, i in mine]
        ties += sum(a[0] == b[0] for a, b in itertools.pairwise(mine))
        total += len(mine) - 1
    info = json.loads((tmp_path / "toy" / "dataset.json").read_text())
    assert info["timestamp_ties"] == pytest.approx(ties / total) and info["interactions"] == 300
    assert (data.items.min(), data.items.max()) == (1, data.num_items)  # fault 2: 0 is padding and no item


def test_csv_without_times_keeps_file_order(tmp_path):
    (tmp_path / "mine.csv").write_text("who,what\na,x\na,0\nb,x\na,y\na,z\n")
    flags = ["--user", "who", "--item", "what", "--name", "mine", "--output", tmp_path]
    assert process("interactions", "--input", tmp_path / "mine.csv", *flags).returncode == 0
    data = Sequences.load(tmp_path / "mine")
    assert data.items.tolist() == [1, 2, 3, 4, 1] and data.offsets.tolist() == [0, 4, 5]
    assert data.users.tolist() == [0] and "1 users with fewer than 3" in data.describe()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("user_id,item_id,timestamp\n", "no row"),
        (
            "user,item_id,timestamp\n1,2,3\n",
            "no column 'user_id'; it has user, item_id, timestamp: name yours with --user",
        ),
        ("user_id,item_id,timestamp\n1,2,3\n1,,4\n", "line 3: user or item is empty"),
        ("user_id,item_id,timestamp\n1,2,soon\n", "line 2: timestamp 'soon' is no number"),
        ("user_id,item_id,timestamp\n1,2,3\n1,2,3,4,5\n", "cannot be parsed"),
        ("user_id,item_id,timestamp\n1,2,3,\n1,4,5,\n", "cannot be parsed"),
        ("user_id,item_id,timestamp,item_id\n1,2,3,4\n", "two columns of one name"),
        ("user_id,item_id,timestamp\n1,2,1e30\n", "line 2: timestamp"),
        (None, "cannot be read"),
        (b"\xff\xfe\x00user", "cannot be read"),
    ],
)
def test_bad_interaction_files_leave_nothing_and_touch_nothing(text, words, tmp_path):
    source, place = tmp_path / "raw.csv", tmp_path / "toy"
    if text is not None:
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
    place.mkdir()
    (place / "dataset.json").write_text("{}")
    done = process("interactions", "--input", source, "--name", "toy", "--output", tmp_path, "--timestamp", "timestamp")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert [p.name for p in place.iterdir()] == ["dataset.json"] and (place / "dataset.json").read_text() == "{}"
    assert {p.name for p in tmp_path.iterdir()} <= {"raw.csv", "toy"}


def test_quotes(tmp_path):
    """A quote is a character like others in a TSV, and quotes a field in a CSV."""
    (tmp_path / "a.tsv").write_text('user_id\titem_id\na\t"x\na\ty\na\tz\n')
    (tmp_path / "b.csv").write_text('"user_id","item_id"\na,"x, y"\na,y\na,z\n')
    for source, first in (("a.tsv", '"x'), ("b.csv", "x, y")):
        done = process("interactions", "--input", tmp_path / source, "--name", "q", "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        assert Sequences.load(tmp_path / "q").items.tolist() == [1, 2, 3]
        assert (tmp_path / "q" / "items.tsv").read_text().splitlines()[1].split("\t")[0] == first


DTYPES = ["float32", "complex64", "bool", "<U21", "datetime64[s]", "int64", "uint8"]


def folder(path, **changes):
    """A small dataset folder with parts replaced."""
    parts = {"items": np.array([1, 2, 3, 1, 2, 3], np.int32), "offsets": np.array([0, 3, 6])} | changes
    path.mkdir()
    for name in parts.keys() - {"info"}:
        np.save(path / f"{name}.npy", parts[name])
    found = fingerprint_of(parts["items"], parts["offsets"], 3)
    info = {"name": "toy", "items": 3, "fingerprint": found} | changes.get("info", {})
    (path / "dataset.json").write_text(json.dumps(info))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"items": np.array([1, 2, 3, 1, 2, 4], np.int32)}, r"ids 1..4 outside 1..3"),
        ({"items": np.array([0, 1, 2, 1, 2, 3], np.int32)}, r"ids 0..3 outside 1..3"),
        ({"items": np.array([], np.int32)}, "is empty"),
        ({"offsets": np.array([0, 3, 7])}, "does not fit"),
        ({"offsets": np.array([0, 2, 4, 6])}, "no user has 3"),
        *(
            ({"attributes": np.array(pairs, kind), "info": {"attributes": 2}}, r"attributes.npy is not as it was made")
            for pairs, kind in (
                ([[1, 3]], "int32"),
                ([[4, 1]], "int32"),
                ([[1, 0]], "int32"),
                ([[1, 1]], "int64"),
                ([1, 1], "int32"),
            )
        ),
        ({"info": {"attributes": 1}}, r"attributes.npy is missing"),
        (
            {"attributes": np.array([[1, 1]], np.int32), "info": {"attributes": 1, "attributes_fingerprint": "0" * 64}},
            r"attributes.npy is not as it was made",
        ),
        ({"info": {"attributes": "some"}}, "attributes is 'some', expected a whole number"),
        ({"info": {"items": "many"}}, "items is 'many', expected a whole number of at least 1"),
        ({"info": {"items": 1e9}}, "items is 1000000000.0, expected a whole number"),
        ({"info": {"items": 10**9}}, "not as it was made"),
        ({"info": {"items": float("inf")}}, "Infinity is no number"),
        ({"info": {"name": ["toy"]}}, "name is list of 1, expected text"),
        ({"info": {"fingerprint": "f" * 64}}, "not as it was made"),
        ({"items": np.array([[1, 2, 3, 1, 2, 3]], np.int32)}, "is empty"),
        *(({"items": np.array([1, 2, 3, 1, 2, 3]).astype(kind)}, f"items.npy is {re.escape(kind)}") for kind in DTYPES),
        *(
            ({"offsets": np.array([0, 3, 6]).astype(kind)}, f"offsets.npy {kind}")
            for kind in ("float64", "<U21", "int8")
        ),
    ],
)
def test_impossible_datasets_are_refused(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        Sequences.load(folder(tmp_path / "toy", **changes))


def test_truncated_or_missing_parts_are_refused(tmp_path):
    place = folder(tmp_path / "toy")
    (place / "items.npy").write_bytes((place / "items.npy").read_bytes()[:90])
    with pytest.raises(UserError, match="cannot be read"):
        Sequences.load(place)
    (place / "items.npy").unlink()
    with pytest.raises(UserError, match=r"items\.npy is missing"):
        Sequences.load(place)
    (place / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Sequences.load(place)
    with pytest.raises(UserError, match="is no dataset"):
        Sequences.load(tmp_path)


@pytest.mark.parametrize(("steps", "epochs"), [(1, 3.0), (3, 3.0), (4, 3.0), (9, 3.0), (-1, 0.5), (-1, 1.0), (-1, 2.5)])
def test_visited_examples_are_those_of_the_batches(steps, epochs):
    config = {"batch_size": 8, "seed": 3, "max_steps": steps, "num_epochs": epochs}
    found, asked = visited_examples(30, config), steps if steps > 0 else math.ceil(epochs * 4)
    batches = [batch for epoch in range(3) for batch in shuffled_batches(30, 8, 3, epoch)][:asked]
    assert found.tolist() == sorted({int(example) for batch in batches for example in batch})
