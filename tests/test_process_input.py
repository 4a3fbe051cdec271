"""What datasets/process.py makes of every kind of input: times, headers, quotes, titles, ids; what it refuses."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from datetime import datetime
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_process import load_process, read

from utils import assets

PLAIN = ["--header", "none", "--columns", "user,item,rating,timestamp"]
TIMED = ["--timestamp", "timestamp"]
TITLED = ["--title", "title"]


@pytest.fixture(scope="module")
def module():
    return load_process()


@pytest.fixture
def run(module, capsys, tmp_path):
    """run(command, data, *flags): (exit code, what was read back, the lines on standard error)."""

    def one(command: str, data: str | bytes, *flags: object, name: str = "made") -> tuple[int, dict, list[str]]:
        (tmp_path / "source").write_bytes(data if isinstance(data, bytes) else data.encode())
        code = 0
        try:
            flags = ["--input", tmp_path / "source", "--output", tmp_path, "--name", name, *flags]
            module.main([command, *map(str, flags)])
        except SystemExit as ended:
            code = ended.code
        return code, read(tmp_path / name) if not code else {}, capsys.readouterr().err.splitlines()

    return one


@pytest.fixture
def back(module, capsys, run):
    """back(folder): the dataset that `lists` makes of what `export` printed."""

    def one(folder: Path, *flags: object) -> dict:
        capsys.readouterr()
        module.main(["export", str(folder)])
        code, made, err = run("lists", capsys.readouterr().out, *flags, name="back")
        assert code == 0, err
        return made

    return one


def order(made: dict) -> str:
    return "".join(item for item, _ in made["users"]["u"])


def rows(*times: object, header: str = "user_id,item_id,timestamp") -> str:
    return header + "\n" + "".join(f"u,{'abcdefghij'[n]},{time}\n" for n, time in enumerate(times))


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("user_id,item_id,0\nu,a,7\nu,b,8\nu,c,9\n", []),  # a column without a name, as pandas writes it
        ("user_id¦item_id\nu¦a\nu¦b\nu¦c\n", ["--separator", "¦"]),
        ("user_id,item_id,title\nu,a,\nu,b\nu,c\n", []),
        ("user_id,item_id,title\nu,a,\nu,b,t\nu,c,", []),
    ],
)
def test_less_usual_tables_are_read(data, flags, run):
    code, made, err = run("interactions", data, *flags)
    assert code == 0 and order(made) == "abc", err


# --- times ---

NUMBERS = [
    ["1112486027.5", "1112486027.25", "1.11248602E9"],
    ["1588601284123456789", "1588601284123456787.0", "1588601284123456788", "1588601284123456786"],
    ["1.588601284123456789e18", "1588601284123456788"],
    ["-5.5", "-5.25", "0", "1e-3", "-1E2", "+7", "-0.0", ".5", "5."],
    ["9223372036854775807", "9223372036854775806", "-9223372036854775808"],
    ["1588601284.123456789", "1588601284.123456788", "1588601284.1234567885"],
    ["1588601284123456789.5", "1588601284123456789.25", "1588601284123456789.250"],  # more digits than 64 bits hold
    ["1e-21", "2e-21", "15e-22"],  # more decimals than dataset.json may say
    ["1e-20", "2e-20", "3e-20"],
    ["0.30000000000000004", "0.3", "99.99999999999999", "1e-400"],
    ["3", "1", "2", "1"],
    ["3.0", "1.0", "2.00", "1"],
]


@pytest.mark.parametrize("times", NUMBERS)
def test_numbers_keep_their_order_and_ties_without_rounding(times, run, back, tmp_path):
    exact = [Fraction(text) for text in times]
    expected = sorted(range(len(times)), key=exact.__getitem__)  # stable
    code, made, err = run("interactions", rows(*times), *TIMED)
    assert code == 0 and order(made) == "".join("abcdefghij"[n] for n in expected)
    ties = sum(exact[a] == exact[b] for a, b in itertools.pairwise(expected))
    assert made["info"]["timestamp_ties"] == pytest.approx(ties / (len(times) - 1))
    stored = [time for _, time in made["users"]["u"]]
    if made["info"]["timestamp_unit"] == "as in the source":
        assert not err
        assert [Fraction(time, 10 ** made["info"]["timestamp_decimals"]) for time in stored] == sorted(exact)
    else:
        assert (
            len(err) == 1
            and "rank" in err[0]
            and stored == [sorted(set(exact)).index(value) for value in sorted(exact)]
        )
    assert back(tmp_path / "made")["users"] == made["users"]


def test_whole_numbers_are_stored_as_they_are(run):
    times = [3, -(2**63), 2**63 - 1, 1588601284123456789]
    _, made, _ = run("interactions", rows(*times), *TIMED)
    assert [time for _, time in made["users"]["u"]] == sorted(times) and made["info"]["timestamp_decimals"] == 0


DATES = [
    "2020-05-05 14:08:48",
    "2020-05-05T14:08:47Z",
    "2020-05-05 16:08:48+02:00",
    "2020-05-05",
    "2020-05-05T14:08:48.123456",
    "2020-05-05T09:08:48-05:00",
    "1969-12-31T23:59:59.5",
    "0001-01-01",
    "2020-05-05 14:08",
]


@pytest.mark.parametrize(
    "dates", [DATES, DATES[:1], DATES[3:4], DATES[:3], ["2020-05-05t14:08:48z", "2020-05-05 14:08:47 UTC"]]
)
def test_dates_count_as_exact_seconds_in_utc(dates, run, back, tmp_path):
    epoch = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    seconds = []
    for text in dates:
        when = datetime.fromisoformat(text.upper().replace(" UTC", "Z"))
        since = (when if when.tzinfo else when.replace(tzinfo=epoch.tzinfo)) - epoch
        seconds.append(since.days * 86400 + since.seconds + Fraction(since.microseconds, 10**6))
    code, made, err = run("interactions", rows(*dates), *TIMED)
    assert code == 0, err
    expected = sorted(range(len(dates)), key=seconds.__getitem__)
    assert order(made) == "".join("abcdefghij"[n] for n in expected)
    scale = 10 ** made["info"]["timestamp_decimals"]
    assert [Fraction(time, scale) for _, time in made["users"]["u"]] == sorted(seconds)
    assert made["info"]["timestamp_unit"] == "seconds since 1970-01-01 UTC"
    assert back(tmp_path / "made")["users"] == made["users"]


def test_nanoseconds_of_dates_are_kept(run):
    _, made, _ = run("interactions", rows("2020-05-05T14:08:48.123456789", "2020-05-05T14:08:48.123456788"), *TIMED)
    assert made["users"]["u"] == [("b", 1588687728123456788), ("a", 1588687728123456789)]


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (["1", "2020-05-05"], "line 3: timestamp '2020-05-05' is a date where those before are numbers"),
        (["2020-05-05", "2020-05-06", "5"], "line 4: timestamp '5' is a number where those before are dates"),
        (["1", "9223372036854775808"], "line 3: timestamp '9223372036854775808' does not fit in 64 bits"),
        (["1", "2.5", "1e30"], "line 4: timestamp '1e30' does not fit"),
        (["1", "1e999999999"], "line 3: timestamp '1e999999999' does not fit"),
        (["1", "1e-99999999999999999999"], "line 3: timestamp"),
        (["²"], "line 2: timestamp '²' is no number"),
        (["1", "１"], "line 3: timestamp '１' is no number"),
        (["1_0"], "line 2: timestamp '1_0' is no number"),
        (["0x10"], "line 2: timestamp '0x10' is no number"),
        (["1", "nan"], "line 3: timestamp 'nan' is no number"),
        (["inf"], "line 2: timestamp 'inf' is no number"),
        (["5", ""], "line 3: timestamp '' is no number"),
        (["2020-02-30"], "line 2: timestamp '2020-02-30' is no date"),
        (["2020-05-05T25:00:00"], "line 2: timestamp '2020-05-05T25:00:00' is no date"),
        (["2020-05-05T14:08:48+99:00"], "line 2: timestamp"),
        (["05/05/2020"], "line 2: timestamp '05/05/2020' is no number and no date"),
    ],
)
def test_times_that_are_none_are_refused_with_their_line(times, words, run):
    code, _, err = run("interactions", rows(*times), *TIMED)
    assert code == 2 and len(err) == 1 and words in err[0]


@pytest.mark.parametrize(
    ("command", "data"),
    [
        ("interactions", rows(1, 2)),
        ("sequences", "1 2 3\n"),
        ("pairs", "1 2\n"),
        ("prepared", 'reviewerID,asin\nu,"[1, 2]"\n'),
        ("lists", "user_id\titem_ids\ttimestamps\nu\ta b\t\n"),
        ("jsonl", '{"user_id": 1, "item_id": 2}\n'),
    ],
)
def test_order_by_time_is_refused_without_times(command, data, run):
    code, _, err = run(command, data, "--order", "time")
    assert code == 2 and len(err) == 1 and "--order time needs times" in err[0]
    code, made, _ = run(command, data)
    assert code == 0 and made["info"]["order"] == "file" and made["info"]["timestamp_ties"] is None


@pytest.mark.parametrize("name", ["timestamp", "time", "date", "unixReviewTime", "created_at_ts", "Timestamp"])
def test_times_that_are_not_read_are_named(name, run):
    code, _, err = run("interactions", rows(1, 2, header=f"user_id,item_id,{name}"))
    assert code == 0 and len(err) == 1 and f"--timestamp {name}" in err[0]
    assert run("interactions", rows(1, 2, header=f"user_id,item_id,{name}"), "--timestamp", name)[2] == []
    code, _, err = run("jsonl", f'{{"user_id": 1, "item_id": 2, "{name}": 5}}\n')
    assert code == 0 and len(err) == 1 and f"--timestamp {name}" in err[0]


def test_without_times_out_and_without_times_back(run, back, tmp_path):
    run("sequences", "5 2 3 2\n1 3\n")
    info = back(tmp_path / "made")["info"]
    assert info["timestamp_ties"] is None and info["timestamp_unit"] is None and info["order"] == "file"


def test_file_order_comes_back_as_it_was(run, back, tmp_path):
    _, made, _ = run("interactions", rows(3, 1, 2), *TIMED, "--order", "file")
    again = back(tmp_path / "made")
    assert order(again) == order(made) == "abc" and again["info"]["order"] == "file"
    assert again["info"]["fingerprint"] == made["info"]["fingerprint"]


# --- headers, separators, encodings, compression ---


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("196\t242\t3\t881250949\n186\t302\t1\t881250950\n", PLAIN),
        ("196::242::3::881250949\n186::302::1::881250950\n", PLAIN),
        ("196,242,3.0,881250949\n186,302,1.0,881250950\n", PLAIN),
        ("196;242;3;881250949\n186;302;1;881250950\n", [*PLAIN, "--separator", ";"]),
        ("196 242 3 881250949\n186 302 1 881250950\n", [*PLAIN, "--separator", "space"]),
        ("196=>242=>3=>881250949\n186=>302=>1=>881250950\n", [*PLAIN, "--separator", "=>"]),
        ("\n196,x,242,881250949\n\n186,x,302,881250950", ["--header", "none", "--columns", "user,_,item,timestamp"]),
        (
            "196|242|881250949\n186|302|881250950\n",
            ["--header", "none", "--columns", "a,b,c", "--user", "a", "--item", "b", "--timestamp", "c"],
        ),
        ("user_id|item_id|timestamp\n196|242|881250949\n186|302|881250950\n", TIMED),
        ("\n\nuser_id,item_id,timestamp\r\n196,242,881250949\r\n186,302,881250950\r\n", TIMED),
        ("user_id,item_id,timestamp\r196,242,881250949\r186,302,881250950\r", TIMED),
        (",user_id,item_id,timestamp\n0,196,242,881250949\n1,186,302,881250950\n", TIMED),
        ("PK,user_id,item_id,timestamp\n0,196,242,881250949\n1,186,302,881250950\n", TIMED),
        ("196,242,3,881250949\n186,302,1,881250950\n", [*PLAIN[:3], "user, item, rating, timestamp"]),
    ],
)
def test_layouts(data, flags, run):
    code, made, err = run("interactions", data, *map(str.strip, flags))
    assert code == 0, err
    assert made["users"] == {"196": [("242", 881250949)], "186": [("302", 881250950)]}


def test_a_column_that_is_missing_is_told_before_the_rows_are_parsed(module, run, monkeypatch, tmp_path):
    (tmp_path / "titles.csv").write_text("item_id,name\n1,Tea\n")
    good = "user_id,item_id\n1,1\n"
    for data, flags, words in (
        ("userId,movieId\n1,2\n", [], "no column 'user_id'"),
        (good, ["--timestamp", "time"], "no column 'time'"),
        (good, ["--titles", tmp_path / "titles.csv"], "no column 'title'"),
        (good, ["--titles", tmp_path / "titles.csv", "--titles_header", "none"], "--titles_columns"),
    ):
        with monkeypatch.context() as context:
            context.setattr(pd, "read_csv", lambda *args, **options: pytest.fail("parsed"))
            code, _, err = run("interactions", data, *flags)
        assert code == 2 and len(err) == 1 and words in err[0], err


def test_titles_of_other_items_are_refused(run, tmp_path):
    titles = tmp_path / "titles.csv"
    titles.write_text("item_id,title\n1.0,Tea\n")
    data = "user_id,item_id\n7,1\n7,2\n7,3\n"
    code, _, err = run("interactions", data, "--titles", titles)
    assert code == 2 and len(err) == 1 and "has a title of no item that is left, such as '1'" in err[0]
    titles.write_text("item_id,title\n1,\n")
    assert run("interactions", data, "--titles", titles)[0] == 0  # they are there, and empty
    meta = tmp_path / "meta.jsonl"
    meta.write_text('{"id": "1", "name": "Tea"}\n')
    lines = '{"user_id": "7", "item_id": "1"}\n{"user_id": "7", "item_id": "2"}\n{"user_id": "7", "item_id": "3"}\n'
    code, made, err = run("jsonl", lines, "--meta", meta, "--meta_item", "id", "--meta_title", "name")
    assert code == 0 and made["info"]["items_with_title"] == 1
    meta.write_text('{"item_id": "9", "title": "Tea"}\n')
    code, _, err = run("jsonl", lines, "--meta", meta)
    assert code == 2 and len(err) == 1 and "has a title of no item" in err[0] and "--meta_item" in err[0]


def test_what_is_written_as_a_path_is_one(module, run, monkeypatch, tmp_path, capsys):
    assert run("interactions", "user_id,item_id\n1,1\n1,2\n1,3\n", name="here")[0] == 0
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(tmp_path / "here", "here")
    Path("here/user_ids.txt").write_text("mine\n")
    monkeypatch.setattr(sys.modules["export"], "HERE", tmp_path)
    monkeypatch.setattr(assets, "DATASETS", tmp_path)
    for name, user in (("here", "1"), ("./here", "mine")):
        module.main(["export", name])
        assert capsys.readouterr().out.splitlines()[1].startswith(f"{user}\t")
        assert (assets.find_dataset(name) / "user_ids.txt").read_text() == f"{user}\n"


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("196\t242\t3\t881250949\n1\t2\t3\t4\n", ["--user", "196", "--item", "242"], "--header none"),
        ("196\t242\t3\t881250949\n1\t2\t3\t4\n", [], "--header none"),
        ("A1,B1,5.0,136969\nA2,B2,5.0,136969\n", ["--user", "A1", "--item", "B1"], "--header none"),
        ("ann,tea,2020-05-05\nbob,tea,2020-05-06\n", ["--user", "ann", "--item", "tea"], "--header none"),
        ("ann,tea\nbob,milk\nann,milk\n", ["--user", "ann", "--item", "tea"], "line 3: 'ann' is a value like 'ann'"),
        ("ann,tea\nbob,tea\n", ["--user", "ann", "--item", "tea"], "line 2: 'tea' is a value like 'tea'"),
        ("u1,ann\nu2,bob\n", ["--user", "u1", "--item", "ann"], "line 2: 'u2' is a value like 'u1'"),
        ("user_id,item_id\na,b\nuser_id,item_id\nc,d\n", [], "line 3: 'user_id' is a value like 'user_id'"),
        ("userId,movieId,rating,timestamp\n1,2,3,4\n", PLAIN, "line 1: this is a header line"),
        ("1,2\n", ["--header", "none"], "--columns"),
        ("1,2\n", ["--columns", "user,item"], "--header none"),
        ("user_id,item_id,rating\n1,10,5\n1,11,4\n2,1", [], "line 4, the last, has 2 values and no end, there are 3"),
        ("1,2,3\n", ["--header", "none", "--columns", "user,item"], "line 1 has 3 values, --columns names 2"),
        ("1,2\n1,2,3\n", ["--header", "none", "--columns", "user,item"], "line 2 has 3 values"),
        ("1,2\n", ["--header", "none", "--columns", "who,what"], "no column 'user_id'"),
        ("a b\n1 2\n", [], "--separator"),
        ("user_id,item_id\n1,2\n", ["--separator", ""], "--separator"),
        ("user_id,item_id\n1,2\n", ["--encoding", "klingon"], "--encoding klingon"),
        ("user_id,item_id\n1,2\n", ["--encoding", "rot13"], "--encoding rot13"),
        ("user_id,item_id\n1,é\n".encode("latin-1"), [], "--encoding"),
        ("user_id,item_id\n1,2\n".encode("utf-16"), [], "--encoding"),
        ("user_id,item_id\n1,2\n".encode("utf-16-le"), [], "--encoding"),
        ("user_id,item_id\n1,2\n3,4,5\n", [], "line 3 has 3 values"),
        ("user_id,item_id\n1,2\r3,4\n", [], "line 2 has 3 values"),
        ("\n\nuser_id,item_id\n1,2\n\n\n3,\n", [], "line 7: user or item is empty"),
        ("user_id,item_id\n1,2\n3, \n", [], "line 3: user or item is empty"),
        ("\n\n", [], "is empty"),
        ("user_id,item_id\n1,2\n", ["--user", "item_id", "--item", "item_id"], "--user and --item are both item_id"),
        ("user_id,item_id\n1,2\n", ["--user", "item_id"], "--user and --item are both item_id"),
        ("user_id,item_id\n1,2\n", ["--item", "user_id"], "--user and --item are both user_id"),
        (gzip.compress(gzip.compress(b"user_id,item_id\n1,2\n", mtime=0), mtime=0), [], "holds a compressed file"),
        (gzip.compress(b"PK\x03\x04....", mtime=0), [], "holds a compressed file"),
        (b"(\xb5/\xfd....", [], "zstd"),
        (bz2.compress(b"user_id,item_id\n1,2\n")[:-4], [], "damaged or cut off"),
        (lzma.compress(b"user_id,item_id\n1,2\n")[:-4], [], "damaged or cut off"),
        (b"PK\x03\x04....", [], "damaged or cut off"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, [], "tar archive"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(data, flags, words, run):
    code, _, err = run("interactions", data, *flags)
    assert code == 2 and len(err) == 1 and words in err[0], err


@pytest.mark.parametrize(("header", "flag"), [("id,title", "--titles_item"), ("item_id,name", "--titles_title")])
def test_columns_of_titles_that_are_called_otherwise_name_their_flag(header, flag, run, tmp_path):
    (tmp_path / "titles").write_text(f"{header}\n1,Toy Story\n")
    code, _, err = run("interactions", "user_id,item_id\n1,1\n", "--titles", tmp_path / "titles")
    assert code == 2 and len(err) == 1 and f"it has {header.replace(',', ', ')}: name yours with {flag}" in err[0], err


def test_titles_without_a_header_name_their_own_flags(run, tmp_path):
    (tmp_path / "titles").write_text("1,Toy Story\n")
    code, _, err = run("pairs", "1 2\n", "--titles", tmp_path / "titles")
    assert code == 2 and len(err) == 1 and "line 1 holds values (1)" in err[0]
    assert "--titles_header none --titles_columns item_id,title" in err[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1", "cp1252"])
def test_encodings(encoding, run):
    text = "user_id,item_id,title\nü,é,Café\nü,b,x\n"
    code, made, err = run("interactions", text.encode(encoding), *TITLED, "--encoding", encoding)
    assert code == 0, err
    assert made["users"] == {"ü": [("é", 0), ("b", 0)]} and made["titles"]["é"] == "Café"


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "user_id,item_id\n1,2\n1,3\n")
    return file.getvalue()


def test_compressed_files(run):
    plain = b"user_id,item_id\n1,2\n1,3\n"
    packed = [pack(plain) for pack in (gzip.compress, bz2.compress, lzma.compress)]
    for data in [*packed, zipped("a.csv"), zipped("a/", "a/a.csv", "__MACOSX/a/._a.csv")]:
        assert run("interactions", data)[1]["users"] == {"1": [("2", 0), ("3", 0)]}
    code, _, err = run("interactions", zipped("a.csv", "b.csv"))
    assert code == 2 and len(err) == 1 and "holds 2 files" in err[0]


def test_parquet_is_read_where_pandas_reads_it_and_named_elsewhere(run):
    if find_spec("pyarrow") is None:
        code, _, err = run("interactions", b"PAR1....PAR1")
        assert code == 2 and len(err) == 1 and "pyarrow" in err[0]
        return
    file = io.BytesIO()
    times = pd.to_datetime(["2020-05-05 14:08:48.000000002", "2020-05-05 14:08:48.000000001"])
    frame = pd.DataFrame({"user_id": [7, 7], "item_id": ["a", "b"], "timestamp": times, "genres": [["x"], []]})
    frame.to_parquet(file)
    code, _, err = run("interactions", file.getvalue(), *TIMED, "--separator", ";")
    assert code == 2 and len(err) == 1 and "is a Parquet file, on which" in err[0]
    assert run("interactions", file.getvalue(), *TIMED)[1]["users"] == {
        "7": [("b", 1588687728000000001), ("a", 1588687728000000002)]
    }


# --- quotes and titles ---


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            'user_id,item_id,timestamp\nu1,"a,1\nu2,b,2\nu3,c",3\nu4,d,4\nu5,e,5\n',
            "line 2: a quote opens there and closes in line 4",
        ),
        (
            'user_id,item_id,title\nu1,a,Foo\nu1,b,"Foo\nu2,b,Bar\nu3,c,Baz"\n',
            "line 3: a quote opens there and closes in line 5",
        ),
        ('title,user_id,item_id\n"Foo,u1,a\nBar",u2,b\n', "line 2: a quote opens there and closes in line 3"),
        ('user_id,item_id\nu1,"a\nb"\n', "line 2: a quote opens there and the item goes on"),
        ('user_id,item_id\nu1,a\nu1,"abc\nu2,d\n', "line 3: a quote opens a value that does not end"),
        ('user_id,item_id\nu1,"a"b\n', "line 2: a quote opens a value that does not end"),
        ('title,user_id,item_id\n"Foo\nbar",u1,a\n\nx,u2,\n', "line 5: user or item is empty"),
        ('title,user_id,item_id,timestamp\n"Foo\n\nbar",u1,a,1\nx,u2,b,soon\n', "line 5: timestamp 'soon'"),
    ],
)
def test_quotes_that_swallow_rows_are_refused_and_lines_are_counted_right(data, words, run):
    code, _, err = run("interactions", data, *(TITLED * ("title" in data)), *(TIMED * ("timestamp" in data)))
    assert code == 2 and len(err) == 1 and words in err[0], err


TITLES = ["plain", 'The "Best" Of', '"Heroes"', "with, comma", "several\nlines", "a\ttab", '7" single', "", "über 中"]


@pytest.mark.parametrize("how", [{"sep": ","}, {"sep": "\t"}, {"sep": ";"}, {"sep": "\t", "quoting": 1}, {"sep": "|"}])
def test_titles_that_pandas_wrote_come_back(how, run, tmp_path):
    frame = pd.DataFrame({"item_id": [f"i{n}" for n in range(len(TITLES))], "title": TITLES, "user_id": "u"})
    flags = ["--separator", how["sep"]]
    code, made, err = run("interactions", frame.to_csv(index=False, **how), *TITLED, *flags)
    assert code == 0, err
    assert list(made["titles"].values()) == [" ".join(title.split()) for title in TITLES]
    (tmp_path / "titles").write_text(frame.to_csv(index=False, **how), encoding="utf-8")
    flags = ["--titles", tmp_path / "titles", "--titles_separator", how["sep"]]
    code, made, err = run("interactions", "user_id,item_id\nu,i1\nu,i4\n", *flags)
    assert made["titles"] == {"i1": 'The "Best" Of', "i4": "several lines"}


def test_quotes_of_a_tsv_that_does_not_quote_are_kept(run):
    titles = ['"Heroes"', '"We" said', 'open "', '"open', "plain"]
    data = "user_id\titem_id\ttitle\n" + "".join(f"u\ti{n}\t{title}\n" for n, title in enumerate(titles))
    assert list(run("interactions", data, *TITLED)[1]["titles"].values()) == titles


def test_an_empty_title_neither_replaces_nor_blocks_a_full_one(run, tmp_path, capsys):
    (tmp_path / "titles").write_text("item_id\ttitle\na\t\na\tfrom file\nb\t \nb\tof b\nc\tunused\n")
    data = "user_id,item_id,title\nu,a,\nu,c,of c\nu,c,\nu,c, \nu,b,\nu,d,\n"
    _, made, _ = run("interactions", data, *TITLED, "--titles", tmp_path / "titles")
    assert made["titles"] == {"a": "from file", "b": "of b", "c": "of c", "d": ""}
    (tmp_path / "meta").write_text(
        "".join(json.dumps({"item_id": "a", "title": t}) + "\n" for t in ("", None, " ", "full"))
    )
    _, made, _ = run("jsonl", '{"user_id": "u", "item_id": "a"}\n', "--meta", tmp_path / "meta")
    assert made["titles"] == {"a": "full"}


def test_the_number_of_titles_is_printed(module, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("user_id,item_id\nu,a\nu,b\nu,c\n")
    (tmp_path / "titles.csv").write_text("item_id,title\na,A\nb,\nzz,Z\nc,C\n")
    flags = ["--input", tmp_path / "a.csv", "--titles", tmp_path / "titles.csv", "--name", "made", "--output", tmp_path]
    module.main(["interactions", *map(str, flags)])
    assert "2 of 3 items with a title" in capsys.readouterr().out


def test_titles_without_a_header_in_latin_1(run, tmp_path):
    (tmp_path / "u.item").write_bytes("a|Café (1995)|x\nb|Bar|y\n".encode("latin-1"))
    flags = ["--titles", tmp_path / "u.item", "--titles_header", "none", "--titles_columns", "item_id,title,_"]
    _, made, err = run("pairs", "u a\nu b\n", *flags, "--titles_encoding", "latin-1")
    assert made["titles"] == {"a": "Café (1995)", "b": "Bar"}, err


# --- ids ---

IDS = [
    "plain",
    "a b",
    "a  b",
    " lead",
    "trail ",
    "tab\there",
    "new\nline",
    "cr\rhere",
    "ls\u2028",
    "nel\x85",
    "nb\xa0sp",
]
IDS += [
    '"',
    '"quoted"',
    '""x',
    "it's",
    "back\\slash",
    "\\t",
    "\ufeffbom",
    "fs\x1c",
    "end \n",
    "\\u00a0x",
    "#",
    "nan",
    "NA",
    "0",
    "007",
    "é中🎉",
    "a,b",
    "a;b",
]


def test_any_id_goes_out_and_comes_back(run, back, tmp_path):
    """Through JSON lines, which can hold every id, in an order that numbers items otherwise than their users do."""
    rng = np.random.default_rng(0)
    events = [(user, item, int(rng.integers(9))) for user in IDS for item in rng.permutation(IDS)[:7]]
    rng.shuffle(events)
    data = "".join(json.dumps(dict(zip("uit", event, strict=True)), default=str) + "\n" for event in events)
    code, made, err = run("jsonl", data, "--user", "u", "--item", "i", "--timestamp", "t")
    assert code == 0, err
    info = made["info"]
    assert info["users"] == len(IDS) and info["interactions"] == len(events) and len(made["titles"]) == info["items"]
    names = dict(zip(dict.fromkeys(event[0] for event in events), made["users"], strict=True))
    assert all(names[text] == text for text in ("plain", "a b", '"quoted"', "back\\slash", "nan", "007", "é中🎉"))
    for user in IDS:
        mine = sorted((e for e in events if e[0] == user), key=lambda e: int(e[2]))
        assert made["users"][names[user]] == [(names[str(item)], int(time)) for _, item, time in mine]
    again = back(tmp_path / "made", "--titles", tmp_path / "made" / "items.tsv")
    assert again["info"]["fingerprint"] == info["fingerprint"] and again["users"] == made["users"]
    for name in ("user_ids.txt", "items.tsv", "items.npy", "offsets.npy", "timestamps.npy"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


def test_a_carriage_return_within_a_line_belongs_to_its_value(run):
    data = 'user_id,item_id,title\r\nu,a\rb,"one\rtwo ""three"""\r\nu,c,x\r\n'
    _, made, err = run("interactions", data, *TITLED)
    assert made["titles"] == {"a\\u000db": 'one two "three"', "c": "x"}, err


