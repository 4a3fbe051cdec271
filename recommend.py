"""Recommend: the best next items for a history, from the run folder of any trained recommender.

python recommend.py --history "Star Wars; Fargo"                          titles or ids, oldest first
python recommend.py --input histories.jsonl --output top.csv              one history per line; - is standard input
python recommend.py --run outputs/ml-100k/sasrec --history 50 --candidates candidates.txt
python recommend.py --history 50 --base_model /models/smollm2             where the base model is, if it was moved

JSONL: a list of items per line, or an object with such a list under `history`. CSV: one history per line, one
item per cell; an empty line is an empty history.
In Python: `recommend.load("outputs/ml-100k/sasrec").recommend([["50", "181"]], k=10)`.
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm

from models.fusion import Fusion
from models.llm.open_p5 import OpenP5, load_open_p5
from models.llm.storage import load_llm_rec
from models.sr.storage import load_recommender
from utils import cli
from utils.catalogue import Catalogue
from utils.checked import LONE_SURROGATE, check_file
from utils.errors import RunError, UserError, cut_short
from utils.files import atomic_file, check_writable
from utils.report import parts_of
from utils.run_files import finished_run

HEADER = ["history", "rank", "id", "title", "score", "by_popularity"]  # of answers as CSV


@dataclass(frozen=True)
class Recommendation:
    rank: int
    id: str
    title: str
    score: float


@dataclass(frozen=True)
class Answer:
    """What is recommended after a history, best first, at most k items.

    unknown: items of the history that the dataset does not have, which were skipped. by_popularity: none of them was
    known, so that these are the most frequent items.
    """

    items: list[Recommendation]
    unknown: list[str]
    by_popularity: bool


class Trained:
    """A trained recommender that speaks of items by their original ids and titles."""

    def __init__(self, model: torch.nn.Module, config: dict, catalogue: Catalogue) -> None:
        self.device = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.model, self.config, self.catalogue = model.eval().to(self.device), config, catalogue

    def autocast(self) -> AbstractContextManager:
        """The precision that the run was trained in."""
        reduced = self.config["dtype"] == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if reduced else nullcontext()

    def recommend(
        self,
        histories: Iterable[list[str]],
        k: int = 10,
        exclude_seen: bool = True,
        candidates: list[str] | None = None,
        batch_size: int = 64,
    ) -> list[Answer]:
        """The k best items after each history of ids or titles, oldest first; `candidates`: of these alone.

        What the dataset does not have is left out: `catalogue.doubts` tells of it, and of titles that items share.
        UserError where it has none of the candidates, RunError where a score is no number.
        """
        allowed = np.zeros(len(self.catalogue) + 1, bool)
        numbers = None if candidates is None else [self.catalogue.number(item) for item in candidates]
        allowed[1:] = candidates is None
        allowed[[number for number in numbers or [] if number]] = True
        if not allowed.any():
            raise UserError("none of the candidates is an item of the dataset")
        rest = iter(histories)
        batches = iter(lambda: list(islice(rest, batch_size)), [])
        with torch.inference_mode(), self.autocast(), self.model.for_inference():
            return [answer for batch in batches for answer in self._batch(batch, k, exclude_seen, allowed)]

    def _batch(self, histories: list[list[str]], k: int, exclude_seen: bool, allowed: np.ndarray) -> list[Answer]:
        known = [[number for item in history if (number := self.catalogue.number(item))] for history in histories]
        scores = np.tile(self.catalogue.counts.astype(np.float32), (len(known), 1))  # (B, V + 1): popularity
        rows = [row for row, items in enumerate(known) if items]
        if rows:
            width = min(self.config["max_seq_length"], max(len(known[row]) for row in rows))
            padded = torch.tensor([[0] * (width - len(known[row])) + known[row][-width:] for row in rows])
            scores[rows] = self.model.scores(padded.to(self.device)).float().cpu().numpy()
            if np.isnan(scores[:, 1:]).any():
                raise RunError(
                    "scores are no numbers: the model has diverged, or its weights are damaged; train it again"
                )
        answers = []
        for items, history, row in zip(known, histories, scores, strict=True):
            open_to = allowed.copy()
            open_to[items if exclude_seen else []] = False
            best = best_of(row, np.flatnonzero(open_to), k)
            found = [(self.catalogue.ids[n - 1], self.catalogue.titles[n - 1], float(row[n])) for n in best]
            unknown = [item for item in history if not self.catalogue.number(item)]
            listed = [Recommendation(rank, *what) for rank, what in enumerate(found, 1)]
            answers.append(Answer(listed, unknown, by_popularity=not items))
        return answers


def best_of(scores: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """The k of `items` with the highest scores, the lower number first where scores are equal."""
    values = scores[items]
    if len(values) > k:
        items = items[values >= np.partition(values, -k)[-k]]
    return items[np.lexsort((items, -scores[items]))][:k]


def run_folder(folder: str | Path) -> Path:
    """Where a run is; a relative path starts at the working folder or at the checkout."""
    return next((path for path in (Path(folder), cli.ROOT / folder) if path.is_dir()), Path(folder))


def run_config(folder: str | Path) -> dict:
    """What a finished run was trained with; UserError where there is none."""
    folder = run_folder(folder)
    config, _ = finished_run(folder, f"{folder} holds no finished run: give the folder of one with --run")
    if config.get("kind") == "layers":
        raise UserError(f"{folder} is what evaluate.py --layers measured of {config['run']}: give that with --run")
    return config


def load(folder: str | Path, base_model: str | Path | None = None) -> Trained:
    """A trained recommender from its run folder: traditional, a language model, or a fusion of two.

    A relative path starts at the working folder, else at the checkout. base_model: where the base of the language model
    is now, if it was moved. UserError where the folder holds no finished run or damaged files, or
    base_model is not the base of the run.
    """
    folder = run_folder(folder)
    config = run_config(folder)
    if base_model is not None and not reads_base(config):
        raise UserError(f"--base_model {base_model}: {folder} is no language model; leave it out")
    catalogue = Catalogue.load(folder)
    if config.get("kind") == "sr":
        model = load_recommender(folder, config, catalogue.training_part(config["num_users"]))
    elif config.get("kind") == "fusion":
        model = load_fusion(config, len(catalogue), base_model)
    else:
        model = (load_open_p5 if config.get("kind") == "open_p5" else load_llm_rec)(folder, base_model)
        known = len(model.item_tokens if isinstance(model, OpenP5) else model.table) - 1
        if known != len(catalogue):
            raise UserError(
                f"{folder}: its model knows {known} items, its items.jsonl {len(catalogue)}; train it again"
            )
    return Trained(model, config, catalogue)


def reads_base(config: dict) -> bool:
    """Whether a run, or a part of a fusion, is a language model."""
    if config.get("kind") == "fusion":
        return any(reads_base(run_config(folder)) for folder in parts_of(config))
    return config.get("kind") != "sr"


def load_fusion(config: dict, items: int, base_model: str | Path | None) -> Fusion:
    """The two runs that evaluate.py fused, over so many items, with the weight that it chose."""
    folders = parts_of(config)
    configs = [run_config(folder) for folder in folders]
    bases = {of["base_model"] for of in configs if reads_base(of)}
    if base_model is not None and len(bases) > 1:
        raise UserError(
            f"--base_model is one base, and the two runs have {' and '.join(bases)}: bring the moved one back"
        )
    parts = [load(folder, base_model if reads_base(of) else None) for folder, of in zip(folders, configs, strict=True)]
    if {len(part.catalogue) for part in parts} != {items}:
        raise UserError(f"{config['run']} and {config['fuse']} do not know the {items} items of the fusion; fuse again")
    lengths = [part.config["max_seq_length"] for part in parts]
    return Fusion([part.model for part in parts], lengths, [part.autocast for part in parts], config["weight"])


def text_of(flag: str, path: str) -> str:
    """What a file or a pipe, or standard input for -, holds."""
    try:
        if path == "-":
            if sys.stdin is None:
                raise UserError(f"{flag} -: there is no standard input")
            return sys.stdin.read().removeprefix("\ufeff")  # the mark that some programs begin a file with
        with open(path, encoding="utf-8-sig", newline="") as file:  # a quoted cell may hold any line end
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is no UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give a file that is there and that you may read") from error


def read_histories(path: str) -> Iterator[list[str]]:
    """Histories of a .csv or .jsonl file; what a pipe or standard input (-) holds is told by its first character."""
    text = text_of("--input", path)
    ending = Path(path).suffix.lower()
    if ending not in (".csv", ".jsonl"):
        if path != "-" and Path(path).is_file():
            raise UserError(
                f"--input {path}: its name is expected to end with .csv or .jsonl, which says how it is read"
            )
        ending = ".jsonl" if text.lstrip()[:1] in ("[", "{") else ".csv"
    if ending == ".csv":
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            yield from ([cell.strip() for cell in row if cell.strip()] for row in rows)
        except csv.Error as error:
            raise UserError(f"--input {path}, line {rows.line_num}: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=no_name_twice)
            history = value["history"] if isinstance(value, dict) else value
            if not isinstance(history, list):
                raise ValueError("no list of items")
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f"--input {path}, line {number}: {error}; expected a list or {{'history': [...]}}"
            ) from error
        if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in history):
            raise UserError(f"--input {path}, line {number}: an item is no text or number; expected ids or titles")
        yield [str(item) for item in history]


def no_name_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which the usual reader would keep the last of equal names; ValueError where there are such."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def check_output(output: str, read: list[str]) -> None:
    """Refuse a place for the answers that has another kind of file, is read itself, or is a file of a run."""
    path = Path(output)
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--output {output}: a name that ends in .csv or .jsonl")
    if path.exists() and any(name != "-" and Path(name).exists() and path.samefile(name) for name in read):
        raise UserError(f"--output {output} is read by this command; choose another name")
    if path.is_dir():
        raise UserError(f"--output {output} is a folder; choose another name")
    check_writable(Path(os.path.realpath(path)).parent, "--output")
    if path.exists() and not holds_answers(path):
        raise UserError(f"--output {output} holds something else than answers; choose another place, or remove it")


def holds_answers(path: Path) -> bool:
    """Whether a file begins as `write_answers` begins one; an empty one does too."""
    check_file(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline(1 << 20).strip()
    if path.suffix == ".csv":
        return first in ("", ",".join(HEADER))
    return not first or first.startswith('{"items": [')


def write_answers(answers: list[Answer], file: TextIO, form: str) -> None:
    if form == "jsonl":
        for answer in answers:
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        return
    rows = csv.writer(file)
    rows.writerow(HEADER)
    for number, answer in enumerate(answers, 1):
        rows.writerows([number, *asdict(item).values(), answer.by_popularity] for item in answer.items)


def show(answers: list[Answer]) -> None:
    for number, answer in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"history {number}:")
        if answer.by_popularity:
            print("no item of the history is known: these are the most popular ones")
        for item in answer.items:
            print(f"{item.rank:3}. {item.title or '(no title)'}  [{item.id}]  {item.score:.3f}")


def main(
    *,
    run: str = "outputs/ml-100k/student-4from8",
    history: str | None = None,
    input: str | None = None,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: str | None = None,
    output: str | None = None,
    batch_size: int = 64,
    base_model: str | None = None,
) -> None:
    if (history is None) == (input is None):
        raise UserError('give one of --history "item; item" and --input FILE')
    if input == candidates == "-":
        raise UserError("--input and --candidates are both standard input; give one of them a file")
    if output:
        check_output(output, [path for path in (input, candidates) if path])
    run_config(run)  # before the histories are read, and the model after them: either may take long
    wanted = None
    if candidates:
        wanted = [line.strip() for line in text_of("--candidates", candidates).split("\n") if line.strip()]
    if history is not None:
        histories = [[part.strip() for part in history.split(";") if part.strip()]]
    elif not (histories := list(read_histories(input))):
        raise UserError(f"--input {input} holds no history; expected one per line")
    if any(LONE_SURROGATE.search(item) for items in histories for item in items):
        raise UserError("an item of a history is no text in UTF-8: write it anew")
    trained = load(run, base_model)
    for line in trained.catalogue.doubts(chain.from_iterable(histories)) + trained.catalogue.doubts(wanted or []):
        print(line, file=sys.stderr)
    begun = time.perf_counter()
    with tqdm(histories, desc="recommend", unit="history", disable=None if len(histories) > 1 else True) as bar:
        answers = trained.recommend(bar, k, exclude_seen, wanted, batch_size)
    seconds = time.perf_counter() - begun
    if left_without := [number for number, answer in enumerate(answers, 1) if not answer.items]:
        what = "no candidate is left, as the history has them all; add --exclude_seen false"
        print(f"{what} ({len(left_without):,} histories; the first is number {left_without[0]})", file=sys.stderr)
    if output:
        with atomic_file(Path(output)) as part, open(part, "w", encoding="utf-8", newline="") as file:
            write_answers(answers, file, Path(output).suffix.lstrip("."))
        print(f"{output}: {len(answers):,} histories, {len(answers) / seconds:,.0f} per second")
    else:
        with cut_short():
            show(answers)


if __name__ == "__main__":
    cli.run(main, section=None)
