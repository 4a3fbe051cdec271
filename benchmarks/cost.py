"""What each optimisation of the computation contributes, and how the cost grows, at four sizes each.

    python benchmarks/cost.py

Measures: switched off one at a time, alternately with everything on, medians of five; the prefix shared by
micro-batches; SASRec's users in groups of like lengths; torch.compile, which the scripts do not use; several targets of
a user at once; the teacher's states stored, and computed in each batch. Growth, medians of three: with depth and
history length, a training step and inference of the language model, batch 32, ours beside the released computation;
with the catalogue, a SASRec training step with the whole softmax and with 2,048 negatives; with the users, drawing
candidates, and ranking by vectors that cost nothing.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.catalogue import LastItem
from benchmarks.command import command_line, count, run_main
from benchmarks.llm_step import (
    MAX_ITEMS,
    Workload,
    alternate,
    make_data,
    make_model,
    ours_loss,
    released_loss,
    seconds,
    training_step,
    without,
)
from models.llm.decoder import block_boundaries
from models.slmrec import SLMRec
from models.sr import objectives, sasrec
from utils.candidates import draw_negatives
from utils.data import Sequences, TrainingPart, shuffled_batches, training_examples
from utils.files import write_json
from utils.metrics import rank_users
from utils.report import environment, markdown_table

DEPTHS, LENGTHS = (1, 2, 4, 8), (4, 8, 16, 30)
CATALOGUES, USERS = (1_000, 10_000, 100_000, 376_858), (5_000, 20_000, 80_000, 320_000)
BATCH = 32


def full_width(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Every history padded to 30 items."""
    padded = ("histories", "targets")
    return [batch | {k: F.pad(batch[k], (MAX_ITEMS - batch[k].shape[1], 0)) for k in padded} for batch in batches]


OFF = {  # the optimisations of `Fast` that are switched off, and what that is called
    "everything": ((), "everything on"),
    "prefix_per_sample": (("prefix_once",), "without: prefix once for all samples (nor shared rows)"),
    "padding_too": (("packing",), "without: packing (nor shared rows)"),
    "full_width": (("packing",), "without: packing and trimming (nor shared rows)"),
    "rows_apart": (("share_rows",), "without: shared rows of attention"),
    "keys_copied": (("share_keys",), "without: keys shared among query heads"),
    "all_positions": (("read_some",), "without: top layer at read positions only"),
    "adapters_apart": (("merge",), "without: merged adapters"),
    "prefix_every_batch": (("keep_prefix",), "without: prefix once for all batches"),
}
TRAINING = (
    "everything",
    "prefix_per_sample",
    "padding_too",
    "full_width",
    "rows_apart",
    "keys_copied",
    "all_positions",
)
INFERENCE = ("everything", "adapters_apart", "prefix_every_batch", "padding_too", "rows_apart", "keys_copied")
INFERENCE = (*INFERENCE, "all_positions")


