"""A training step of the default teacher beside a busy process, by threads and by what they do while they wait.

    python benchmarks/busy.py
    python benchmarks/busy.py --settings default OMP_WAIT_POLICY=PASSIVE "OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1"

Threads that spin at a barrier keep a core from the thread that they wait for. Each setting, environment variables that
are read when torch is imported, gets a fresh process; "chosen" is what utils/threads.py sets at that moment. The
processes take turns: all settings on the machine as it is, then all beside a process that is always busy, --repeats
times. Ratios are to the first setting in the same turn; medians are reported. Run it on a machine that does nothing
else.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# torch comes before the project, so that the environment is the one that was asked for, whatever the project sets
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune
from benchmarks.command import command_line, count, run_main
from benchmarks.llm_step import ours_loss, seconds, training_step
from models.llm.storage import build_llm_rec, load_base
from models.sr import MODELS
from utils.assets import base_model_path, dataset_folder
from utils.cli import ROOT, resolve
from utils.data import Sequences, shuffled_batches, training_examples
from utils.files import write_json
from utils.report import environment, markdown_table

NAMED = ("default", "chosen")
SETTINGS = [*NAMED, "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=0", "GOMP_SPINCOUNT=10000", "OMP_NUM_THREADS=1"]
CHOSEN = "import os, utils.threads; print(os.environ.get('OMP_NUM_THREADS', os.cpu_count()))"
LOADS = ("quiet", "busy")


def step_seconds(steps: int) -> float:
    """Seconds per optimiser step of finetune.py's default run, over `steps` of them, on a random item table."""
    config = resolve(finetune.main, "teacher", ["--num_layers", "8"], models=MODELS)
    data = Sequences.load(dataset_folder(config["dataset"]))
    examples = training_examples(data, config["train_targets"], config["max_seq_length"])
    index = shuffled_batches(len(examples), config["batch_size"], config["seed"], epoch=0)[: steps + 1]
    batches = [examples.batch(part) for part in index]
    table = torch.randn(data.num_items + 1, 128) * 0.1
    table[0] = 0
    base = load_base(config, base_model_path(config["base_model"]))
    model = build_llm_rec(config, base, table)
    training_step(model, ours_loss, batches[:1])()  # the first is slower
    return seconds(training_step(model, ours_loss, batches[1:])) / len(batches[1:])


@contextmanager
def load(kind: str) -> Iterator[None]:
    """Nothing, or a process that is always busy."""
    if kind == "quiet":
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(setting: str, steps: int) -> float:
    """`step_seconds` in a fresh process with no other variable of OpenMP than those of `setting`."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    if setting == "chosen":
        command = [sys.executable, "-c", CHOSEN]
        out = subprocess.run(command, cwd=ROOT, env=found, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
        found["OMP_NUM_THREADS"] = out.strip()
    elif setting != "default":
        found |= dict(pair.split("=", 1) for pair in setting.split())
    command = [sys.executable, "-W", "ignore", __file__, "--steps", str(steps), "--child"]
    out = subprocess.run(command, env=found, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    return float(out.splitlines()[-1])


def table(record: dict) -> str:
    """Seconds of a step and ratio to the first setting of the same turn, medians over the turns, for each load."""
    first, *_ = record["seconds"]
    header, rows = ["setting"], []
    for kind in LOADS:
        header += [f"{kind}: s/step", f"of {first}"]
    for setting, found in record["seconds"].items():
        row = [setting]
        for kind in LOADS:
            ratios = [own / other for own, other in zip(found[kind], record["seconds"][first][kind], strict=True)]
            row += [f"{statistics.median(found[kind]):.2f}", f"{statistics.median(ratios):.2f}"]
        rows.append(row)
    return markdown_table(header, rows)


def main() -> None:
    parser = command_line(__doc__, "busy")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="default, chosen or NAME=VALUE ...")
    parser.add_argument("--steps", type=count, default=3, help="steps that are timed in each process")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(step_seconds(args.steps))
        return
    wrong = [pair for words in args.settings if words not in NAMED for pair in words.split() if "=" not in pair]
    if wrong:
        parser.error(f"--settings: {wrong[0]} is none of default, chosen and NAME=VALUE")
    found = {setting: {kind: [] for kind in LOADS} for setting in args.settings}
    for turn in range(args.repeats):
        for kind in LOADS:
            with load(kind):
                for setting in args.settings:
                    found[setting][kind].append(measure(setting, args.steps))
                    print(f"turn {turn + 1}, {kind}, {setting}: {found[setting][kind][-1]:.2f} s", flush=True)
    record = {"seconds": found, "steps": args.steps, "repeats": args.repeats, "cores": os.cpu_count()}
    write_json(record | {"environment": environment(Accelerator(cpu=True))}, args.out)
    print(table(record))


if __name__ == "__main__":
    run_main(main)
