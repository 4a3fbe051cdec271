"""Step 4: distil the teacher into a student with fewer layers (SLMRec).

python distill.py                                     4 layers from the 8 of outputs/ml-100k/teacher-8
python distill.py --lambda_ms 0 --output_dir outputs/ml-100k/student-cos-norm
python distill.py --norm_form squared --block_reduction mean      the loss as the paper prints it
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from models.llm_rec import (
    HEADS_FILE,
    LLMRec,
    block_ends,
    build_llm_rec,
    check_base,
    count_parameters,
    load_base,
    load_llm_rec,
    recorded_base,
)
from models.slmrec import SLMRec
from utils import assets, cli
from utils.data import Examples, Sequences, check_same_dataset, sorted_batches, training_examples
from utils.errors import UserError
from utils.files import check_space, load_tensors, read_json, remove_left_over, sha256, whole_file
from utils.report import closing_table, finished_run
from utils.train import NOT_COMPARED, Run

INHERITED = ["base_model", "layer_selection", "train_strategy", "lora_r", "lora_alpha", "lora_dropout"]
INHERITED += ["lora_target_modules", "max_seq_length", "train_targets", "dtype", "hidden_size", "table_sha256"]


def teacher_states(folder: Path, fingerprint: str, examples: Examples, ends: list[int], run: Run) -> np.ndarray:
    """The frozen teacher's response states after layers `ends`: (targets, len(ends), h), memory-mapped.

    float32, or in a bfloat16 run the bits of bfloat16 as int16. They depend on nothing that trains, so they are
    computed once and kept in the teacher's folder, under a name made from all that they depend on, with their SHA-256.
    fingerprint: of the base weights that the teacher keeps.
    """
    config = read_json(folder / "config.json", "")
    trained = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    inputs = [np.ascontiguousarray(part) for part in (examples.start, examples.first, examples.end, examples.items)]
    key = [
        trained,
        fingerprint,
        run.config["teacher_sha256"],
        run.config["dtype"],
        ends,
        [hashlib.sha256(part).hexdigest() for part in inputs],
    ]
    path = folder / "states" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy"
    digest = path.with_suffix(".sha256")
    shape = (int(examples.asked.sum()), len(ends), config["base_shape"]["hidden_size"])
    stored = np.dtype(np.int16 if run.config["dtype"] == "bfloat16" else np.float32)
    size = stored.itemsize * math.prod(shape)
    if run.accelerator.is_main_process:
        there = path.exists() and digest.exists()
        whole = there and digest.read_text(encoding="utf-8").strip() == sha256(path)
        state = "found" if whole else "damaged, computed anew" if there else "computed once"
        run.print(f"teacher states: {size / 2**20:.0f} MiB, {path} ({state})")
        if not whole:
            check_space(folder, size)
            teacher = load_llm_rec(folder).to(run.accelerator.device)
            write_teacher_states(path, shape, stored, teacher, examples, ends, run)
            with whole_file(digest) as part:
                part.write_text(sha256(path) + "\n", encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_teacher_states(
    path: Path, shape: tuple[int, ...], stored: np.dtype, teacher: LLMRec, examples: Examples, ends: list[int], run: Run
) -> None:
    remove_left_over(path.parent)
    batches = list(sorted_batches(examples.lengths, run.config["eval_batch_size"]))
    with whole_file(path) as part:
        states = np.lib.format.open_memmap(part, "w+", stored, shape)
        if hasattr(os, "posix_fallocate"):
            with open(part, "r+b") as file:  # take the space now: a full disk is an error here, a crash later
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        with torch.inference_mode(), run.accelerator.autocast(), teacher.for_inference():
            for index in tqdm(batches, desc="teacher states", unit="batch"):
                batch = {name: value.to(run.accelerator.device) for name, value in examples.batch(index).items()}
                found = teacher.states(batch["histories"], batch["targets"] != 0, ends)
                found = found.float() if stored == np.float32 else found.bfloat16().view(torch.int16)
                states[examples.target_rows(index)] = found.cpu().numpy()
        states.flush()


def main(
    *,
    dataset: str = "ml-100k",
    teacher: str | None = None,
    num_layers: int = 4,
    num_blocks: int = 4,
    lambda_cos: float = 1.0,
    lambda_norm: float = 0.1,
    lambda_ms: float = 1.0,
    norm_form: Literal["l2", "squared"] = "l2",
    block_reduction: Literal["sum", "mean"] = "sum",
    mode: Literal["offline"] = "offline",
    layer_selection: Literal["first", "interval"] | None = None,
    train_strategy: Literal["lora", "full", "frozen"] | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_target_modules: str | None = None,
    max_seq_length: int | None = None,
    train_targets: str | None = None,
    batch_size: int = 256,
    micro_batch_size: int | None = None,
    eval_batch_size: int = 512,
    num_epochs: float = 3.0,
    max_steps: int = -1,
    learning_rate: float = 1e-3,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int = 50,
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine",
    max_grad_norm: float = 1.0,
    eval_steps: int = 100,
    seed: int = 42,
    dtype: Literal["float32", "bfloat16"] | None = None,
    output_dir: str | None = None,
    resume: Literal["auto", "never"] = "never",
    report_to: Literal["none", "tensorboard", "wandb"] = "none",
) -> None:
    config = dict(locals()) | {"kind": "student"}
    data = Sequences.load(assets.dataset_folder(dataset))
    source = Path(teacher or cli.ROOT / "outputs" / data.name / "teacher-8")
    make = f"{source} holds no finished teacher; make it: python finetune.py --dataset {dataset} --num_layers 8"
    taught, _ = finished_run(source, make)
    if taught.get("kind") != "teacher":
        raise UserError(f"--teacher {source} is no run of finetune.py")
    check_same_dataset(data, taught.get("dataset_fingerprint"), source)
    cli.inherit(config, taught, INHERITED, cli.shown(source))
    depth = taught["num_layers"]
    if num_layers > depth:
        raise UserError(f"--num_layers {num_layers}: the teacher has {depth} layers, a student needs no more")
    if config["max_seq_length"] > taught["max_seq_length"]:
        raise UserError(f"--max_seq_length {max_seq_length}: the teacher reads {taught['max_seq_length']} items")
    if lambda_ms and num_blocks == 1:
        raise UserError("--num_blocks 1 leaves no block before the last for L_ms: add --lambda_ms 0, or more blocks")
    block_ends(num_layers, num_blocks)
    ends = block_ends(depth, num_blocks)
    base = recorded_base(taught)
    config["base_model"] = assets.record_base_model(taught["base_model"], base)
    config |= {"teacher": cli.shown(source), "base_shape": taught["base_shape"], "teacher_layers": depth}
    hashes = {str(p.relative_to(source)): sha256(p) for p in sorted(source.rglob("*.safetensors"))}
    config |= {"title": f"SLMRec-{num_layers}<-{depth}", "teacher_sha256": hashes}
    examples = training_examples(data, config["train_targets"], config["max_seq_length"])
    item_table = load_tensors(source / HEADS_FILE)["item_table"]

    run = Run(config, data, default_dir=f"student-{num_layers}from{depth}")
    if not run.finished:
        fingerprint = load_base(taught, base).fingerprint
        check_base(taught, fingerprint, base, source)
        kept = load_base(config, base)
        run.record(base_fingerprint=kept.fingerprint)
        student = SLMRec(
            build_llm_rec(config, kept, item_table),
            num_blocks=num_blocks,
            lambda_cos=lambda_cos,
            lambda_norm=lambda_norm,
            lambda_ms=lambda_ms,
            norm_form=norm_form,
            block_reduction=block_reduction,
        )
        extra = {}
        if mode == "offline" and student.needs_teacher:
            extra["teacher_states"] = teacher_states(source, fingerprint, examples, ends, run)
        state = run.fit(student, examples, extra)
        size = count_parameters(student) | {"total": count_parameters(student.student)["total"]}  # ms_heads only train
        run.finish(student, state, size, student.student.save_pretrained)
    run.print(closing_table(run.folder.parent, data.fingerprint))


if __name__ == "__main__":
    cli.run(main, section="student", inherits=INHERITED)
