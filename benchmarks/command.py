"""The command line of a benchmark: where its record goes, and the one line that ends it when something is wrong."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from utils.checked import read_json
from utils.cli import ROOT
from utils.errors import UserError, told_in_one_line


def command_line(description: str, record: str) -> argparse.ArgumentParser:
    """Flags of a benchmark whose record is results/benchmarks/`record`.json unless --out says otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "results" / "benchmarks" / f"{record}.json"
    parser.add_argument("--out", type=file_to_write, default=default, help="the record (default: %(default)s)")
    return parser


def file_to_write(text: str) -> Path:
    """What cannot be written is told before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists and may be written to")
    return path


def check_dataset(args: argparse.Namespace, dataset_of: Callable[[dict], str]) -> None:
    """UserError where --out holds a record of another dataset than --dataset."""
    if args.out.exists() and (held := dataset_of(read_json(args.out, ""))) != args.dataset:
        raise UserError(f"--out {args.out} holds what was measured on {held}: give another, or remove it")


def run_main(main: Callable[[], None]) -> None:
    with told_in_one_line(Path(sys.argv[0]).name, "start it again"):
        main()
