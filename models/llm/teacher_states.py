"""What a frozen teacher gives its students, computed once for all of them: hidden states and user vectors.

Both depend on nothing that trains. They are kept in the teacher's folder, under a name made from all that they depend
on, with their SHA-256, and are read memory-mapped: one row per target of the training examples, in their order. Where
training ends within the first epoch, only the examples that it visits are answered.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from models.interface import Recommender
from models.llm.recommender import LLMRec
from models.llm.storage import load_llm_rec
from utils.checked import check_file, read_array, read_text
from utils.data import Examples, sorted_batches, visited_examples
from utils.errors import UserError
from utils.files import atomic_file, check_space, remove_left_over, sha256
from utils.run import NOT_COMPARED, Run
from utils.run_files import read_config

Parts = Iterator[tuple[np.ndarray, torch.Tensor]]  # rows of an array, and what stands there


@dataclass(frozen=True)
class Answers:
    """What a teacher answers at the targets `rows`, in order: a row of `array` for each."""

    array: np.ndarray
    rows: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.rows, rows)
        if not np.array_equal(self.rows.take(at, mode="clip"), rows):
            raise IndexError("a target that the teacher was not asked for")
        return self.array[at]


def teacher_states(folder: Path, fingerprint: str, examples: Examples, boundaries: list[int], run: Run) -> Answers:
    """The frozen teacher's states that answer, after the layers `boundaries`: (targets, K, h), memory-mapped.

    float32; in a bfloat16 run, or with --teacher_states bfloat16, the bits of bfloat16 as int16.
    fingerprint: of the base weights that the teacher keeps.
    """
    stored = np.dtype(np.int16 if "bfloat16" in (run.config["dtype"], run.config["teacher_states"]) else np.float32)
    key = [fingerprint, run.config["teacher_sha256"], run.config["dtype"], stored.name, boundaries]
    hidden = read_config(folder)["base_shape"]["hidden_size"]

    def parts(examples: Examples, rows: np.ndarray) -> Parts:
        teacher = load_llm_rec(folder).to(run.accelerator.device)
        with torch.inference_mode(), run.accelerator.autocast(), teacher.for_inference():
            for index, batch in batches(examples, run, "teacher states"):
                states = teacher.states(batch["histories"], batch["targets"] != 0, boundaries)
                states = states.float() if stored == np.float32 else states.bfloat16().view(torch.int16)
                yield examples.target_rows(index), states

    return load_or_compute("teacher states", folder, key, (len(boundaries), hidden), stored, parts, examples, run)


def teacher_vectors(
    teacher: Recommender, folder: Path, key: list, examples: Examples, run: Run, states: Answers | None = None
) -> Answers:
    """The frozen teacher's user vectors before every target: (targets, d), float32, memory-mapped.

    A language model reads the windows of the examples, a traditional one as many of the user's items before the target
    as it reads at inference. key: what tells the weights of the run in `folder` from others. states: the language
    model's `teacher_states`, whose last block is that of its top layer, if they are there already.
    """
    config, device = read_config(folder), run.accelerator.device
    reads_windows = isinstance(teacher, LLMRec)
    reduced = (run.config if reads_windows else config)["dtype"] == "bfloat16"
    exact = states is not None and (states.array.dtype == np.float32 or reduced)

    def parts(examples: Examples, rows: np.ndarray) -> Parts:
        teacher.to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            if exact:
                for at in np.array_split(np.arange(len(rows)), 1 + len(rows) // 4096):
                    top = torch.from_numpy(states[rows[at]][:, -1]).to(device)
                    yield at, teacher.head(top.view(torch.bfloat16) if top.dtype == torch.int16 else top).float()
                return
            asked = examples if reads_windows else examples.single_targets(run.data.offsets, config["max_seq_length"])
            with teacher.for_inference():
                for index, batch in batches(asked, run, "teacher vectors"):
                    if reads_windows:
                        top = teacher.states(batch["histories"], batch["targets"] != 0, [teacher.num_layers])[:, 0]
                        yield asked.target_rows(index), teacher.head(top).float()
                    else:
                        yield index, teacher.user_vectors(batch["histories"], batch["users"]).float()

    shape, key = tuple(teacher.item_vectors().shape[1:]), [*key, run.config["dtype"], "user vectors"]
    return load_or_compute("teacher vectors", folder, key, shape, np.dtype(np.float32), parts, examples, run)


def batches(examples: Examples, run: Run, title: str) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """All examples once, histories of like lengths together: their indices, and their batch on the run's device."""
    found = list(sorted_batches(examples.lengths, run.config["eval_batch_size"]))
    for index in tqdm(found, desc=title, unit="batch"):
        yield index, {name: value.to(run.accelerator.device) for name, value in examples.batch(index).items()}


