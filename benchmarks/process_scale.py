"""Make raw Amazon 2018 files of any size, process them, and print speed and memory.

    python benchmarks/process_scale.py                              the paper's Cloth: 11.3 million reviews
    python benchmarks/process_scale.py --reviews 100000 --items 20000

Generated reviews have text of realistic length, 2% repeated (user, item) pairs, whole-day timestamps (hence ties) and
popularity that follows a power law. A sample is processed by a plain in-memory loop too, and must come out the same.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.command import command_line, count, run_main
from utils.errors import RunError, UserError

CHUNK = 100_000


def text_pool(rng: np.random.Generator, number: int, mean: float) -> list[str]:
    """Texts of Zipf-distributed pseudo-words with log-normal length in characters."""
    letters = list("etaoinshrdlucmfwypvbgk")
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(8000)]
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, number) / 6).astype(int)
    return [" ".join(words[w] for w in np.minimum(rng.zipf(1.3, n), 8000) - 1) for n in lengths]


def asin(code: int) -> str:
    return f"B{code:09d}"


def generate(folder: Path, reviews: int, users: int, items: int, seed: int = 0) -> tuple[Path, Path]:
    """Write reviews and metadata, gzip, and return their paths."""
    rng = np.random.default_rng(seed)
    texts, titles = text_pool(rng, 4000, 220.0), text_pool(rng, 4000, 60.0)
    review_file, meta_file = folder / "Generated_5.json.gz", folder / "meta_Generated.json.gz"
    with gzip.open(review_file, "wb", compresslevel=1) as file:
        for low in tqdm(range(0, reviews, CHUNK), desc="generate reviews", disable=None):
            n = min(CHUNK, reviews - low)
            user = (users * rng.random(n) ** 2).astype(np.int64)
            item = (items * rng.random(n) ** 3).astype(np.int64)
            again = np.flatnonzero(rng.random(n) < 0.02)
            again = again[again > 0]
            user[again], item[again] = user[again - 1], item[again - 1]
            day = rng.integers(15000, 17800, n) * 86400
            stars, text = rng.choice([1, 2, 3, 4, 5], n, p=[0.05, 0.05, 0.1, 0.2, 0.6]), rng.integers(0, 4000, n)
            rows = zip(user.tolist(), item.tolist(), day.tolist(), stars.tolist(), text.tolist(), strict=True)
            lines = [
                f'{{"overall": {s}.0, "verified": true, "reviewTime": "06 17, 2018", "reviewerID": "A{u:013d}", '
                f'"asin": "{asin(i)}", "style": {{"Size:": " {s}"}}, "reviewerName": "Customer {u}", '
                f'"reviewText": "{texts[t]}", "summary": "{texts[t][:40]}", "unixReviewTime": {d}}}\n'
                for u, i, d, s, t in rows
            ]
            file.write("".join(lines).encode())
    with gzip.open(meta_file, "wb", compresslevel=1) as file:
        for low in tqdm(range(0, items, CHUNK), desc="generate metadata", disable=None):
            lines = [
                f'{{"category": ["Generated"], "description": ["{texts[i % 4000]}"], "asin": "{asin(i)}", '
                f'"title": "{titles[i * 7 % 4000]}"}}\n'
                for i in range(low, min(low + CHUNK, items))
            ]
            file.write("".join(lines).encode())
    return review_file, meta_file


def take_users(source: Path, target: Path, below: int) -> int:
    """Write the lines of users numbered below `below`, who review most; returns how many."""
    number = 0
    with gzip.open(source, "rb") as lines, open(target, "wb") as file:
        for line in lines:
            start = line.index(b'"A') + 2
            if int(line[start : start + 13]) < below:
                file.write(line)
                number += 1
    return number


def in_memory(path: Path) -> dict[str, list[str]]:
    """The paper's filter in plain Python."""
    with open(path, encoding="utf-8") as file:
        found = map(json.loads, file)
        rows = [(r["reviewerID"], r["asin"], r["unixReviewTime"]) for r in found if r["overall"] >= 3]
    rows.sort(key=lambda r: r[2])
    for place, k in ((0, 5), (1, 20), (0, 5)):
        count = Counter(r[place] for r in rows)
        rows = [r for r in rows if count[r[place]] >= k]
    kept: dict[str, dict[str, None]] = {}
    for user, item, _ in rows:
        kept.setdefault(user, {}).setdefault(item)
    return {user: list(items) for user, items in kept.items() if len(items) >= 5}


def shared_out(process: psutil.Process) -> int:
    """Bytes: pages that processes share are counted in parts where the system tells (Linux), else not."""
    found = process.memory_full_info()
    return getattr(found, "pss", found.uss)


def process(source: Path, place: Path, name: str, *flags: object) -> tuple[float, float]:
    """Seconds, and the peak MiB of one run of process.py with its workers (shared pages split, sampled)."""
    command = [sys.executable, ROOT / "datasets/process.py", "amazon2018", "--input", source, "--name", name]
    begun, peak = time.perf_counter(), 0
    with psutil.Popen([*map(str, command), "--output", str(place), *map(str, flags)]) as child:
        while child.poll() is None:
            try:
                tree = [child, *child.children(recursive=True)]
                peak = max(peak, sum(shared_out(one) for one in tree))
            except psutil.Error:  # one ended meanwhile
                pass
            time.sleep(0.2)
    if child.returncode:
        raise RunError(f"process.py ended with status {child.returncode}")
    return time.perf_counter() - begun, peak / 2**20


LOAD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import psutil
from utils.data import Sequences
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
data = Sequences.load(Path(sys.argv[2]))
seconds = time.perf_counter() - begun
memory = psutil.Process().memory_info().rss
print(seconds, (memory - before) / 2**20, memory / 2**20, data.describe(), sep="|")
"""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--reviews", type=count, default=11_300_000)
    parser.add_argument("--users", type=count, default=1_220_000)
    parser.add_argument("--items", type=count, default=2_700_000)
    parser.add_argument("--sample", type=count, default=5_000, help="users compared with the in-memory loop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source, meta = generate(place, args.reviews, args.users, args.items)
        print(
            f"{source.stat().st_size / 2**20:,.0f} MiB of reviews, {meta.stat().st_size / 2**20:,.0f} MiB of metadata"
        )
        seconds, memory = process(source, place, "scale", "--meta", meta)
        speed = args.reviews / seconds
        print(f"processed: {speed:,.0f} review lines per second ({seconds:.0f} s), peak {memory:,.0f} MiB")
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, str(ROOT), str(place / "scale")],
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout.split("|")
        seconds, more, total = map(float, loaded[:3])
        print(
            f"loaded: {seconds:.3f} s, {more:.1f} MiB more, {total:.0f} MiB with Python and torch; {loaded[3].strip()}"
        )
        sample = place / "sample.json"
        lines = take_users(source, sample, args.sample)
        expected = in_memory(sample)
        if not expected:
            raise UserError("the sample filters to nothing: take a larger --sample")
        process(sample, place, "sample")
        items, offsets = (np.load(place / "sample" / f"{name}.npy") for name in ("items", "offsets"))
        ids = [
            line.split("\t")[0] for line in (place / "sample" / "items.tsv").read_text(encoding="utf-8").splitlines()
        ]
        users = (place / "sample" / "user_ids.txt").read_text(encoding="utf-8").split()
        spans = zip(users, offsets[:-1], offsets[1:], strict=True)
        found = {user: [ids[item] for item in items[low:high]] for user, low, high in spans}
        print(f"sample of {lines:,} lines, {len(expected):,} users left: identical = {found == expected}")


if __name__ == "__main__":
    run_main(main)