def test_ids_that_would_become_one_are_refused(run):
    code, _, err = run("interactions", "user_id,item_id\nu,a  b\nu,a\\u0020\\u0020b\n")
    assert code == 2 and len(err) == 1 and "rename one" in err[0]


def test_titles_find_ids_that_are_written_otherwise(run, tmp_path):
    (tmp_path / "titles").write_text("item_id,title\na  b,two spaces\n")
    _, made, _ = run("interactions", "user_id,item_id\nu,a  b\n", "--titles", tmp_path / "titles")
    assert list(made["titles"].values()) == ["two spaces"]


@pytest.mark.parametrize(
    ("command", "data", "words"),
    [
        ("sequences", "1 ² 3\n", "line 1: '²' is no whole number"),
        ("sequences", "\n1 2 3\n\n2 3 x\n", "line 4: 'x' is no whole number"),
        ("sequences", "1 2\n2 3\n", "`pairs`"),
        ("sequences", "1 2\n1 3\n", "`pairs`"),
        ("sequences", "1 2 5\n2 2\n2 3\n", "`pairs`"),
        ("pairs", "1 2\n\n1 2 3\n", "line 3: 3 values"),
        ("pairs", "1\n", "line 1: 1 values"),
        ("pairs", "user item\n1 2\n", "line 1: this is a header line"),
        ("pairs", "", "is empty"),
        ("lists", "user_id\titem_ids\ttimestamps\n1\ta b\t5 ²\n", "line 2: timestamp '²'"),
        ("lists", "user_id\titem_ids\ttimestamps\n1\ta b\t5 6\n\n2\tc\t99999999999999999999\n", "line 4: timestamp"),
        ("lists", "user_id\titem_ids\ttimestamps\n1\ta b\t5 6\n2\tc\t\n", "line 3: 1 items but 0 timestamps"),
        ("lists", "user_id\titem_ids\ttimestamps\n \ta b\t5 6\n", "line 2: the user is empty"),
        ("lists", "user_id\titem_ids\ttimestamps\titem_numbers\n1\ta b\t5 6\t1\n", "line 2: item_numbers"),
        ("lists", "user_id\titem_ids\ttimestamps\titem_numbers\n1\ta b\t5 6\t1 3\n", "item_numbers are not 1 to 2"),
        ("lists", "user_id\titem_ids\ttimestamps\titem_numbers\n1\ta a\t5 6\t1 2\n", "line 2: item_numbers has two"),
        ("prepared", 'reviewerID,asin\nA,"[1, 2.5]"\n', "line 2: asin is no list of whole numbers (it holds 2.5)"),
        (
            "prepared",
            'reviewerID,asin\nA,"[1]"\nB,"[1, ""x""]"\n',
            "line 3: asin is no list of whole numbers (it holds 'x')",
        ),
        ("prepared", 'reviewerID,asin\nA,"[1, true]"\n', "(it holds True)"),
        ("prepared", 'reviewerID,asin\nA,"[1, nan]"\n', "(it holds None)"),
        ("prepared", 'reviewerID,asin\nA,"[1e400]"\n', "(it holds inf)"),
        ("prepared", 'reviewerID,asin\nA,"[9007199254740993.0]"\n', "(it holds 9007199254740992.0)"),
        ("prepared", 'reviewerID,asin\nA,"[np.int64(1)]"\n', "(no list of plain values)"),
        ("prepared", f"reviewerID,asin\nA,{'[' * 9000}\n", "line 2: asin is no list"),
        ("prepared", 'reviewerID,asin,title\nA,"[0, 3]","[\'x\']"\n', "line 2: title is no list of as many"),
        ("prepared", 'reviewerID,asin,title\nA,"[0, 3]",x\n', "line 2: title is no list of as many"),
    ],
)
def test_other_formats_refuse_with_the_right_line(command, data, words, run):
    code, _, err = run(command, data)
    assert code == 2 and len(err) == 1 and words in err[0], err