def load_or_compute(
    title: str,
    folder: Path,
    key: list,
    shape: tuple[int, ...],
    stored: np.dtype,
    parts: Callable[[Examples, np.ndarray], Parts],
    examples: Examples,
    run: Run,
) -> Answers:
    """The array (targets, *shape) of type `stored` that `parts` fills; from the folder of the run if it is there.

    parts(examples, rows): what to write, for examples whose targets have the numbers `rows` among those of all.
    """
    key = [{name: value for name, value in read_config(folder).items() if name not in NOT_COMPARED}, *key]
    visited = visited_examples(len(examples), run.config)
    everything, path = answers_file(folder, key, examples), answers_file(folder, key, examples.only(visited))
    wanted = stored, (int(examples.num_targets.sum()), *shape)
    # answers of all examples serve a short training too; the first process looks for all
    [whole] = broadcast_object_list([run.accelerator.is_main_process and is_whole(everything, *wanted)])
    if whole:
        visited, path = np.arange(len(examples)), everything
    rows, examples = examples.target_rows(visited), examples.only(visited)
    shape = (int(examples.num_targets.sum()), *shape)
    size = stored.itemsize * math.prod(shape)
    if run.accelerator.is_main_process:
        whole = whole or is_whole(path, stored, shape)
        state = "found" if whole else "damaged, computed anew" if path.exists() else "computed once"
        run.print(f"{title}: {size / 2**20:.0f} MiB, {path} ({state})")
        if not whole:
            check_space(folder, size)
            write(path, shape, stored, parts(examples, rows))
            with atomic_file(path.with_suffix(".sha256")) as part:
                part.write_text(sha256(path) + "\n", encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return Answers(read_array(path), rows)


def answers_file(folder: Path, key: list, examples: Examples) -> Path:
    """The file for answers that depend on `key` and the examples."""
    inputs = [np.ascontiguousarray(part) for part in (examples.start, examples.first, examples.end, examples.items)]
    whole = json.dumps([*key, [hashlib.sha256(part).hexdigest() for part in inputs]])
    return folder / "states" / f"{hashlib.sha256(whole.encode()).hexdigest()[:16]}.npy"


def is_whole(path: Path, stored: np.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the file is there as it was written, an array of this type and shape; UserError for no plain file."""
    digest = path.with_suffix(".sha256")
    if not (path.exists() and digest.exists()):
        return False
    check_file(path), check_file(digest)
    try:
        if read_text(digest).strip() != sha256(path):
            return False
        array = read_array(path)
        return (array.dtype, array.shape) == (stored, shape)
    except UserError:
        return False


def write(path: Path, shape: tuple[int, ...], stored: np.dtype, parts: Parts) -> None:
    remove_left_over(path.parent)
    with atomic_file(path) as part:
        array = np.lib.format.open_memmap(part, "w+", stored, shape)
        if hasattr(os, "posix_fallocate"):
            with open(part, "r+b") as file:  # take the space now: a full disk is an error here, a crash later
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        for rows, values in parts:
            array[rows] = values.cpu().numpy()
        array.flush()
