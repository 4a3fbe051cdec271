"""Steps 1, 3 and 4 on tiny sources, as each of the processes that torchrun starts.

torchrun --nproc_per_node 2 tests/processes.py SOURCES PLACE
torchrun --nproc_per_node 3 tests/processes.py SOURCES PLACE --killed     the last process dies while the student trains
torchrun --nproc_per_node 2 tests/processes.py SOURCES PLACE --sharded    steps 3 and 4, the base shared by both
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import PartialState

import distill
import finetune
import train_sr_trad
from models.sr import MODELS
from utils import cli
from utils.train import Loop

# 30 users: the last batch of an epoch has two, which leaves the third of three processes without work
COMMON = "--batch_size 7 --max_steps 20 --eval_steps 6 --eval_batch_size 4 --warmup_steps 5 --select_by full/MRR"
FLAGS = {
    "sasrec": (train_sr_trad, "sr", "--item_dim 8 --num_layers 1 --dropout 0 --train_targets all"),
    "teacher": (
        *(finetune, "teacher"),
        "--base_model {sources}/base --item_embeddings {sources}/table --num_layers 2 --lora_r 2 --lora_dropout 0",
    ),
    "student": (
        *(distill, "student"),
        "--teacher {place}/teacher --num_layers 1 --num_blocks 1 --lambda_ms 0 --lora_r 2 --lora_dropout 0",
    ),
}
# The newest checkpoint is that of an epoch's end, or of an evaluation, which is made again before training goes on.
KILLED_AT = {"whole": 9, "sharded": 7}


def run_step(name: str, sources: Path, place: Path, more: str = "") -> None:
    script, section, own = FLAGS[name]
    words = f"{COMMON} --resume auto {own} {more}".format(sources=sources, place=place).split()
    flags = ["--dataset", str(sources / "data"), *words, "--output_dir", str(place / name)]
    script.main(**cli.resolve(script.main, section, flags, models=MODELS))


def kill_the_last(one_step) -> None:
    def fused(self, step: int) -> dict:
        at = KILLED_AT["sharded" if self.run.sharded else "whole"]
        if self.run.config["kind"] == "student" and step == at:
            state = PartialState()
            if state.process_index == state.num_processes - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return one_step(self, step)

    return fused


def with_a_part_of_the_base(one_step) -> None:
    def checked(self, step: int) -> dict:
        frozen = [p for name, p in self.model.named_parameters() if ".layers." in name and not p.requires_grad]
        own = sum(parameter.to_local().numel() for parameter in frozen)
        assert own <= 0.6 * sum(parameter.numel() for parameter in frozen)
        return one_step(self, step)

    return checked


if __name__ == "__main__":
    if "--killed" in sys.argv:
        Loop.one_step = kill_the_last(Loop.one_step)
    steps, more = FLAGS, ""
    if "--sharded" in sys.argv:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` does, which wants a GPU
        Loop.one_step = with_a_part_of_the_base(Loop.one_step)
        # of 7 examples one process has 4, the other 3; of 5 batches of users one has 3, the other 2
        steps, more = ("teacher", "student"), "--micro_batch_size 1 --eval_batch_size 6"
    for name in steps:
        run_step(name, *map(Path, sys.argv[1:3]), more)