# --- pairs, prepared, JSON lines ---


def test_pairs(run):
    code, made, err = run("pairs", "1 5\n1 3\n\nann\tx\n1 5\nann y\n")
    assert code == 0, err
    assert made["users"] == {"1": [("5", 0), ("3", 0), ("5", 0)], "ann": [("x", 0), ("y", 0)]}


def test_titles_of_the_authors_csv_are_python_lists_with_nan(run):
    lines = ["A,\"[0, 3, 4]\",\"['x', nan, 'w']\"", 'B,"[3, 0]","[""it\'s"", null]"', 'C,"[7, 8.0]",']
    code, made, err = run("prepared", "reviewerID,asin,title\n" + "\n".join(lines) + "\n")
    assert code == 0, err
    assert made["users"]["C"] == [("7", 0), ("8", 0)]
    assert made["titles"] == {"0": "x", "3": "it's", "4": "w", "7": "", "8": ""}


AMAZON = {"user_id": "u", "parent_asin": "p", "asin": "q", "rating": 5.0, "timestamp": 1588601284123, "title": "t"}
YELP = {"user_id": "u", "business_id": "p", "stars": 4.0, "date": "2018-07-07 22:09:11", "text": "x"}
STEAM = {"username": "u", "product_id": "p", "date": "2018-07-07", "text": 'it\'s "\\d" fun', "hours": 0.1}


