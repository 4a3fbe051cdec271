"""datasets/process.py: every format, filter and command, against independent counts in plain Python."""

import ast
import csv
import functools
import gzip
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

from utils.data import Sequences

PROCESS = ROOT / "datasets" / "process.py"
SHARED = ROOT.parent / "shared" / "data"
RAW = SHARED / "amazon2018_raw"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample files in ../shared/data are not here")


def started(*arguments: object) -> subprocess.CompletedProcess:
    """A command as a process of its own."""
    return subprocess.run([sys.executable, PROCESS, *map(str, arguments)], capture_output=True, text=True)


@functools.cache
def load_process() -> ModuleType:
    """datasets/process.py as a module."""
    spec = importlib.util.spec_from_file_location("process", PROCESS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(*arguments: object) -> subprocess.CompletedProcess:
    """The same in the process of the tests: most commands take less time than a start."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            load_process().main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode("utf-8"))
    return subprocess.CompletedProcess(arguments, code, *printed)


def make(place: Path, kind: str, name: str = "made", *flags: object) -> dict:
    """Process, and read back what was written: info, and each user's [(item id, time)] by user id."""
    done = process(kind, "--name", name, "--output", place, *flags)
    assert done.returncode == 0, done.stderr
    return read(place / name) | {"printed": done.stdout, "err": done.stderr}


def read(folder: Path) -> dict:
    items, offsets, times = (np.load(folder / f"{n}.npy").tolist() for n in ("items", "offsets", "timestamps"))
    users = (folder / "user_ids.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in (folder / "items.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    info = json.loads((folder / "dataset.json").read_text())
    assert min(items) == 1 and max(items) == len(rows) == info["items"] and len(users) == info["users"]
    found = {}
    for user, low, high in zip(users, offsets[:-1], offsets[1:], strict=True):
        found[user] = [(rows[i - 1][0], t) for i, t in zip(items[low:high], times[low:high], strict=True)]
    return {"info": info, "users": found, "titles": dict(rows)}


def reviews(name: str) -> list[tuple[str, str, float, int]]:
    with gzip.open(RAW / f"{name}.json.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return [(row["reviewerID"], row["asin"], row["overall"], row["unixReviewTime"]) for row in rows]


def counts(rows) -> tuple[int, int, int, int]:
    return len(rows), len({r[0] for r in rows}), len({r[1] for r in rows}), len({r[:2] for r in rows})


def frequent(rows, place: int, k: int):
    number = Counter(r[place] for r in rows)
    return [r for r in rows if number[r[place]] >= k]


def distinct(rows):
    seen, kept = set(), []
    for row in rows:
        if row[:2] not in seen:
            seen.add(row[:2])
            kept.append(row)
    return kept


def naive_funnel(rows, kind: str) -> list[tuple]:
    """The steps of both filters in plain Python; rows are in time order already."""
    trail = [rows]
    if kind == "paper":
        trail.append([r for r in trail[-1] if r[2] >= 3])
        for place, k in ((0, 5), (1, 20), (0, 5)):
            trail.append(frequent(trail[-1], place, k))
        trail.append(distinct(trail[-1]))
        trail.append(frequent(trail[-1], 0, 5))
        return trail
    trail.append(distinct(trail[-1]))
    while True:
        users, items = (Counter(r[place] for r in trail[-1]) for place in (0, 1))
        kept = [r for r in trail[-1] if users[r[0]] >= 5 and items[r[1]] >= 5]
        if len(kept) == len(trail[-1]):
            return trail
        trail.append(kept)


@needs_shared
@pytest.mark.parametrize("kind", ["paper", "kcore"])
@pytest.mark.parametrize("name", ["Gift_Cards_5", "AMAZON_FASHION_5"])
def test_filters_equal_an_independent_count_after_each_step(name, kind, tmp_path):
    rows = sorted(reviews(name), key=lambda r: r[3])  # stable: ties keep file order
    trail = naive_funnel(rows, kind)
    if not trail[-1]:
        pytest.fail("the sample filters to nothing")
    made = make(tmp_path, "amazon2018", "made", "--input", RAW / f"{name}.json.gz", "--filter", kind)
    steps = [(s["rows"], s["users"], s["items"], s["interactions"]) for s in made["info"]["funnel"]]
    assert steps == [counts(rows) for rows in trail]
    expected = {}
    for user, item, _, time in trail[-1]:
        expected.setdefault(user, []).append((item, time))
    assert made["users"] == expected
    assert all(times == sorted(times) for times in ([t for _, t in s] for s in made["users"].values()))
    for step in made["info"]["funnel"]:
        assert f"{step['rows']:,}" in made["printed"]


@needs_shared
def test_gift_cards_titles_and_order(tmp_path):
    raw, flags = RAW / "Gift_Cards_5.json.gz", ["--filter", "none"]
    meta = ["--meta", RAW / "meta_Gift_Cards.json.gz"]
    made = make(tmp_path, "amazon2018", "made", "--input", raw, *meta, *flags)
    info = made["info"]
    assert (info["users"], info["items"], info["interactions"]) == (458, 148, 2965)
    assert info["titles_before_filtering"] == info["items_with_title"] == 148
    assert info["sources"].keys() == {"Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz"}
    by_file = make(tmp_path, "amazon2018", "file", "--input", raw, "--order", "file", *flags)
    expected: dict[str, list] = {}
    for user, item, _, time in distinct(reviews("Gift_Cards_5")):
        expected.setdefault(user, []).append((item, time))
    assert by_file["users"] == expected and by_file["info"]["order"] == "file"  # the released behaviour, exactly
    chronological = [[t for _, t in s] == sorted(t for _, t in s) for s in by_file["users"].values()]
    assert sum(chronological) == 176  # of 458: fault 3
    everything = make(tmp_path, "amazon2018", "all", "--input", raw, "--repeats", "all", *flags)
    assert everything["info"]["interactions"] == 2972


@needs_shared
def test_appliances_filters_to_nothing_and_writes_nothing(tmp_path):
    done = process("amazon2018", "--input", RAW / "Appliances_5.json.gz", "--name", "made", "--output", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nothing is left" in done.stderr
    assert list(tmp_path.iterdir()) == []
    made = make(tmp_path, "amazon2018", "kept", "--input", RAW / "Appliances_5.json.gz", "--filter", "none")
    assert (made["info"]["users"], made["info"]["items"], made["info"]["interactions"]) == (47, 48, 183)


@needs_shared
def test_files_of_other_formats_have_the_published_counts(tmp_path):
    beauty, clothing, movielens = SHARED / "amazon2014_beauty", SHARED / "amazon2014_clothing", SHARED / "movielens_1m"
    more = ["--titles", beauty / "titles.tsv.gz", "--attributes", beauty / "item2attributes.json.gz"]
    made = make(tmp_path, "sequences", "beauty", "--input", beauty / "Beauty.txt.gz", *more)
    with gzip.open(beauty / "Beauty.txt.gz", "rt") as file:
        lines = [line.split() for line in file]
    assert {user: [item for item, _ in s] for user, s in made["users"].items()} == {line[0]: line[1:] for line in lines}
    assert (made["info"]["users"], made["info"]["items"], made["info"]["interactions"]) == (22363, 12101, 198502)
    assert made["info"]["items_with_title"] == 12101 - 7 and made["info"]["timestamp_ties"] is None
    with gzip.open(beauty / "item2attributes.json.gz", "rt") as file:
        expected = {item: set(map(str, attributes)) for item, attributes in json.load(file).items()}
    assert attributes_in(tmp_path / "beauty") == expected
    for folder, expected, ties in ((clothing, (39230, 22948, 277534), 0.42), (movielens, (6040, 3416, 999611), 0.53)):
        flags = ["--input", folder / "user2item.tsv.gz", "--titles", folder / "item2title.tsv.gz"]
        info = make(tmp_path, "lists", folder.name, *flags)["info"]
        assert (info["users"], info["items"], info["interactions"]) == expected
        assert info["timestamp_ties"] == pytest.approx(ties, abs=0.005)
    flags = ["--user", "user_id", "--item", "asin", "--timestamp", "timestamp", "--rating", "rating"]
    flags += ["--titles", SHARED / "amazon2018_cds_partial/titles.tsv.gz", "--titles_item", "asin"]
    source = SHARED / "amazon2018_cds_partial/interactions.tsv.gz"
    info = make(tmp_path, "interactions", "cds", "--input", source, *flags)["info"]
    assert (info["users"], info["items"], info["interactions"]) == (2991, 5590, 25694)


def attributes_in(folder: Path) -> dict[str, set[str]]:
    """The attributes of each item that has some, by their own ids."""
    items = [line.split("\t")[0] for line in (folder / "items.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    names, found = (folder / "attribute_ids.txt").read_text(encoding="utf-8").splitlines(), {}
    for item, attribute in np.load(folder / "attributes.npy").tolist():
        found.setdefault(items[item - 1], set()).add(names[attribute - 1])
    return found


def test_attributes_stand_beside_the_items_that_are_left(tmp_path):
    (tmp_path / "in.txt").write_text("a 10 11 12\nb 10 12 13\n")
    listed = {"10": ["x y", 3, "3", "x y"], "12": [3, "tab\t"], "99": ["gone"], "13": []}
    (tmp_path / "of.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(listed).encode())
    flags = ["--input", tmp_path / "in.txt", "--attributes"]
    made = make(tmp_path, "sequences", "made", *flags, tmp_path / "of.json")
    assert attributes_in(tmp_path / "made") == {"10": {"x y", "3"}, "12": {"3", "tab\\u0009"}}
    data = Sequences.load(tmp_path / "made")
    assert data.attributes.tolist() == [[1, 1], [1, 2], [3, 2], [3, 3]]
    assert data.training_part().attributes is data.attributes
    assert data.describe().endswith("dropped), 2 items with attributes")
    assert (
        "2 of 4 items with attributes (3 different ones)" in made["printed"]
        and made["info"]["items_with_attributes"] == 2
    )
    plain = make(tmp_path, "sequences", "made", *flags[:2])
    assert plain["info"]["fingerprint"] == made["info"]["fingerprint"] and "attributes" not in plain["info"]
    assert not (tmp_path / "made/attributes.npy").exists() and not len(Sequences.load(tmp_path / "made").attributes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no JSON object of the form"),
        ("{", "no JSON object of the form"),
        ('{"10": [1], "10": [2]}', "'10' stands twice"),
        ("[" * 100_000, "no JSON object of the form"),
        ('{"10": [' + "9" * 5000 + "]}", "no JSON object of the form"),
        ("[1]", "it holds a list"),
        ('{"10": "x"}', "item '10' has 'x')"),
        ('{"10": {"a": 1}}', "item '10' has {'a': 1})"),
        ('{"10": [1.5]}', "item '10' has [1.5]"),
        ('{"10": [true]}', "has [True]"),
        ('{"10": [NaN]}', "has [nan]"),
        ('{"10": [null]}', "has [None]"),
        ('{"10": [""]}', "has ['']"),
        ('{"10": ["a\\tb", "a\\\\u0009b"]}', "of.json: of attributes, the ids"),
        ("{}", "an attribute of no item; give another file"),
        ('{"x": [1]}', "(it has item 'x', the dataset '10')"),
        ('{"10": []}', "an attribute of no item; give another file"),
        ('{"10": [1]}'.encode("utf-16"), "UTF-16"),
        (b'{"10": ["\xff"]}', "no JSON object of the form"),
    ],
)
def test_attributes_that_cannot_be_read_are_told_in_one_line(tmp_path, text, told):
    (tmp_path / "in.txt").write_text("a 10 11 12\n")
    (tmp_path / "of.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = ["--input", tmp_path / "in.txt", "--attributes", tmp_path / "of.json"]
    done = process("sequences", *flags, "--name", "made", "--output", tmp_path)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "made").exists()


def test_the_authors_csv_round_trips_with_item_0(tmp_path):
    """Fault 2: item 0 is a real item and the padding."""
    sequences = {"A1": [0, 5, 2], "A2": [5, 0, 7, 0]}
    with open(tmp_path / "cloths.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reviewerID", "asin", "title"])
        for user, items in sequences.items():
            writer.writerow([user, json.dumps(items), json.dumps([f"thing {i}" for i in items])])
    made = make(tmp_path, "prepared", "made", "--input", tmp_path / "cloths.csv")
    assert {user: [int(item) for item, _ in s] for user, s in made["users"].items()} == sequences
    assert made["titles"] == {str(i): f"thing {i}" for i in (0, 2, 5, 7)}


def test_amazon_2014_metadata_is_python_and_is_read_as_such(tmp_path):
    review = {"reviewerID": "u", "overall": 5.0, "unixReviewTime": 3}
    (tmp_path / "r.json").write_text("".join(json.dumps(review | {"asin": a}) + "\n" for a in ("x", "y")))
    meta = {"asin": "x", "title": 'It\'s a "thing"'}
    (tmp_path / "m.json").write_text(repr(meta) + "\n" + json.dumps({"asin": "y", "title": "other"}) + "\n")
    assert ast.literal_eval(repr(meta)) == meta and "'" in repr(meta)
    flags = ["--input", tmp_path / "r.json", "--meta", tmp_path / "m.json", "--filter", "none"]
    assert make(tmp_path, "amazon2018", "made", *flags)["titles"] == {"x": 'It\'s a "thing"', "y": "other"}


def test_export_and_lists_are_inverse(tmp_path):
    rows = ["user_id,item_id,time"] + [f"u{n % 3},i{n * 7 % 11},{n % 5}" for n in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    made = make(tmp_path, "interactions", "a", "--input", tmp_path / "a.csv", "--timestamp", "time")
    done = process("export", tmp_path / "a")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["user_id", "item_ids", "timestamps", "item_numbers"]
    for user, items, times, _ in lines[1:]:
        assert list(zip(items.split(), map(int, times.split()), strict=True)) == made["users"][user]
    (tmp_path / "b.tsv").write_text(done.stdout)
    again = make(tmp_path, "lists", "b", "--input", tmp_path / "b.tsv")
    assert again["users"] == made["users"] and again["info"]["fingerprint"] == made["info"]["fingerprint"]


@needs_shared
@pytest.mark.parametrize("rated", [True, False])
def test_the_papers_filter_is_the_same_in_every_format(rated, tmp_path):
    """The ratings' step needs ratings, which is told; of repeated items the first is kept."""
    rows = reviews("Gift_Cards_5")
    text = "".join(f"{user},{item},{rating},{time}\n" for user, item, rating, time in rows)
    (tmp_path / "a.csv").write_text("user_id,item_id,rating,time\n" + text)
    flags = ["--timestamp", "time", "--filter", "paper", *(["--rating", "rating"] if rated else [])]
    made = make(tmp_path, "interactions", "a", "--input", tmp_path / "a.csv", *flags)
    assert ("no ratings are read" in made["err"] and "--rating" in made["err"]) != rated
    wanted = naive_funnel(sorted(rows if rated else [(u, i, 5, t) for u, i, _, t in rows], key=lambda r: r[3]), "paper")
    steps = [(s["rows"], s["users"], s["items"], s["interactions"]) for s in made["info"]["funnel"]]
    assert steps == [counts(rows) for rows in (wanted if rated else [wanted[0], *wanted[2:]])]
    assert made["info"]["flags"]["repeats"] == "first"


def test_stats_prints_table_1(tmp_path):
    (tmp_path / "a.txt").write_text("1 4 5 6\n2 4 4 4 5\n")
    make(tmp_path, "sequences", "tiny", "--input", tmp_path / "a.txt")
    out = process("stats", tmp_path / "tiny").stdout
    assert re.search(r"tiny +2 +3 +7 +116.667", out)
    assert re.search(r"Cloth \(paper\) +1,219,678 +376,858 +11,285,464 +0.002", out)


# --- bad input ---

GOOD = '{"reviewerID": "u", "asin": "x", "overall": 5.0, "unixReviewTime": 3}\n'


def amazon(tmp_path: Path, text: str, *flags: object, how: Callable = process) -> subprocess.CompletedProcess:
    (tmp_path / "r.json").write_bytes(text.encode())
    flags = ("--filter", "none", "--name", "made", "--output", tmp_path, *flags)
    return how("amazon2018", "--input", tmp_path / "r.json", *flags)


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[1, 2]",
        '{"asin": "x", "overall": 5.0, "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": null, "overall": 5.0, "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": "x", "overall": "five", "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": "x", "overall": 5.0, "unixReviewTime": "soon"}',
        '{"reviewerID": "u", "asin": "x", "overall": 5.0, "unixReviewTime": 1e30}',
    ],
)
def test_bad_json_lines_are_counted_and_too_many_stop(line, tmp_path):
    done = amazon(tmp_path, GOOD * 1500 + line + "\n" + GOOD * 10)
    assert done.returncode == 0 and "1 of 1511 lines cannot be used, the first is line 1501" in done.stderr
    info = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert info["bad_lines"] == 1 and info["funnel"][0]["rows"] == 1510
    before = (tmp_path / "made" / "dataset.json").read_bytes()
    done = amazon(tmp_path, GOOD * 500 + line + "\n")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "line 501" in done.stderr
    assert "--max_bad_lines" in done.stderr and (tmp_path / "made" / "dataset.json").read_bytes() == before
    assert amazon(tmp_path, GOOD * 500 + line + "\n", "--max_bad_lines", 0.01).returncode == 0


def test_blocks_of_a_large_file_are_parsed_in_parallel_and_nothing_is_lost_between_them(tmp_path):
    """Lines of uneven length, so that blocks end in the middle of a line, and a bad line in the last block."""
    rng = np.random.default_rng(0)
    lines, per_user = [], {}
    for number in range(12_000):
        user, item, text = f"u{rng.integers(300)}", f"i{rng.integers(400)}", "\u00fc" * int(rng.integers(0, 4000))
        row = {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": number, "reviewText": text}
        lines.append(json.dumps(row, ensure_ascii=False))
        per_user.setdefault(user, []).append(item)
    lines.insert(11_900, "{broken")
    assert sum(len(line.encode()) + 1 for line in lines) > 4 * 2**23
    meta = "".join(json.dumps({"asin": f"i{i}", "title": f"t{i}", "also": "x" * 90_000}) + "\n" for i in range(400))
    (tmp_path / "meta.json").write_text(meta)
    flags = ["--repeats", "all", "--meta", tmp_path / "meta.json"]
    done = amazon(tmp_path, "\n".join(lines), *flags, how=started)
    assert done.returncode == 0 and "1 of 12001 lines cannot be used, the first is line 11901" in done.stderr
    made = read(tmp_path / "made")
    assert {user: [item for item, _ in rows] for user, rows in made["users"].items()} == per_user
    assert made["titles"] == {f"i{i}": f"t{i}" for i in range(400)}


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("amazon2018", gzip.compress(GOOD.encode() * 9000, mtime=0)[:-20], "damaged or cut off"),
        ("amazon2018", gzip.compress(GOOD.encode() * 9, mtime=0)[:14] + b"garbage" * 9, "damaged or cut off"),
        ("amazon2018", b"", "holds no line"),
        ("sequences", b"", "is empty"),
        ("sequences", b"1 2 3\n2 x 4\n", "line 2: 'x' is no whole number"),
        ("sequences", b"1 2 3\n2\n", "line 2: user 2 has no items"),
        ("sequences", b"1 2 3\n\n1 4\n", "line 3: user 1 stands in line 1"),
        ("sequences", b"\xff\xfe", "UTF-8"),
        ("lists", b"user_id\titem_ids\n1\t2 3\n", "no column 'timestamps'"),
        ("lists", b"user_id\titem_ids\ttimestamps\n1\t2 3\t5\n", "2 items but 1 timestamps"),
        ("lists", b"user_id\titem_ids\ttimestamps\n1\t2\t5\n1\t2\t5\n", "line 3: user 1 stands in line 2"),
        (
            "prepared",
            b"reviewerID,title\nA,B\n",
            "no column 'asin'; it has reviewerID, title: this format must have it",
        ),
        ("prepared", b'reviewerID,asin\nA,"[1, 2]"\nB,none\n', "line 3: asin is no list"),
        ("interactions", b"user_id,item_id\n", "no row"),
    ],
)
def test_broken_files_give_one_line_and_touch_nothing(kind, data, words, tmp_path):
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "dataset.json").write_text("{}")
    done = process(kind, "--input", tmp_path / "source", "--name", "made", "--output", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["dataset.json"]
    assert {p.name for p in tmp_path.iterdir()} == {"source", "made"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("interactions --k 10", "--k has no effect without --filter kcore"),
        ("interactions --filter paper --k=10", "--k has no effect without --filter kcore"),
        ("interactions --titles_title name", "--titles_title has no effect without --titles FILE"),
        ("sequences --titles_encoding latin-1", "--titles_encoding has no effect without --titles FILE"),
        ("jsonl --meta_item asin", "--meta_item has no effect without --meta FILE"),
        ("jsonl --timestamp ts --order time", "holds no line that can be used"),
    ],
)
def test_flags_without_effect_are_refused(command, words, tmp_path):
    (tmp_path / "source").write_bytes(b"")
    done = process(*command.split(), "--input", tmp_path / "source", "--name", "made", "--output", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ratings_that_no_filter_reads_are_told(tmp_path):
    (tmp_path / "source").write_text("user_id,item_id,stars\n" + "".join(f"u{n},i,4\n" for n in range(5)))
    flags = ["--input", tmp_path / "source", "--name", "made", "--output", tmp_path, "--rating", "stars"]
    said = {kind: process("interactions", *flags, "--filter", kind).stderr for kind in ("none", "paper")}
    assert "ratings are read and not used" in said["none"] and "not used" not in said["paper"]


def test_no_space_left_touches_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{u} " + " ".join(map(str, range(1, 40))) + "\n" for u in range(2000)))
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); "
    limit += f"sys.argv = sys.argv[1:]; runpy.run_path({str(PROCESS)!r}, run_name='__main__')"
    arguments = ["process.py", "sequences", "--input", tmp_path / "a.txt", "--name", "made", "--output", tmp_path]
    done = subprocess.run([sys.executable, "-c", limit, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# --- download ---

BODY = gzip.compress(b"".join(b'{"line": %d}\n' % n for n in range(60000)), mtime=0)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves BODY with a fault of `behaviour` in the first answer to each path, or in all of them."""

    behaviour, seen = "good", []

    def log_message(self, *args):
        pass

    def do_GET(self):
        ranged = self.headers.get("Range")
        type(self).seen.append((self.path, ranged))
        low = int(ranged[6:-1]) if ranged and self.behaviour != "no ranges" else 0
        first = [path for path, _ in self.seen].count(self.path) == 1
        body = BODY
        if self.behaviour == "truncated gzip":
            body = BODY[: len(BODY) // 2]
        if self.behaviour == "error page":
            body = b"<html>gone</html>"
        if self.behaviour == "missing":
            self.send_error(404)
            return
        self.send_response(206 if low else 200)
        self.send_header("Content-Type", "text/html" if self.behaviour == "error page" else "application/gzip")
        self.send_header("Content-Length", str(len(body) - low))
        self.end_headers()
        if self.behaviour in ("breaks off", "no ranges") and first:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif self.behaviour == "stalls" and first:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            threading.Event().wait(2)
            self.close_connection = True
        else:
            self.wfile.write(body[low:])


@pytest.fixture
def mirror(request):
    handler = type("Handler", (Mirror,), {"behaviour": request.param, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/amazon"
    server.shutdown()


def fetch(place: Path, *mirrors: str) -> subprocess.CompletedProcess:
    flags = [word for url in mirrors for word in ("--mirror", url)]
    return process("download", "--category", "Gift_Cards", "--output", place, "--timeout", 1, *flags)


@pytest.mark.parametrize("mirror", ["good", "breaks off", "stalls", "no ranges"], indirect=True)
def test_download_ends_whole_and_goes_on_where_it_broke_off(mirror, tmp_path):
    handler, url = mirror
    done = fetch(tmp_path, url)
    assert done.returncode == 0, done.stderr
    names = {"Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes() == BODY for name in names)
    assert any(ranged for _, ranged in handler.seen) == (handler.behaviour != "good")
    asked = len(handler.seen)
    assert fetch(tmp_path, url).returncode == 0 and len(handler.seen) == asked  # what is there is not fetched again
    (tmp_path / min(names)).write_bytes(BODY[:-9])
    done = fetch(tmp_path, url)
    assert done.returncode == 2 and "is no whole gzip file" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--category", "X", "--mirror", "foo"], "foo: unknown url type"),
        (["--category", "X", "--mirror", "http://127.0.0.1:9/é"], "http://127.0.0.1:9/é"),
        (["--category", "Café au lait"], "--category 'Café au lait'"),
        (["--category", "../X"], "--category '../X'"),
    ],
)
def test_what_can_be_no_address_is_told(flags, words, tmp_path):
    done = process("download", *flags, "--output", tmp_path / "raw")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize("mirror", ["error page", "missing", "truncated gzip"], indirect=True)
def test_download_from_a_bad_mirror_gives_one_line_and_no_file(mirror, tmp_path):
    _, url = mirror
    done = fetch(tmp_path, "http://127.0.0.1:9/nobody", url)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--mirror" in done.stderr and "https://" in done.stderr
    assert not list(tmp_path.glob("*.gz"))


# --- what stands at the place of the dataset ---

SMALL = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nv,a,3\n"


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: bytes of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (
            str(path.readlink()) if path.is_symlink() else path.is_dir() or path.read_bytes()
        )
    return found


def other_file(place: Path) -> list:
    (place / "made" / "thesis.txt").write_text("three years")
    return ["--input", place / "a.csv"]


def only_other_files(place: Path) -> list:
    (place / "made" / "dataset.json").unlink()
    return other_file(place)


def folder_within(place: Path) -> list:
    (place / "made" / "items.npy").mkdir()
    (place / "made" / "items.npy" / "thesis.txt").write_text("three years")
    return ["--input", place / "a.csv"]


def plain_file(place: Path) -> list:
    (place / "made" / "dataset.json").unlink()
    (place / "made").rmdir()
    (place / "made").write_text("three years")
    return ["--input", place / "a.csv"]


def input_within(place: Path) -> list:
    (place / "a.csv").rename(place / "made" / "items.tsv")
    return ["--input", place / "made" / "items.tsv"]


def input_by_link(place: Path) -> list:
    (place / "a.csv").rename(place / "made" / "items.tsv")
    (place / "link.csv").symlink_to(place / "made" / "items.tsv")
    return ["--input", place / "link.csv"]


def linked_folder(place: Path) -> list:
    (place / "elsewhere").symlink_to(place / "made")
    (place / "a.csv").rename(place / "made" / "items.tsv")
    return ["--input", place / "elsewhere" / "items.tsv"]


def link_within(place: Path) -> list:
    (place / "made" / "items.tsv").symlink_to(place / "a.csv")
    return ["--input", place / "made" / "items.tsv"]


def titles_within(place: Path) -> list:
    (place / "made" / "items.tsv").write_text("item_id\ttitle\na\tA\n")
    return ["--input", place / "a.csv", "--titles", place / "made" / "items.tsv"]


def missing_titles(place: Path) -> list:
    return ["--input", place / "a.csv", "--titles", place / "nothing.tsv"]


def output_is_a_file(place: Path) -> list:
    return ["--input", place / "a.csv", "--output", place / "a.csv"]


def link_to_itself(place: Path) -> list:
    (place / "loop").symlink_to(place / "loop")
    return ["--input", place / "a.csv", "--name", "loop"]


REFUSED = [other_file, only_other_files, folder_within, plain_file, input_within, input_by_link, linked_folder]
REFUSED += [link_within, titles_within, missing_titles, output_is_a_file, link_to_itself]


@pytest.mark.parametrize("prepare", REFUSED)
def test_what_is_not_ours_is_refused_before_anything_is_read(prepare, tmp_path, capsys, monkeypatch):
    module = load_process()
    (tmp_path / "a.csv").write_text(SMALL)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "dataset.json").write_text("{}")
    flags = ["--name", "made", "--output", tmp_path, *prepare(tmp_path)]
    before = contents(tmp_path)
    monkeypatch.setattr(module, "in_order", lambda *_: pytest.fail("the source was read"))
    with pytest.raises(SystemExit) as ended:
        module.main(["interactions", *map(str, flags)])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == before


def test_downloads_are_not_replaced_by_a_dataset_of_their_folder_s_name(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("r.json", "meta.json"):
        (tmp_path / "raw" / name).write_text(GOOD)
    flags = ["--input", tmp_path / "raw/r.json", "--meta", tmp_path / "raw/meta.json", "--filter", "none"]
    done = process("amazon2018", *flags, "--name", "raw", "--output", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert contents(tmp_path) == {"raw": True, "raw/r.json": GOOD.encode(), "raw/meta.json": GOOD.encode()}


def test_a_dataset_is_replaced_and_a_link_to_it_stays_one(tmp_path):
    (tmp_path / "a.csv").write_text(SMALL)
    (tmp_path / "disk").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "disk" / "set")
    for order in ("time", "file"):
        flags = ["--input", tmp_path / "a.csv", "--timestamp", "timestamp", "--order", order]
        info = make(tmp_path, "interactions", "made", *flags)["info"]
        assert info["order"].startswith(order) and (tmp_path / "made").is_symlink()
    assert (tmp_path / "disk" / "set" / "dataset.json").is_file()


KILLS = """
import importlib.util, json, os, shutil, sys

spec = importlib.util.spec_from_file_location("process", sys.argv[1])
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)
place = sys.argv[2]
flags = ["interactions", "--input", f"{place}/new.csv", "--timestamp", "timestamp", "--name", "made", "--output", place]


def run(killed_before=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = []

    def hook(event, arguments):
        if event == "ctypes.dlsym" or any(".made." in str(argument) for argument in arguments):
            seen.append(event)
        if killed_before is not None and len(seen) > killed_before:
            os._exit(9)

    sys.addaudithook(hook)
    sys.stdout = open(os.devnull, "w")
    process.main(flags)
    os._exit(0)


def state():
    info = json.load(open(f"{place}/made/dataset.json"))
    sizes = [os.path.getsize(f"{place}/made/{name}.npy") for name in ("items", "timestamps")]
    assert sizes == [128 + 4 * info["interactions"], 128 + 8 * info["interactions"]], sizes
    return {3: "new", 4: "old"}[info["interactions"]]


event, ended = 0, 9
while ended == 9:
    shutil.rmtree(f"{place}/made")
    shutil.copytree(f"{place}/keep", f"{place}/made")
    ended = run(killed_before=event)
    found = state()
    assert run() == 0 and state() == "new", event
    print(found, sorted(set(os.listdir(place)) - {"keep", "made", "new.csv", "old.csv", ".made.lock"}))
    event += 1
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_dataset_and_nothing_else_in_the_end(tmp_path):
    """Before each event that touches a file beside the dataset, a process of its own is killed and then run again."""
    (tmp_path / "old.csv").write_text(SMALL + "w,a,4\n")
    (tmp_path / "new.csv").write_text(SMALL)
    make(tmp_path, "interactions", "made", "--input", tmp_path / "old.csv", "--timestamp", "timestamp")
    shutil.copytree(tmp_path / "made", tmp_path / "keep")
    done = subprocess.run([sys.executable, "-c", KILLS, PROCESS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10 and {line.split(" ", 1)[1] for line in lines} == {"[]"}
    assert lines == sorted(lines, reverse=True) and lines[0] == "old []" and lines[-2:] == ["new []"] * 2


def test_two_processes_that_make_one_dataset_both_end_well(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n" + "".join(f"{n % 999},{n % 77}\n" for n in range(50_000)))
    command = [
        sys.executable,
        PROCESS,
        "interactions",
        "--input",
        tmp_path / "a.csv",
        "--name",
        "made",
        "--output",
        tmp_path,
    ]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(*one.communicate(), one.returncode) for one in both]
    assert all(code == 0 for *_, code in ended), ended
    assert read(tmp_path / "made")["info"]["interactions"] == 50_000
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "made", ".made.lock"}


# --- on its own ---


def test_stand_alone():
    """Of the rest it imports three modules that need no torch, and nothing imports it."""
    folder = PROCESS.parent
    assert not (folder / "__init__.py").exists()
    for path in folder.glob("*.py"):
        imported = re.findall(
            r"^(?:from|import) ((?:utils|models|datasets)\S*)", path.read_text(encoding="utf-8"), re.M
        )
        assert set(imported) <= {"utils.checked", "utils.errors", "utils.files"}, path
    names = "|".join(path.stem for path in folder.glob("*.py"))
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests", "datasets"} & set(path.relative_to(ROOT).parts):
            found = re.search(rf"^(from|import) (datasets|{names})\b", path.read_text(encoding="utf-8"), re.M)
            assert not found, (path, found)


def test_it_starts_without_torch_and_from_any_folder(tmp_path):
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += f"sys.argv = ['process.py', 'stats', 'none']; runpy.run_path({str(PROCESS)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "no dataset of that name" in done.stderr and done.stdout == "False\n"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}])
def test_all_text_is_utf_8_whatever_the_locale(locale, tmp_path):
    (tmp_path / "a.csv").write_text(
        "user_id,item_id,title\n\u00fc\u4e2d,\u00e9,Caf\u00e9 \u4e2d\n\u00fc\u4e2d,b,x\n", encoding="utf-8"
    )
    options = {"env": os.environ | {"PYTHONCOERCECLOCALE": "0"} | locale, "capture_output": True}
    flags = ["--input", tmp_path / "a.csv", "--title", "title", "--name", "made", "--output", tmp_path]
    done = subprocess.run([sys.executable, PROCESS, "interactions", *flags], **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "items.tsv").read_text(
        encoding="utf-8"
    ) == "item_id\ttitle\n\u00e9\tCaf\u00e9 \u4e2d\nb\tx\n"
    done = subprocess.run([sys.executable, PROCESS, "export", tmp_path / "made"], **options)
    assert done.stdout.decode("utf-8") == "user_id\titem_ids\ttimestamps\n\u00fc\u4e2d\t\u00e9 b\t\n", done.stderr