def one_off(work: Workload, repeats: int) -> list[dict]:
    """Samples per second with everything on, and with one optimisation off: SmolLM2-135M, 8 layers."""
    model = make_model("smollm2-135m", 8, work.data.num_items, work.device, torch.float32)
    batches, users = work.batches(work.index()), len(work.tests)
    samples = work.batch_size * len(batches)
    plain = training_step(model, ours_loss, batches)
    found = []

    def within(name: str, function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with without(model, *OFF[name][0]):
                function()

        return run

    wide = training_step(model, ours_loss, full_width(batches))
    training = {name: within(name, wide if name == "full_width" else plain) for name in TRAINING}
    inference = {name: within(name, lambda: work.rank(model)) for name in INFERENCE}
    for kind, variants, number in (("training", training, samples), ("inference", inference, users)):
        plain()
        speeds = alternate(repeats, **{name: (function, number) for name, function in variants.items()})
        for name, speed in speeds.items():
            share = speed / speeds["everything"]
            found.append({"kind": kind, "off": name, "per_s": speed, "of_everything": share})
    return found


def optimisations_table(record: dict) -> str:
    header = ["one optimisation off", "samples/s", "of everything on"]
    rows = [
        [f"{r['kind']}, {OFF[r['off']][1]}", f"{r['per_s']:.1f}", f"{r['of_everything']:.2f}"]
        for r in record["one_off"]
    ]
    return markdown_table(header, rows)


def copies(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One copy of the history, cut after it, for each asked target."""
    row, column = batch["targets"].nonzero(as_tuple=True)
    T = batch["histories"].shape[1]
    position = torch.arange(T, device=column.device) - (T - 1 - column)[:, None]  # (N, T), negative: padding
    histories = batch["histories"][row].gather(1, position.clamp_min(0)) * (position >= 0)
    targets = torch.zeros_like(histories)
    targets[:, -1] = batch["targets"][row, column]
    return {"histories": histories, "targets": targets}


def many_targets(dataset: str | None, repeats: int, device) -> dict[str, float]:
    """Targets per second with the newest 8 of 16 users sharing a history, and with a copy of it for each target."""
    data = make_data(dataset, 256)
    examples = training_examples(data, "8", MAX_ITEMS)
    index = shuffled_batches(len(examples), 16, seed=0, epoch=0)[:4]
    batches = [{k: v.to(device) for k, v in examples.batch(part).items()} for part in index]
    model = make_model("smollm2-135m", 8, data.num_items, device, torch.float32)
    number = sum(int((batch["targets"] != 0).sum()) for batch in batches)
    shared = training_step(model, ours_loss, batches)
    shared()
    apart = training_step(model, ours_loss, [copies(batch) for batch in batches])
    return alternate(repeats, shared=(shared, number), copies=(apart, number))


def micro_batches(work: Workload, repeats: int, size: int = 8) -> dict[str, float]:
    """Samples per second of gradients in micro-batches, with the prefix once per step, and once per micro-batch."""
    model = make_model("smollm2-135m", 8, work.data.num_items, work.device, torch.float32).train()
    parts = work.batches([index[at : at + size] for index in work.index() for at in range(0, BATCH, size)])

    def gradients(context: Callable) -> None:
        for at in range(0, len(parts), BATCH // size):
            with context():
                for part in parts[at : at + BATCH // size]:
                    ours_loss(model, part).backward()
        model.zero_grad(set_to_none=True)

    number = size * len(parts)
    gradients(nullcontext)
    return alternate(
        repeats,
        shared=(lambda: gradients(model.for_accumulation), number),
        each=(lambda: gradients(nullcontext), number),
    )


def sasrec_groups(repeats: int, device) -> dict[str, float]:
    """SASRec in training, 256 of Beauty's users per batch: users per second in groups of like lengths, in one piece."""
    data = make_data(None, 1024)
    examples = training_examples(data, "all", MAX_ITEMS)
    index = shuffled_batches(len(examples), 256, seed=0, epoch=0)
    batches = [{k: v.to(device) for k, v in examples.batch(part).items()} for part in index]
    config = sasrec.SASRec.Config(max_seq_length=MAX_ITEMS, num_negatives=2048)
    model = sasrec.SASRec(config, data.training_part()).to(device)
    groups = training_step(model, ours_loss, batches)

    def one_piece() -> None:
        with patch.multiple(objectives, GROUP=256, PADDED=MAX_ITEMS):
            groups()

    one_piece()
    number = len(examples)
    return alternate(repeats, groups=(groups, number), one_piece=(one_piece, number))


def teachers_states(repeats: int, device) -> dict[str, float]:
    """Targets per second of a student of 4 layers that learns the states of 8, all positions read at items, L_cos.

    Stored in a file, as float32 and as the bits of bfloat16, or computed by the teacher in each batch of 128 users;
    once: of computing them all before training.
    """
    data = make_data(None, 256)
    examples = training_examples(data, "all", MAX_ITEMS)
    index = shuffled_batches(len(examples), 128, seed=0, epoch=0)
    teacher, base = (
        make_model("smollm2-135m", layers, data.num_items, device, torch.float32, read_out="item") for layers in (8, 4)
    )
    weights = {"lambda_cos": 1.0, "lambda_norm": 0.0, "lambda_ms": 0.0}
    student = SLMRec(base, num_blocks=4, norm_form="l2", block_reduction="sum", **weights).to(device)
    batches = [{k: v.to(device) for k, v in examples.batch(part).items()} for part in index]
    number, boundaries = int(examples.num_targets.sum()), block_boundaries(8, 4)
    step = training_step(student, ours_loss, batches)
    with tempfile.TemporaryDirectory() as folder, teacher.eval().for_inference():
        files = {
            name: np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", kind, (number, 4, teacher.hidden_size))
            for name, kind in (("float32", np.float32), ("bfloat16", np.int16))
        }

        def once() -> None:
            for part, batch in zip(index, batches, strict=True):
                with torch.inference_mode():
                    states = teacher.states(batch["histories"], batch["targets"] != 0, boundaries).float()
                files["float32"][examples.target_rows(part)] = states.cpu().numpy()
                files["bfloat16"][examples.target_rows(part)] = states.bfloat16().view(torch.int16).cpu().numpy()

        def stored(states: np.ndarray) -> None:
            for part, batch in zip(index, batches, strict=True):
                batch["teacher_states"] = torch.from_numpy(states[examples.target_rows(part)]).to(device)
            step()

        def per_batch() -> None:
            student.teacher = (teacher, boundaries)
            step()
            student.teacher = None

        once()
        stored(files["float32"])
        work = {name: (partial(stored, states), number) for name, states in files.items()}
        return alternate(repeats, **work, per_batch=(per_batch, number), once=(once, number))


def compiled(work: Workload, repeats: int) -> dict[str, float]:
    """Samples per second of training with and without torch.compile, and the seconds of the first, compiling pass.

    Compiled is every layer but the top one, whose hooks change state.
    """
    models = [make_model("smollm2-135m", 8, work.data.num_items, work.device, torch.float32) for _ in range(2)]
    batches = work.batches(work.index())
    plain, fast = (training_step(model, ours_loss, batches) for model in models)
    for layer in models[1].base.layers[:-1]:
        layer.compile(dynamic=True)
    number = BATCH * len(batches)
    # one entry for each layer and shape; beyond the limit code would run as it is
    with torch._dynamo.config.patch(recompile_limit=64):
        first = seconds(fast)
        plain()
        return alternate(repeats, plain=(plain, number), compiled=(fast, number)) | {"first_seconds": first}


def median(work, repeats: int = 3) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(repeats))


def fixed_lengths(length: int, users: int = 512) -> Sequences:
    """Users with `length` random items each."""
    items = np.random.default_rng(0).integers(1, 12_102, users * length).astype(np.int32)
    return Sequences("fixed", items, np.arange(users + 1) * length, 12_101, np.arange(users), "0" * 64)


def language_model(num_layers: int, length: int | None, device) -> dict[str, float]:
    """Milliseconds a sample; length None: Beauty's histories."""
    # the last two items are held out in training, the last one in inference; one more is the target
    data = [fixed_lengths(length + 3), fixed_lengths(length + 1)] if length else [None, None]
    training, ranking = (Workload(None, BATCH, device, data=sequences) for sequences in data)
    model = make_model("smollm2-135m", num_layers, training.data.num_items, device, torch.float32)
    batches = training.batches(training.index())
    samples = BATCH * len(batches)
    return {
        "training, ours": 1e3 * median(training_step(model, ours_loss, batches)) / samples,
        "training, released": 1e3 * median(training_step(model, released_loss, batches[:1])) / BATCH,
        "inference, ours": 1e3 * median(lambda: ranking.rank(model)) / len(ranking.tests),
        "inference, released": 1e3 * median(lambda: ranking.released_rank(model)) / BATCH,
    }


def catalogue(num_items: int, device) -> dict[str, float]:
    """Milliseconds of a SASRec step of 256 users with three targets each, optimiser left out."""
    histories = torch.randint(1, num_items + 1, (256, 10), device=device)
    targets = torch.randint(1, num_items + 1, (256, 10), device=device) * (torch.arange(10, device=device) >= 7)
    found = {}
    for name, negatives in (("whole softmax", 0), ("2,048 negatives", 2048)):
        known = TrainingPart(num_items, 1, np.zeros(1, int), np.ones(1, int))
        model = sasrec.SASRec(sasrec.SASRec.Config(num_negatives=negatives), known).to(device)

        def step(model=model) -> None:
            model.zero_grad(set_to_none=True)
            ours_loss(model, {"histories": histories, "targets": targets}).backward()

        found[name] = 1e3 * median(step)
    return found


def users(number: int) -> dict[str, float]:
    """Seconds for everybody, 12,101 items."""
    data, model = make_data(None, number), LastItem(12_101)
    found = {"candidates": median(lambda: draw_negatives(data, "test"), 1)}
    negatives = draw_negatives(data, "test")
    how = {"max_length": 30, "batch_size": 512}
    return found | {"ranking": median(lambda: rank_users(model, data, "test", negatives, **how))}


def plot_panels(panels: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draws each panel, "x label, y label" -> size -> name -> value, on logarithmic axes, marked at its sizes."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for (title, sizes), panel in zip(panels.items(), figure.subplots(2, 2).flat, strict=True):
        for name in next(iter(sizes.values())):
            panel.loglog(list(sizes), [values[name] for values in sizes.values()], marker="o", label=name)
        panel.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.minorticks_off()
        panel.set(xlabel=title.split(", ")[0], ylabel=title.split(", ")[1])
        panel.grid(alpha=0.3)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = command_line(__doc__, "cost")
    parser.add_argument("--repeats", type=count, default=5)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    device, repeats = accelerator.device, args.repeats
    work = Workload(None, BATCH, device)
    optimisations = one_off(work, repeats)
    print(optimisations_table({"one_off": optimisations}), flush=True)
    micro = micro_batches(work, repeats)
    ratio = micro["shared"] / micro["each"]
    print(f"prefix once for four micro-batches of 8: {ratio:.2f} x the samples per second", flush=True)
    grouped = sasrec_groups(repeats, device)
    ratio = grouped["groups"] / grouped["one_piece"]
    print(f"SASRec's users in groups of like lengths: {ratio:.2f} x the users per second of one piece", flush=True)
    compiling = compiled(work, repeats)
    ratio = compiling["compiled"] / compiling["plain"]
    print(f"torch.compile: {ratio:.2f} x the samples per second, after {compiling['first_seconds']:.0f} s", flush=True)
    targets = {name or "beauty": many_targets(name, repeats, device) for name in (None, "ml-100k")}
    for name, speeds in targets.items():
        ratio = speeds["shared"] / speeds["copies"]
        print(f"8 targets of a user at once, {name}: {ratio:.2f} x the targets per second of copies", flush=True)
    states = teachers_states(repeats, device)
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in states.items())
    print(f"targets per second of a student, by the teacher's states: {speeds}", flush=True)
    panels = {
        "layers, ms a sample": {n: language_model(n, None, device) for n in DEPTHS},
        "items of history (4 layers), ms a sample": {n: language_model(4, n, device) for n in LENGTHS},
        "items in the catalogue, ms a SASRec step": {n: catalogue(n, device) for n in CATALOGUES},
        "users, seconds": {n: users(n) for n in USERS},
    }
    found = {"one_off": optimisations, "micro_batches": micro, "compile": compiling, "many_targets": targets}
    found |= {"sasrec_groups": grouped, "teacher_states": states}
    write_json(found | {"panels": panels, "repeats": repeats, "environment": environment(accelerator)}, args.out)
    for title, sizes in panels.items():
        for name in next(iter(sizes.values())):
            values = "  ".join(f"{n:,}: {values[name]:.3g}" for n, values in sizes.items())
            print(f"{title}: {name:20s}", values)
    plot_panels(panels, args.out.with_suffix(".png"))


if __name__ == "__main__":
    run_main(main)