@pytest.mark.parametrize(
    ("preset", "write", "row", "meta", "time"),
    [
        ("amazon2023", json.dumps, AMAZON, {"parent_asin": "p", "title": "T"}, 1588601284123),
        ("yelp", json.dumps, YELP, {"business_id": "p", "name": "T"}, 1531001351),
        ("steam", repr, STEAM, {"id": "p", "app_name": "T"}, 1530921600),
        ("steam", lambda row: repr(row).replace(" '", " u'"), STEAM, {"id": "p", "app_name": "T"}, 1530921600),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(b"", b"\n"), (b"\xef\xbb\xbf", b"\n"), (b"", b"\r"), (b"", b"\r\n")])
def test_presets_of_json_lines(preset, write, row, meta, time, start, end, run, tmp_path):
    (tmp_path / "meta").write_bytes(start + write(meta).encode() + end)
    data = start + (write(row).encode() + end) * 2
    code, made, err = run("jsonl", data, "--preset", preset, "--meta", tmp_path / "meta")
    assert code == 0 and not err, err
    assert made["users"] == {"u": [("p", time)] * 2} and made["titles"] == {"p": "T"}
    assert made["info"]["bad_lines"] == 0


def test_flags_name_the_fields_and_overrule_the_preset(run):
    row = {"who": 5, "what": 123456789012345678901234567890, "when": 1588601284.25, "stars": "4.5"} | AMAZON
    flags = ["--user", "who", "--item", "what", "--timestamp", "when"]
    assert run("jsonl", json.dumps(row), *flags, "--rating", "stars")[1]["users"] == {
        "5": [(str(row["what"]), 158860128425)]
    }
    flags = ["--preset", "amazon2023", "--item", "asin"]
    assert run("jsonl", json.dumps(row), *flags)[1]["users"] == {"u": [("q", 1588601284123)]}


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_times_of_json_lines_are_not_rounded(write, run):
    texts = ["1588601284.123456789", "1588601284.123456788", "1588601284", "1588601284.5", "-3"]
    lines = [
        write({"user_id": "u", "item_id": item, "t": 7}).replace("7", text)
        for item, text in zip("abcde", texts, strict=True)
    ]
    code, made, err = run("jsonl", "\n".join(lines), "--timestamp", "t")
    assert code == 0, err
    assert order(made) == "ecbad" and made["info"]["timestamp_ties"] == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"user_id": true, "item_id": 1, "t": 1, "r": 1}', "user_id is no text"),
        ('{"user_id": 5.5, "item_id": 1, "t": 1, "r": 1}', "user_id is no text"),
        ('{"user_id": NaN, "item_id": 1, "t": 1, "r": 1}', "user_id is no text"),
        ('{"user_id": " ", "item_id": 1, "t": 1, "r": 1}', "user_id is no text"),
        ('{"user_id": "u", "t": 1, "r": 1}', "no field 'item_id'"),
        ('{"user_id": "u", "item_id": 1, "t": NaN, "r": 1}', "'NaN' is no number"),
        ('{"user_id": "u", "item_id": 1, "t": 18446744073709551615, "r": 1}', "'18446744073709551615' does not fit"),
        ('{"user_id": "u", "item_id": 1, "t": true, "r": 1}', "t is neither number nor text"),
        ('{"user_id": "u", "item_id": 1, "t": "soon", "r": 1}', "'soon' is no number"),
        ('{"user_id": "u", "item_id": 1, "t": 1, "r": "five"}', "r is no number"),
        ('{"user_id": "u", "item_id": 1, "t": 1, "r": Infinity}', "r is no number"),
        ('["user_id"]', "no object"),
        ("{[]: 1}", "neither JSON nor a Python literal"),
        ("(" * 5000, "neither JSON nor a Python literal"),
        ("__import__('os')", "neither JSON nor a Python literal"),
        (b'{"user_id": "\xff", "item_id": 1}', "neither JSON nor a Python literal"),
    ],
)
def test_lines_that_cannot_be_used_are_counted_and_named(bad, words, run):
    good = b'{"user_id": "u", "item_id": 1, "t": 1, "r": 1}\n'
    data = good + b"\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n" + good
    flags = ["--timestamp", "t", "--rating", "r"]
    code, _, err = run("jsonl", data, *flags)
    assert code == 2 and len(err) == 1 and "1 of 4 lines" in err[0] and f"line 3 ({words}" in err[0]
    code, made, err = run("jsonl", data, *flags, "--max_bad_lines", 0.5)
    assert code == 0 and "1 of 4 lines" in err[0] and "ratings are read and not used" in err[1] and len(err) == 2
    assert made["info"]["bad_lines"] == 1 and made["info"]["interactions"] == 2


