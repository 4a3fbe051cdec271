"""Kill steps 1, 3 and 4 before each file-system event and at random moments, and start them again.

python benchmarks/kills.py                 about half an hour
python benchmarks/kills.py --random 4 --steps train_sr_trad

Each step runs fresh, resumed and in the place of an older run, on tiny data. After each kill the same command runs with
--resume auto, and where an older run was being replaced also with the default. It must end with the metrics and the
hashes of the weights of a run that nobody killed. `--random` kills real processes, which run all three steps.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import tiny_sources
from kills import STEPS, contents, outcome, prepare, restore, snapshots, start
from processes import FLAGS

from benchmarks.command import command_line, run_main
from utils.errors import UserError
from utils.files import write_json
from utils.report import environment, markdown_table

MODES = ("fresh", "resumed", "replacing")


def kills(name: str, sources: Path, work: Path) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """Of each kill: the mode, the copy of the folder that it left, and what --resume may be after it.

    The run that nobody killed is in work/place when a copy is given.
    """
    place = work / "place"
    prepare(name, sources, place)
    shutil.copytree(place, work / "before")
    fresh = snapshots(place, work / "fresh", lambda: start(name, sources, place, 2, "auto"))
    yield from (("fresh", copy, ("auto",)) for copy in fresh)
    trained = [copy for copy in fresh if list(copy.glob("run/checkpoints/step-*/state.json"))]
    restore(trained[len(trained) // 2], place)
    resumed = snapshots(place, work / "resumed", lambda: start(name, sources, place, 2, "auto"))
    yield from (("resumed", copy, ("auto",)) for copy in resumed)
    restore(work / "before", place)
    start(name, sources, place, 1, "never")
    replacing = snapshots(place, work / "replacing", lambda: start(name, sources, place, 2, "never"))
    yield from (("replacing", copy, ("auto", "never")) for copy in replacing)


def again(name: str, sources: Path, place: Path, resume: str) -> bool:
    """Start once more; False where --resume auto kept an older run, which was not replaced yet."""
    try:
        start(name, sources, place, 2, resume)
    except UserError as error:
        if resume != "auto" or "--resume never to replace it" not in str(error):
            raise
        return False
    return True


def each_event(name: str) -> dict[str, dict[str, int]]:
    """Of each mode: kills, starts after them, older runs that were kept, and starts that ended in another way."""
    found = {mode: {"kills": 0, "starts": 0, "kept": 0, "other": 0} for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        work, sources = Path(folder), Path(folder) / "sources"
        sources.mkdir()
        tiny_sources(sources)
        place, wanted = work / "place", None
        for mode, copy, ways in tqdm(list(kills(name, sources, work)), desc=name, unit="kill"):
            if wanted is None:  # all modes end in the same run, the last of which is there now
                wanted = outcome(place / "run"), set(contents(place))
            count = found[mode]
            count["kills"] += 1
            for resume in ways:
                restore(copy, place)
                count["starts"] += 1
                if not again(name, sources, place, resume):
                    count["kept"] += 1
                    again(name, sources, place, "never")
                count["other"] += (outcome(place / "run"), set(contents(place))) != wanted
    return found


def run_all(sources: Path, place: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "processes.py"), str(sources), str(place)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def random_moments(number: int, seed: int = 0) -> dict[str, int]:
    """Kill a process that runs the three steps `number` times, each at a random moment after the first step began."""
    rng, found = random.Random(seed), {"kills": 0, "other": 0}
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        sources.mkdir()
        tiny_sources(sources)
        place, done = Path(folder) / "place", Path(folder) / "done"

        def until_it_begins(process: subprocess.Popen) -> None:
            while process.poll() is None and not place.exists():
                time.sleep(0.01)

        process = run_all(sources, place)
        until_it_begins(process)
        begun = time.perf_counter()
        if process.wait() != 0:
            raise RuntimeError("the run that is not killed failed")
        lasts = time.perf_counter() - begun
        wanted = [outcome(place / name) for name in FLAGS], set(contents(place))
        place.rename(done)
        bar = tqdm(total=number, desc="random moments", unit="kill")
        while found["kills"] < number:
            process = run_all(sources, place)
            until_it_begins(process)
            time.sleep(rng.uniform(0, lasts))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                found["kills"] += 1
                bar.update()
            process.wait()
            ended = run_all(sources, place).wait() == 0
            same = ended and ([outcome(place / name) for name in FLAGS], set(contents(place))) == wanted
            found["other"] += not same
            shutil.rmtree(place)
    return found


def table(record: dict) -> str:
    rows = []
    for name, modes in record["events"].items():
        for mode, count in modes.items():
            rows.append([name, mode, count["kills"], count["starts"], count["other"]])
    at_random = record["random"]
    rows.append(["all three steps, real processes", "random moments", at_random["kills"], at_random["kills"]])
    rows[-1].append(at_random["other"])
    cells = [[str(cell) for cell in row] for row in rows]
    return markdown_table(["step", "run", "kills", "started again", "ended in another way"], cells)


def main() -> None:
    parser = command_line(__doc__, "kills")
    steps = [name for name in STEPS if name != "train_open_p5"]
    parser.add_argument("--steps", nargs="*", choices=steps, default=steps)
    parser.add_argument("--random", type=int, default=24, help="kills at random moments")
    args = parser.parse_args()
    about = environment(Accelerator(cpu=True))
    record = {"events": {name: each_event(name) for name in args.steps}, "random": random_moments(args.random)}
    write_json(record | {"environment": about}, args.out)
    print(table(record))


if __name__ == "__main__":
    run_main(main)
