"""The released computation beside ours, in one run, on the same weights and batches: samples per second.

    python benchmarks/llm_step.py                              8 layers against 8, and a 4-layer student against 30
    python benchmarks/llm_step.py --dataset ml-100k --batch_sizes 64
    python benchmarks/llm_step.py --base_model llama-7b-shape  random weights of that shape; wants a GPU

The released computation pads every sample to 30 items, repeats the prompt in each, runs all positions through all
layers, and draws the candidates of each sample in Python. Ours is what finetune.py and distill.py run. Both are
measured alternately, five times; medians are reported. To the released computation all batches are alike, so it runs
the first of four, and at inference the first batch of the users that ours ranks. Extra memory is the peak of the
first run, over what the process held before it. A bar chart is written beside the record.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import nn
from transformers import AutoModel, LlamaConfig
from transformers.utils import ModelOutput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.command import command_line, count, run_main
from models.llm.decoder import base_config, block_boundaries, load_decoder, prompt_ids
from models.llm.recommender import LLMRec
from models.slmrec import SLMRec
from utils.assets import base_model_path, dataset_folder
from utils.candidates import draw_negatives
from utils.checked import read_json
from utils.cli import ROOT
from utils.data import Examples, Sequences, shuffled_batches, split_examples, training_examples
from utils.errors import UserError
from utils.files import write_json
from utils.memory import peak_extra_bytes
from utils.metrics import rank_users
from utils.report import environment, markdown_table

MAX_ITEMS, LLAMA = 30, "llama-7b-shape"
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
# Sequence lengths of Amazon 2014 Beauty (22,363 users, 5-core), as counts of users with 5, 6, ... 32, and 33 or more
# items, of which 30 are read.
BEAUTY_ITEMS, BEAUTY_LENGTHS = 12_101, (
    *(7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 117, 84, 66, 73, 74, 61),
    *(54, 44, 44, 38, 30, 38, 413),
)  # fmt: skip


# --- the two computations ---


def without(model: LLMRec, *optimisations: str) -> AbstractContextManager:
    """Measures of `Fast` switched off."""
    return patch.object(model, "fast", replace(model.fast, **dict.fromkeys(optimisations, False)))


def released_output(model: LLMRec, histories: torch.Tensor, **options) -> ModelOutput:
    """transformers' output of the released computation: histories (B, 30), left-padded with 0."""
    embed = model.base.get_input_embeddings()
    prefix, response = (embed(part).expand(len(histories), -1, -1) for part in (model.prefix_ids, model.response_ids))
    items = model.input_proj(model.table[histories]).to(prefix.dtype)
    inputs = torch.cat([prefix, items, response], dim=1)
    ones = [torch.ones(part.shape[:2], dtype=torch.long, device=histories.device) for part in (prefix, response)]
    mask = torch.cat([ones[0], (histories != 0).long(), ones[1]], dim=1)
    model.top.positions = None  # every position through the whole top layer
    return model.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False, **options)


def released_vectors(model: LLMRec, histories: torch.Tensor) -> torch.Tensor:
    return model.head(released_output(model, histories).last_hidden_state[:, -1])