LINE = '{"uid": "u", "iid": "i"}\n'
META = '{"asin": "i", "name": "Tea"}\n'


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "field 'user_id'; one has uid, iid: name yours with --user"),
        (["--user", "uid"], "field 'item_id'; one has uid, iid: name yours with --item"),
        (["--user", "uid", "--item", "iid", "--timestamp", "t"], "name yours with --timestamp"),
        (["--user", "uid", "--item", "iid", "--rating", "r"], "name yours with --rating"),
        (
            ["--user", "uid", "--item", "iid", "--meta"],
            "field 'item_id'; one has asin, name: name yours with --meta_item",
        ),
        (["--user", "uid", "--item", "iid", "--meta_item", "asin", "--meta"], "name yours with --meta_title"),
    ],
)
def test_fields_of_other_names_are_told_before_the_file_is_read(flags, told, run, tmp_path, monkeypatch, module):
    read = []
    in_parallel = sys.modules["jsonl"].in_parallel
    monkeypatch.setattr(sys.modules["jsonl"], "in_parallel", lambda *args: read.append(args) or in_parallel(*args))
    (tmp_path / "meta").write_text(META)
    code, _, err = run("jsonl", LINE * 3, *flags, *[tmp_path / "meta"] * (flags[-1:] == ["--meta"]))
    assert code == 2 and len(err) == 1 and told in err[0] and "max_bad_lines" not in err[0] and not read


