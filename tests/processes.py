"""Steps 1, 3 and 4 on tiny sources, as each of the processes that torchrun starts.

torchrun --nproc_per_node 2 tests/processes.py SOURCES PLACE
torchrun --nproc_per_node 3 tests/processes.py SOURCES PLACE --killed     the last process dies while the student trains
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
KILLED_AT = 9


def run_step(name: str, sources: Path, place: Path) -> None:
    script, section, own = FLAGS[name]
    words = f"{COMMON} --resume auto {own}".format(sources=sources, place=place).split()
    flags = ["--dataset", str(sources / "data"), *words, "--output_dir", str(place / name)]
    script.main(**cli.resolve(script.main, section, flags, models=MODELS))


def kill_the_last(one_step) -> None:
    def fused(self, step: int) -> dict:
        if self.run.config["kind"] == "student" and step == KILLED_AT:
            state = PartialState()
            if state.process_index == state.num_processes - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return one_step(self, step)

    return fused


if __name__ == "__main__":
    if "--killed" in sys.argv:
        Loop.one_step = kill_the_last(Loop.one_step)
    for name in FLAGS:
        run_step(name, *map(Path, sys.argv[1:3]))