def released_loss(model: LLMRec, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    histories = F.pad(batch["histories"], (MAX_ITEMS - batch["histories"].shape[1], 0))
    logits = released_vectors(model, histories) @ model.table[1:].T
    return F.cross_entropy(logits, batch["targets"][:, -1] - 1)


def released_ranks(model: LLMRec, data: Sequences, examples: Examples, index: np.ndarray, device) -> np.ndarray:
    """Sampled ranks of one batch, candidates drawn per sample by a set difference."""
    histories = examples.batch(index)["histories"]
    histories = F.pad(histories, (MAX_ITEMS - histories.shape[1], 0)).to(device)
    candidates = []
    for user in data.users[index]:
        seen = set(data.items[data.offsets[user] : data.offsets[user + 1]].tolist())
        unseen = list(set(range(1, data.num_items + 1)) - seen)
        if len(unseen) < 999:
            raise UserError(
                f"{data.name}: a user has {len(unseen)} other items, and 999 are drawn; choose a larger one"
            )
        candidates.append([int(data.items[data.offsets[user + 1] - 1]), *random.sample(unseen, 999)])
    scores = released_vectors(model, histories) @ model.table.T
    found = scores.gather(1, torch.tensor(candidates, device=device))
    return (found[:, 1:] >= found[:, :1]).sum(1).cpu().numpy()


# --- what is measured ---


def make_data(dataset: str | None, users: int, seed: int = 0, num_items: int = BEAUTY_ITEMS) -> Sequences:
    """Sequences of random items with the lengths of a processed dataset, or of Beauty's over `num_items` items."""
    rng = np.random.default_rng(seed)
    if dataset:
        source = Sequences.load(dataset_folder(dataset))
        lengths, num_items = np.diff(source.offsets)[source.users], source.num_items
        lengths = rng.choice(lengths, users)
    else:
        share = np.array(BEAUTY_LENGTHS) / sum(BEAUTY_LENGTHS)
        lengths = rng.choice(np.arange(5, 5 + len(share)), users, p=share)
    items = rng.integers(1, num_items + 1, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sequences("lengths", items, offsets, num_items, np.arange(users), "0" * 64)


def make_model(base_model: str, num_layers: int, num_items: int, device, dtype: torch.dtype, **options) -> LLMRec:
    torch.manual_seed(0)
    if base_model == LLAMA:
        shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        with torch.device(device):
            decoder = AutoModel.from_config(LlamaConfig(**shape, num_hidden_layers=num_layers), dtype=dtype)
        prompt = {"prefix_ids": list(range(3, 58)), "response_ids": list(range(3, 9))}
    else:
        base = base_model_path(base_model)
        decoder, prompt = load_decoder(base, num_layers, "first", dtype), prompt_ids(base)
    table = torch.randn(num_items + 1, 128) * 0.1
    table[0] = 0
    model = LLMRec(decoder, table, max_length=MAX_ITEMS, lora=LORA, **prompt, **options).to(device)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts it at 0, where half of the gradients vanish
            nn.init.normal_(parameter, std=0.02)
        parameter.sum()  # a file's weights come into memory when they are read first, not when it is opened
    return model


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


def training_step(model: nn.Module, loss_of: Callable, batches: list[dict]) -> Callable[[], None]:
    """A function that takes one optimiser step on each batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def work() -> None:
        model.train()
        for batch in batches:
            loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work


def ours_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(model(batch).values())


class Workload:
    """Training batches and users to rank, one set of lengths for everything that is compared."""

    def __init__(
        self,
        dataset: str | None,
        batch_size: int,
        device,
        infer_batch_size: int | None = None,
        data: Sequences | None = None,
        users: int | None = None,
    ):
        """users: how many are ranked; a real run ranks so many that what is done once per ranking does not count."""
        self.batch_size, self.infer_batch_size, self.device = batch_size, infer_batch_size or batch_size, device
        self.data = data or make_data(dataset, 16 * max(self.batch_size, self.infer_batch_size))
        self.examples = training_examples(self.data, "last", MAX_ITEMS)
        self.ranked = replace(self.data, users=self.data.users[: users or max(512, 2 * self.infer_batch_size)])
        self.tests = split_examples(self.ranked, "test", MAX_ITEMS)

    def index(self) -> list[np.ndarray]:
        """Four batches as utils.train.fit makes them."""
        return shuffled_batches(len(self.examples), self.batch_size, seed=0, epoch=0)[:4]

    def batches(self, index: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
        return [{k: v.to(self.device) for k, v in self.examples.batch(part).items()} for part in index]

    def rank(self, model: LLMRec, negatives: np.ndarray | None = None) -> None:
        """Candidates, where none are given, are drawn in here too, though a run draws them once for all its passes."""
        how = {"max_length": MAX_ITEMS, "batch_size": self.infer_batch_size, "device": self.device}
        negatives = draw_negatives(self.ranked, "test") if negatives is None else negatives
        rank_users(model.eval(), self.ranked, "test", negatives, **how)

    def released_rank(self, model: LLMRec) -> None:
        with torch.inference_mode():
            released_ranks(model.eval(), self.ranked, self.tests, np.arange(self.infer_batch_size), self.device)


def alternate(repeats: int, **work: tuple[Callable[[], object], int]) -> dict[str, float]:
    """Median samples per second of each (function, samples), run in turn `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, (function, _) in work.items():
            times[name].append(seconds(function))
    return {name: samples / statistics.median(times[name]) for name, (_, samples) in work.items()}


def tokens(model: LLMRec, lengths: np.ndarray, prefixes: int) -> dict[str, float]:
    """Tokens that go through the layers for each sample of these lengths; ours runs the prompt `prefixes` times."""
    P, R = model.prefix_ids.shape[1], model.response_ids.shape[1]
    return {"released": P + MAX_ITEMS + R, "ours": prefixes * P / len(lengths) + float(lengths.mean()) + R}


def differences(model: LLMRec, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest relative difference of a user vector, and relative difference of the gradient, dropout off."""
    model.eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    vectors, gradients = [], []
    padded = F.pad(batch["histories"], (MAX_ITEMS - batch["histories"].shape[1], 0))
    with torch.no_grad():
        vectors.append(released_vectors(model, padded))
        with model.for_inference():
            vectors.append(model.user_vectors(batch["histories"]))
    for loss in (released_loss(model, batch), ours_loss(model, batch)):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trained.values()))]))
    of_vectors = ((vectors[0] - vectors[1]).norm(dim=1) / vectors[0].norm(dim=1)).max().item()
    return of_vectors, ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()


# --- the tables ---


class Benchmark:
    """Rows of figures, printed as they come, and the summary."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        self.args, self.device, self.dtype = args, device, dtype
        self.rows: list[dict] = []
        self.distillation = 0.0
        self.worst = [0.0, 0.0]

    def model(self, num_layers: int, num_items: int, **options) -> LLMRec:
        return make_model(self.args.base_model, num_layers, num_items, self.device, self.dtype, **options)

    def row(
        self, kind: str, names: tuple[str, str], batch: int, tokens: dict[str, float], **work: tuple[Callable, int]
    ) -> None:
        """Measure `released` and `ours`, (function, samples) each."""
        peaks: dict[str, int] = {}

        def watched(name: str, function: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                if name in peaks:
                    function()
                else:
                    peaks[name] = peak_extra_bytes(function, self.device)

            return run

        speeds = alternate(self.args.repeats, **{n: (watched(n, f), samples) for n, (f, samples) in work.items()})
        row = {"kind": kind, "released": names[0], "ours": names[1], "batch": batch}
        for name in ("released", "ours"):
            row |= {f"{name}_per_s": speeds[name], f"{name}_tokens_a_sample": tokens[name]}
            row[f"{name}_peak_extra_bytes"] = peaks[name]
        self.rows.append(row | {"ratio": speeds["ours"] / speeds["released"]})
        print(
            f"{kind:10s} batch {batch:4d}  released {names[0]}: {speeds['released']:8.2f} samples/s   "
            f"ours {names[1]}: {speeds['ours']:8.2f}   {self.rows[-1]['ratio']:6.2f} x",
            flush=True,
        )

    def inference(self, work: Workload, names: tuple[str, str], released: LLMRec, ours: LLMRec) -> None:
        self.row(
            "inference",
            names,
            work.infer_batch_size,
            tokens(ours, work.tests.lengths, 1),
            released=(lambda: work.released_rank(released), work.infer_batch_size),
            ours=(lambda: work.rank(ours), len(work.tests)),
        )

    def equal_depth(self, work: Workload) -> None:
        index = work.index()
        model, batches = self.model(self.args.num_layers, work.data.num_items), work.batches(index)
        for batch in (batches[0], batches[-1]):
            found = differences(model, {name: value[:32] for name, value in batch.items()})
            self.worst = [max(pair) for pair in zip(self.worst, found, strict=True)]
        names = (f"{self.args.num_layers} layers",) * 2
        self.row(
            "training",
            names,
            work.batch_size,
            tokens(model, work.examples.lengths[np.concatenate(index)], len(index)),
            released=(training_step(model, released_loss, batches[:1]), work.batch_size),
            ours=(training_step(model, ours_loss, batches), work.batch_size * len(batches)),
        )
        self.inference(work, names, model, model)

    def student(self, work: Workload, depth: int) -> None:
        """The student with its whole loss and cached teacher against the released computation at full depth."""
        full, examples, ends = self.args.full_layers, work.examples, block_boundaries(self.args.num_layers, 4)
        teacher = self.model(self.args.num_layers, work.data.num_items)
        index = work.index()
        batches = work.batches(index)
        with tempfile.TemporaryDirectory() as folder:
            states = np.lib.format.open_memmap(
                f"{folder}/states.npy", "w+", np.float32, (len(examples), 4, teacher.hidden_size)
            )
            with torch.inference_mode(), teacher.eval().for_inference():
                for part, batch in zip(index, batches, strict=True):
                    states[part] = teacher.states(batch["histories"], batch["targets"] != 0, ends).float().cpu().numpy()
            del teacher
            weights = {"lambda_cos": 1.0, "lambda_norm": 0.1, "lambda_ms": 1.0}
            base = self.model(depth, work.data.num_items)
            slm = SLMRec(base, num_blocks=4, norm_form="l2", block_reduction="sum", **weights).to(self.device)
            slow = self.model(full, work.data.num_items)

            def distil() -> None:
                for part, batch in zip(index, batches, strict=True):
                    batch["teacher_states"] = torch.from_numpy(states[part]).to(self.device)
                step()

            step = training_step(slm, ours_loss, batches)
            names, samples = (f"{full} layers", f"student {depth}"), work.batch_size * len(batches)
            self.row(
                "training",
                names,
                work.batch_size,
                tokens(base, examples.lengths[np.concatenate(index)], len(index)),
                released=(training_step(slow, released_loss, batches[:1]), work.batch_size),
                ours=(distil, samples),
            )
            # apart from the released computation, after whose gigabytes the next one begins on a cold cache and heap
            plain = training_step(base, ours_loss, batches)
            speeds = alternate(2 * self.args.repeats, plain=(plain, samples), distil=(distil, samples))
            cost = speeds["plain"] / speeds["distil"]
            print(f"distillation with cached teacher: {cost:.3f} x a plain step")
            self.distillation = max(self.distillation, cost)
            self.inference(work, names, slow, base)

    def summary(self) -> dict[str, float]:
        def ratio(kind: str, same: bool) -> float:
            return min(r["ratio"] for r in self.rows if r["kind"] == kind and (r["released"] == r["ours"]) == same)

        return {
            "equal_depth_train_ratio": ratio("training", True),
            "equal_depth_infer_ratio": ratio("inference", True),
            "full_depth_train_ratio": ratio("training", False),
            "full_depth_infer_ratio": ratio("inference", False),
            "max_relative_difference": self.worst[0],
            "max_relative_gradient_difference": self.worst[1],
            "distillation_over_plain": self.distillation,
        }


def speed_table(record: dict) -> str:
    header = ["released -> ours", "batch", "samples/s: released", "ours", "ratio"]
    header += ["tokens/sample: released", "ours", "extra MiB: released", "ours"]
    rows = [
        [
            f"{r['kind']}, {r['released']} -> {r['ours']}",
            str(r["batch"]),
            f"{r['released_per_s']:.1f}",
            f"{r['ours_per_s']:.1f}",
            f"{r['ratio']:.1f}",
            *(f"{r[f'{name}_tokens_a_sample']:.1f}" for name in ("released", "ours")),
            *(f"{r[f'{name}_peak_extra_bytes'] / 2**20:,.0f}" for name in ("released", "ours")),
        ]
        for r in record["rows"]
    ]
    return markdown_table(header, rows)


def paper_table(record: dict) -> str:
    """The paper's hours (table 7) and the ratios of the same depths here, with the shape of LLaMA-7B on a GPU."""
    paper = read_json(ROOT / "results" / "paper_tables.json", "")["table_7"]["rows"]
    e4srec, slmrec = paper["E4SRec"], paper["SLMRec_4<-8"]
    header = ["LLaMA-7B, paper: one A100", "E4SRec, 32 layers", "SLMRec, 4 layers", "ratio", "here: released -> ours"]
    hardware = record["environment"]["hardware"]
    on_gpu = record["settings"]["base_model"] == LLAMA and " CPU" not in hardware
    measured = {
        r["kind"]: f"{r['ratio']:.1f}, {hardware}"
        for r in record["rows"]
        if on_gpu and (r["released"], r["ours"]) == ("32 layers", "student 4")
    }
    rows = []
    for column, (kind, name) in enumerate(
        (("training", "training, hours per epoch"), ("inference", "inference, hours"))
    ):
        hours = [e4srec[column], slmrec[column]]
        here = measured.get(kind, "needs a GPU, not measured")
        rows.append([name, *map(str, hours), f"{hours[0] / hours[1]:.1f}", here])
    return markdown_table(header, rows)


def plot(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{r['kind']}, batch {r['batch']}\n{r['released']} -> {r['ours']}" for r in rows]
    bars = axes.barh(names, [r["ratio"] for r in rows], color=["C0" if r["kind"] == "training" else "C1" for r in rows])
    axes.bar_label(bars, fmt="%.1f x", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="samples per second, ours over the released computation")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=100)


def check_depths(args: argparse.Namespace) -> None:
    """UserError for what would end the benchmark after its long part."""
    if args.dataset:
        dataset_folder(args.dataset)
    for depth in (args.num_layers, *args.student_layers):
        if depth % 4:
            raise UserError(f"{depth} layers do not make 4 blocks, as --num_layers and --student_layers are cut into")
    known = 32 if args.base_model == LLAMA else base_config(base_model_path(args.base_model)).num_hidden_layers
    args.full_layers = args.full_layers or known
    if max(args.full_layers, args.num_layers, *args.student_layers) > known:
        raise UserError(f"--base_model {args.base_model} has {known} layers; ask for no more")


def main() -> None:
    parser = command_line(__doc__, "llm_step")
    parser.add_argument("--base_model", default="smollm2-135m", help="as finetune.py takes it, or llama-7b-shape")
    parser.add_argument("--dataset", help="whose history lengths and catalogue size (default: those of Beauty)")
    parser.add_argument("--num_layers", type=count, default=8, help="at equal depth, and of the teacher")
    parser.add_argument("--student_layers", type=count, nargs="+", default=[4])
    parser.add_argument("--full_layers", type=count, help="default: all of the base")
    parser.add_argument("--batch_sizes", type=count, nargs="+", default=[32, 128], help="at equal depth")
    parser.add_argument("--student_batch_size", type=count, default=32)
    parser.add_argument("--infer_batch_size", type=count, help="default: that of training")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    check_depths(args)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    random.seed(0)
    benchmark = Benchmark(args, accelerator.device, getattr(torch, args.dtype))
    more = {"device": accelerator.device, "infer_batch_size": args.infer_batch_size}
    for batch_size in args.batch_sizes:
        benchmark.equal_depth(Workload(args.dataset, batch_size, **more))
    for depth in args.student_layers:
        benchmark.student(Workload(args.dataset, args.student_batch_size, **more), depth)
    summary = benchmark.summary()
    record = {"summary": summary, "rows": benchmark.rows}
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    record |= {"settings": settings, "environment": environment(accelerator)}
    write_json(record, args.out)
    print(speed_table(record), paper_table(record), sep="\n\n", end="\n\n")
    print(markdown_table(["summary", "value"], [[name, f"{value:.3g}"] for name, value in summary.items()]))
    plot(benchmark.rows, args.out.with_suffix(".png"))
    print(args.out)


if __name__ == "__main__":
    run_main(main)