def test_names_of_fields_that_are_no_text_are_told_too(run):
    code, _, err = run("jsonl", "{1: 2, 'user_id': 3}\n" * 3)
    assert code == 2 and len(err) == 1 and "field 'item_id'; one has 1, user_id: name yours with --item" in err[0]


def test_a_preset_whose_fields_the_file_lacks_sends_to_jsonl(run):
    code, _, err = run("amazon2018", LINE * 3)
    assert code == 2 and len(err) == 1 and "field 'reviewerID'" in err[0] and "with `jsonl`" in err[0]


@pytest.mark.parametrize(
    "text", ['[{"user_id": 1, "item_id": 2}]', '[\n{"user_id": 1},\n{"user_id": 2}\n', "1\n2\n", "x"]
)
@pytest.mark.parametrize("where", ["input", "meta"])
def test_json_that_is_no_object_per_line_is_told(text, where, run, tmp_path):
    (tmp_path / "meta").write_text(text if where == "meta" else META)
    data = text if where == "input" else '{"user_id": 1, "item_id": 2}\n'
    code, _, err = run("jsonl", data, "--meta", tmp_path / "meta", "--meta_item", "asin", "--meta_title", "name")
    named = tmp_path / ("source" if where == "input" else "meta")
    assert code == 2 and len(err) == 1 and f"{named} is to hold a JSON object" in err[0] and "line 1: " in err[0]


