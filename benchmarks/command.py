"""The command line of a benchmark: where its record goes, and the one line that ends it when something is wrong."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from utils.checked import TEXT, read_json
from utils.cli import ROOT
from utils.errors import Parser, RunError, UserError, told_in_one_line

PLACES = {"settings": {"dataset": TEXT}, "datasets": {"*": TEXT}, "dataset": TEXT}  # where a record names its data


def command_line(description: str, record: str | None = None) -> Parser:
    """Flags of a benchmark; --out if it has a record, results/benchmarks/`record`.json where none is given."""
    parser = Parser(description=description)
    if record:
        default = ROOT / "results" / "benchmarks" / f"{record}.json"
        parser.add_argument("--out", type=file_to_write, default=default, help="the record (default: %(default)s)")
    return parser


def file_to_write(text: str) -> Path:
    """A file is written beside its place and moved there: what cannot be is told before anything is measured."""
    path, folder = Path(text), Path(os.path.realpath(text)).parent
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .json")
    if (path.is_file() or not path.exists()) and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return path
    raise argparse.ArgumentTypeError(f"{text} is no file in a folder that may be written to")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")


def check_dataset(args: argparse.Namespace, dataset_of: Callable[[dict], str]) -> None:
    """UserError where --out holds a record of another dataset than --dataset."""
    if args.out.exists() and (held := dataset_of(read_json(args.out, "", PLACES))) != args.dataset:
        raise UserError(f"--out {args.out} holds what was measured on {held}: give another, or remove it")


def run_main(main: Callable[[], None]) -> None:
    with told_in_one_line(Path(sys.argv[0]).name, "start it again"):
        try:
            main()
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines()[-1:]  # where it was not shown
            raise RunError("; ".join([f"a process of it ended with status {error.returncode}", *said])) from None
