"""Every row of the paper's tables 7, 9 and 10 in one run: seconds, memory and parameters, and ratios to full depth.

    python benchmarks/efficiency.py                        Beauty, by its recipe
    python benchmarks/efficiency.py --dataset ml-100k --depths 8 4 --out ml-100k.json

Each row is what the scripts train with the dataset's recipe, on random item vectors: its users, catalogue, batches and
loss terms. The released computation of the full model, one target per user, stands beside. Rows take turns; medians are
scaled to all training targets of an epoch and to all users of the test. Steps include the optimiser, not the checks on
validation. Memory is the peak of a row's first training step, over what the process held before.
"""

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import finetune
import train_sr_trad
from benchmarks.command import check_dataset, command_line, count, run_main
from benchmarks.llm_step import MAX_ITEMS, ours_loss, released_loss, released_ranks, seconds, training_step
from models.interface import Recommender
from models.llm.decoder import base_config
from models.llm.storage import build_llm_rec, count_parameters, load_base
from models.slmrec import SLMRec
from models.sr import MODELS
from utils.assets import base_model_path, dataset_folder
from utils.candidates import draw_negatives
from utils.cli import resolve
from utils.data import Sequences, shuffled_batches, split_examples, training_examples
from utils.files import write_json
from utils.memory import peak_extra_bytes
from utils.metrics import rank_users
from utils.report import environment, markdown_table

STEPS, RANKED = 4, 512  # steps and users that are timed in each turn
RELEASED_BATCH = 32  # to the released computation all samples are alike
OTHERS = {"num_blocks": 1, "norm_form": "l2", "block_reduction": "sum", "temperature": 1.0, "kl_items": None}


class Efficiency:
    """The workload of a dataset, and what every row of the table runs of it."""

    def __init__(self, dataset: str, device: torch.device):
        self.dataset, self.device = dataset, device
        self.data = Sequences.load(dataset_folder(dataset))
        self.ranked = replace(self.data, users=self.data.users[:RANKED])
        self.negatives = draw_negatives(self.ranked, "test")
        self.table = torch.randn(self.data.num_items + 1, 128) * 0.1
        self.table[0] = 0

    def config(self, script, section: str, **flags: object) -> dict:
        given = [f"--{name}={value}" for name, value in ({"dataset": self.dataset} | flags).items()]
        return resolve(script.main, section, given, models=MODELS)

    def row(self, model: Recommender, user: Recommender, config: dict, loss: Callable = ours_loss) -> dict:
        """The work of a row: `model` trains with its loss terms, `user` is what ranks."""
        examples = training_examples(self.data, config["train_targets"], config["max_seq_length"])
        index = shuffled_batches(len(examples), config["batch_size"], seed=0, epoch=0)[:STEPS]
        rng = np.random.default_rng(0)
        batches = [{k: v.to(self.device) for k, v in model.batch(examples, part, rng).items()} for part in index]
        targets = sum(int((batch["targets"] != 0).sum()) for batch in batches)
        for batch in batches:
            self.teach(model, batch)
        how = {"max_length": config["max_seq_length"], "batch_size": config["eval_batch_size"], "device": self.device}
        return {
            "train": (training_step(model, loss, batches), int(examples.num_targets.sum()) / targets),
            "score": (
                lambda: rank_users(user.eval(), self.ranked, "test", self.negatives, **how),
                len(self.data.users) / len(self.ranked.users),
            ),
            "parameters": count_parameters(user) | {"trained": count_parameters(model)["trained"]},
        }

    def teach(self, model: Recommender, batch: dict[str, torch.Tensor]) -> None:
        """Random states and vectors of a teacher: what they hold costs nothing."""
        number = int((batch["targets"] != 0).sum())
        if getattr(model, "lambda_kl", 0):
            model.teacher_table = self.table.to(self.device)
            batch["teacher_vectors"] = torch.randn(number, self.table.shape[1], device=self.device)
        if getattr(model, "needs_states", False):
            shape = (number, len(model.boundaries), model.student.hidden_size)
            batch["teacher_states"] = torch.randn(shape, device=self.device)

    def sasrec(self) -> dict:
        config = self.config(train_sr_trad, "sr")
        model = MODELS[config["model"]](config["model_config"], self.data.training_part()).to(self.device)
        return self.row(model, model, config | asdict(config["model_config"]))

    def language_model(self, layers: int, script=finetune, section: str = "teacher") -> dict:
        """A teacher of so many layers, or with `distill` a student, trained with the recipe's loss terms."""
        config = self.config(finetune, "teacher", num_layers=layers)
        terms = self.config(script, section)
        rec = build_llm_rec(config, load_base(config, base_model_path(config["base_model"])), self.table)
        weights = {f"lambda_{term}": terms.get(f"lambda_{term}") or 0.0 for term in ("cos", "norm", "ms", "kl")}
        how = {name: terms.get(name) or other for name, other in OTHERS.items()}
        model = SLMRec(rec, **weights, **how).to(self.device)
        return self.row(model, rec, config | {"batch_size": terms["batch_size"]})

    def released(self, layers: int) -> dict:
        """One target per user, every sample padded and with a prompt of its own, candidates drawn in Python."""
        flags = {"num_layers": layers, "read_out": "response", "train_targets": "last", "max_seq_length": MAX_ITEMS}
        config = self.config(finetune, "teacher", **flags) | {"batch_size": RELEASED_BATCH}
        rec = build_llm_rec(config, load_base(config, base_model_path(config["base_model"])), self.table)
        rec, tests = rec.to(self.device), split_examples(self.ranked, "test", MAX_ITEMS)
        index = np.arange(min(RELEASED_BATCH, len(tests)))

        def rank() -> None:
            with torch.inference_mode():
                released_ranks(rec.eval(), self.ranked, tests, index, self.device)

        work = self.row(rec, rec, config, released_loss)
        return work | {"score": (rank, len(self.data.users) / len(index))}