def test_json_lines_that_mix_numbers_and_dates_are_refused(run):
    lines = [f'{{"user_id": "u", "item_id": 1, "t": {time}}}\n' for time in ("5", "", "6", '"2020-05-05"')]
    code, _, err = run("jsonl", "".join(lines), "--timestamp", "t", "--max_bad_lines", 0.9)
    assert code == 2 and len(err) == 1 and "line 4: t is a date" in err[0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["interactions", "--bogus"],
        ["jsonl", "--preset", "bogus"],
        ["interactions", "--name", "x"],
        ["stats", "none"],
        ["download", "--category", "x", "--tries", "0"],
    ],
)
def test_wrong_flags_give_one_line(arguments, module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_field_is_not_the_user_and_the_item(run):
    code, _, err = run("jsonl", '{"user_id": 1, "item_id": 2}\n', "--user", "item_id")
    assert code == 2 and "--user and --item are both item_id" in err[0]


@pytest.mark.parametrize(
    "flags", [["--k", 0], ["--k", "x"], ["--max_bad_lines", "nan"], ["--max_bad_lines", -1], ["--max_bad_lines", 10]]
)
def test_numbers_that_mean_nothing_are_refused(flags, run):
    code, _, err = run("jsonl", '{"user_id": 1, "item_id": 2}\n', *flags)
    assert code == 2 and len(err) == 1 and flags[0] in err[0]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a b", "x\n", "."])
def test_names_that_are_no_folder_s_are_refused(name, run, tmp_path):
    code, _, err = run("pairs", "1 2\n", name=name)
    assert code == 2 and len(err) == 1 and "--name" in err[0] and [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("command", ["sequences", "pairs", "jsonl"])
def test_parquet_is_named_where_it_is_not_read(command, run):
    code, _, err = run(command, b"PAR1....PAR1")
    assert code == 2 and len(err) == 1 and "Parquet" in err[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset.json", "{}"),
        ("dataset.json", "["),
        ("dataset.json", "[" * 100_000),
        ("dataset.json", '{"timestamp_ties": 0, "timestamp_decimals": "two", "name": 1, "users": "many"}'),
        ("dataset.json", '{"timestamp_ties": [], "timestamp_decimals": [2], "name": 1, "users": 1, "items": []}'),
        ("items.npy", "x"),
        ("items.npy", [1.5, 2]),
        ("items.npy", [[1, 2], [1, 2]]),
        ("offsets.npy", [1, 1, 2]),
        ("offsets.npy", [0, 3, 2]),
        ("offsets.npy", []),
        ("user_ids.txt", ""),
        ("items.tsv", ""),
    ],
)
def test_a_damaged_dataset_gives_one_line(name, text, run, module, tmp_path, capsys):
    run("pairs", "1 2\n2 3\n")
    path = tmp_path / "made" / name
    path.write_text(text) if isinstance(text, str) else np.save(path, text)
    for command in ["export", *["stats"] * (name == "dataset.json")]:
        with pytest.raises(SystemExit) as ended:
            module.main([command, str(tmp_path / "made")])
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_pipe_is_refused_and_not_waited_for(module, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as ended:
        module.main(["pairs", "--input", str(tmp_path / "pipe"), "--name", "made", "--output", str(tmp_path)])
    assert ended.value.code == 2 and "is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("pairs --input a.txt --input b.txt --name made", "--input: it is given twice"),
        ("pairs --input a.txt --name made --name=again", "--name: it is given twice"),
        ("pairs --input a.txt --name made --titles ", "is empty"),
        ("pairs --input= --name made", "is empty"),
        ("stats ", "is empty"),
    ],
)
def test_nothing_of_the_command_line_is_dropped(module, words, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("1 2\n1 3\n")
    with pytest.raises(SystemExit) as ended:
        module.main(words.split(" "))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and told in line and {path.name for path in Path().iterdir()} == {"a.txt", "b.txt"}


@pytest.mark.parametrize(
    "text",
    [
        "user_id, item_id, time\nu 1, a b, 5\nu 1, c, 6\nu 1, d, 7\n",
        "user_id,item_id,time\nu 1, a b, 5\nu 1, c, 6\nu 1, d, 7\n",
        'user_id, item_id, time\n"u 1", "a b", 5\n"u 1", "c", 6\n"u 1", "d", 7\n',
        "user_id | item_id | time\nu 1 | a b | 5\nu 1 | c | 6\nu 1 | d | 7\n",
        "user_id;  item_id;time\nu 1  ;a b;5\nu 1;  c ;6\nu 1 ;d;7\n",
    ],
)
def test_spaces_beside_separators_are_no_part_of_ids(text, run):
    code, made, err = run("interactions", text, "--timestamp", "time")
    assert code == 0 and err == [] and made["users"] == {"u 1": [("a b", 5), ("c", 6), ("d", 7)]}


def test_a_space_in_front_of_some_ids_is_a_part_of_them(run):
    code, made, _ = run("interactions", "user_id,item_id\nu,a\nu, a\nu,b\n")
    assert code == 0 and len(made["titles"]) == 3


def test_a_path_below_the_home_folder_may_follow_an_equals_sign(module, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,1\n1,2\n1,3\n")
    module.main(["interactions", "--input=~/a.csv", "--output=~", "--name", "made"])
    assert (tmp_path / "made" / "dataset.json").exists() and not Path("~").exists()


def test_a_pipe_that_closes_early_does_not_hide_that_no_dataset_was_made(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,1\n1,2\n1,3\n")
    words = ["interactions", "--input", tmp_path / "a.csv", "--output", tmp_path, "--name", "made"]
    script = shlex.join([sys.executable, "-u", "datasets/process.py", *map(str, words)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script} | true"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == (tmp_path / "made").exists() and len(done.stderr.splitlines()) <= 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("redirect", "code"), [(">/dev/full", 2), ("| true", 0), (">&-", None)])
def test_output_that_nobody_takes_gives_one_line(redirect, code, run, tmp_path):
    run("pairs", "1 2\n1 3\n")
    words = [sys.executable, "datasets/process.py", "stats", str(tmp_path / "made")]
    script = f"set -o pipefail; {shlex.join(words)} {redirect}"
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert code in (done.returncode, None) and "Traceback" not in done.stderr
    assert done.stderr.splitlines() == ["process.py: No space left on device; free space, or choose another place"] * (
        code == 2
    )
