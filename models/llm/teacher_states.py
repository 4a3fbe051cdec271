"""The frozen teacher's states at the block boundaries, computed once for every student that learns from it."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.llm.recommender import LLMRec
from models.llm.storage import load_llm_rec
from utils.data import Examples, sorted_batches
from utils.files import atomic_file, check_space, read_json, remove_left_over, sha256
from utils.run import NOT_COMPARED, Run


def teacher_states(folder: Path, fingerprint: str, examples: Examples, boundaries: list[int], run: Run) -> np.ndarray:
    """The frozen teacher's states that answer, after the layers `boundaries`: (targets, K, h), memory-mapped.

    float32, or in a bfloat16 run and on request (--teacher_states bfloat16) the bits of bfloat16 as int16. They depend
    on nothing that trains, so they are computed once and kept in the teacher's folder, under a name made from all that
    they depend on, with their SHA-256.
    fingerprint: of the base weights that the teacher keeps.
    """
    config = read_json(folder / "config.json", "")
    stored = np.dtype(np.int16 if "bfloat16" in (run.config["dtype"], run.config["teacher_states"]) else np.float32)
    trained = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    inputs = [np.ascontiguousarray(part) for part in (examples.start, examples.first, examples.end, examples.items)]
    key = [
        trained,
        fingerprint,
        run.config["teacher_sha256"],
        run.config["dtype"],
        stored.name,
        boundaries,
        [hashlib.sha256(part).hexdigest() for part in inputs],
    ]
    path = folder / "states" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy"
    digest = path.with_suffix(".sha256")
    shape = (int(examples.num_targets.sum()), len(boundaries), config["base_shape"]["hidden_size"])
    size = stored.itemsize * math.prod(shape)
    if run.accelerator.is_main_process:
        exists = path.exists() and digest.exists()
        whole = exists and digest.read_text(encoding="utf-8").strip() == sha256(path)
        state = "found" if whole else "damaged, computed anew" if exists else "computed once"
        run.print(f"teacher states: {size / 2**20:.0f} MiB, {path} ({state})")
        if not whole:
            check_space(folder, size)
            teacher = load_llm_rec(folder).to(run.accelerator.device)
            write_teacher_states(path, shape, stored, teacher, examples, boundaries, run)
            with atomic_file(digest) as part:
                part.write_text(sha256(path) + "\n", encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_teacher_states(
    path: Path,
    shape: tuple[int, ...],
    stored: np.dtype,
    teacher: LLMRec,
    examples: Examples,
    boundaries: list[int],
    run: Run,
) -> None:
    remove_left_over(path.parent)
    batches = list(sorted_batches(examples.lengths, run.config["eval_batch_size"]))
    with atomic_file(path) as part:
        states = np.lib.format.open_memmap(part, "w+", stored, shape)
        if hasattr(os, "posix_fallocate"):
            with open(part, "r+b") as file:  # take the space now: a full disk is an error here, a crash later
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        with torch.inference_mode(), run.accelerator.autocast(), teacher.for_inference():
            for index in tqdm(batches, desc="teacher states", unit="batch"):
                batch = {name: value.to(run.accelerator.device) for name, value in examples.batch(index).items()}
                found = teacher.states(batch["histories"], batch["targets"] != 0, boundaries)
                found = found.float() if stored == np.float32 else found.bfloat16().view(torch.int16)
                states[examples.target_rows(index)] = found.cpu().numpy()
        states.flush()