def measure(rows: dict[str, dict], repeats: int, device: torch.device) -> dict[str, dict]:
    """Seconds of an epoch and of the test, medians over turns in which every row runs once; memory; parameters."""
    found = {}
    for name, work in rows.items():  # the first run of each is slower
        found[name] = {"peak_extra_bytes": peak_extra_bytes(work["train"][0], device)} | work["parameters"]
        work["score"][0]()
    for kind in ("train", "score"):
        times = {name: [] for name in rows}
        for _ in range(repeats):
            for name, work in rows.items():
                times[name].append(seconds(work[kind][0]))
        for name, work in rows.items():
            found[name][f"{kind}_seconds"] = work[kind][1] * statistics.median(times[name])
        print(f"{kind}: " + ", ".join(f"{name} {found[name][f'{kind}_seconds']:.1f} s" for name in rows), flush=True)
    return found


def table(record: dict) -> str:
    """Seconds, with full depth's over them in brackets: how many times as fast; memory; parameters in millions."""
    full, cells = record["rows"]["E4SRec"], []
    for name, row in record["rows"].items():
        speeds = [(row[f"{kind}_seconds"], full[f"{kind}_seconds"]) for kind in ("train", "score")]
        cells.append([name, *(f"{own:,.1f} ({base / own:.1f})" for own, base in speeds)])
        cells[-1] += [f"{row['peak_extra_bytes'] / 2**20:,.0f}", *(f"{row[k] / 1e6:.2f}" for k in ("trained", "total"))]
    header = [record["settings"]["dataset"], "s/epoch (times as fast)", "s to score (times as fast)"]
    return markdown_table([*header, "extra MiB", "trained, M", "params, M"], cells)


def main() -> None:
    parser = command_line(__doc__, "efficiency")
    parser.add_argument("--dataset", default="beauty")
    parser.add_argument("--depths", type=count, nargs="+", default=[8, 4], help="of teachers beside the full one")
    parser.add_argument("--student_layers", type=count, default=4)
    parser.add_argument("--full_layers", type=count, help="default: all of the base")
    parser.add_argument("--repeats", type=count, default=5)
    args = parser.parse_args()
    check_dataset(args, lambda record: record["settings"]["dataset"])
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    torch.manual_seed(0)
    random.seed(0)
    work = Efficiency(args.dataset, accelerator.device)
    base = base_model_path(work.config(finetune, "teacher")["base_model"])
    full = args.full_layers or base_config(base).num_hidden_layers
    rows = {"SASRec": work.sasrec(), "E4SRec, released": work.released(full), "E4SRec": work.language_model(full)}
    rows |= {f"E4SRec_{depth}": work.language_model(depth) for depth in args.depths}
    rows[f"SLMRec_{args.student_layers}"] = work.language_model(args.student_layers, distill, "student")
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    record = {"rows": measure(rows, args.repeats, accelerator.device), "settings": settings}
    write_json(record | {"environment": environment(accelerator)}, args.out)
    print(table(record), args.out, sep="\n\n")


if __name__ == "__main__":
    run_main(main)
