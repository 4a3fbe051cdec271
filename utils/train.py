"""The training loop of every step.

A model that trains here is a `Recommender` (models/interface.py): the sum of the loss terms of `forward` is minimised.
Everything random in step k depends on the seed and k alone (and on which of several processes draws): batches on (seed,
epoch), dropout noise and what the model draws for a batch on (seed, step). So a run continues exactly from weights,
optimiser state and a step number.
"""

import math
import time
from contextlib import ExitStack, nullcontext
from typing import NoReturn

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn
from tqdm import tqdm

from utils.data import Examples, planned_steps, shuffled_batches, visited_examples
from utils.errors import RunError, UserError, is_out_of_memory
from utils.memory import MEASURED, MIB, examples_that_fit
from utils.report import environment
from utils.run import Run


def fit(run: Run, model: nn.Module, examples: Examples) -> dict:
    """Train `model` on `examples` and leave the weights that did best on validation in it.

    Returns the state of the loop: step, best_step, evaluations, train_seconds, starts, steps_per_epoch, planned_steps.
    """
    if not len(examples):
        raise UserError(f"dataset {run.data.name} gives no training example: every user has too few interactions")
    if run.sharded:
        model.shard(run.accelerator.device)
    try:
        run.start()
        return Loop(run, model, examples).train()
    except BaseException:
        run.lock.release()
        raise


class Loop:
    """Training of one model in one run."""

    def __init__(self, run: Run, model: nn.Module, examples: Examples) -> None:
        self.run, self.model, self.examples = run, model, examples
        self.config, self.accelerator = run.config, run.accelerator
        model.to(self.accelerator.device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if run.sharded:  # elsewhere `prepare_model` sees to it: machines may round differently
            broadcast([parameter.data for parameter in self.trained.values()])
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.get("optimizer", "adamw")]
        self.optimizer = kind(parameter_groups(model, self.trained, self.config))
        self.per_epoch = math.ceil(len(examples) / self.config["batch_size"])
        self.micro_batch = self.config["micro_batch_size"]  # "auto" is looked for when training starts
        steps = planned_steps(self.config, self.per_epoch)
        most = steps if self.config["max_steps"] > 0 else math.inf  # of each stage
        before = [(name, min(math.ceil(n * self.per_epoch), most)) for name, n in model.stages()]
        self.stages = [*before, ("train", steps)]  # name, steps
        self.pre_training = sum(count for _, count in before)
        self.total = self.pre_training + steps

    def train(self) -> dict:
        run = self.run
        self.state = state = run.load_checkpoint(self.trained, self.optimizer)
        started = state["step"]
        measured = [evaluation["step"] for evaluation in state["evaluations"]] or [0]
        evaluated = state["best_step"] in measured and state["evaluated"] in measured
        if started > self.total or not evaluated or max(measured) > started:
            saved = run.newest_checkpoint()
            raise UserError(f"{saved} is of no run of {self.total} steps; remove it, and start again")
        start = {"step": started} | environment(self.accelerator) | ({"sharded": True} if run.sharded else {})
        state["starts"] = [*state.get("starts", []), start]
        if self.micro_batch == "auto":
            self.micro_batch = self.find_micro_batch()
            state["starts"][-1]["micro_batch_size"] = self.micro_batch
        self.wrapped = self.model if run.sharded else self.accelerator.prepare_model(self.model)
        run.open_log(started)
        self.print_flags_without_effect()
        options = {"total": self.total, "initial": started, "unit": "step", "mininterval": 1}
        with tqdm(**options, disable=not self.accelerator.is_main_process) as bar:
            while True:
                step = state["step"]
                due = step % self.config["eval_steps"] == 0 or step == self.total
                if step > self.pre_training and due and state["evaluated"] < step:
                    run.save_checkpoint(state, self.trained, self.optimizer)
                    self.select()
                elif step > started and step % self.per_epoch == 0:
                    run.save_checkpoint(state, self.trained, self.optimizer)
                if step == self.total or self.out_of_patience():
                    break
                row = self.one_step(step)
                bar.update()
                rate = row["samples_per_second"]
                bar.set_postfix(loss=f"{row['loss']:.4f}", samples_per_s=f"{rate:.1f}", refresh=False)
                run.log(row)
        run.load_best(self.trained)
        return state | {"steps_per_epoch": self.per_epoch, "planned_steps": self.total}

    def print_flags_without_effect(self) -> None:
        """Print which flags have no effect: a default or a recipe may have set them for other runs."""
        every, patience, tell = self.config["eval_steps"], self.config["patience"], self.run.print
        for name, count in self.stages:
            if (warmup := self.config["warmup_steps"]) >= count:
                of_stage = f"--warmup_steps {warmup} of the {count} steps of {name}"
                tell(f"{of_stage}: the learning rate stays below --learning_rate, and --lr_scheduler has no effect")
        planned = math.ceil(self.total / every) - self.pre_training // every
        if patience is not None and planned <= patience + 1:
            tell(f"--patience {patience} has no effect: {planned} evaluations are planned")
        if all(group["rate"] == "head_lr" for group in self.optimizer.param_groups):
            tell("--learning_rate has no effect: all that trains has --head_learning_rate")

    def find_micro_batch(self) -> int:
        """How many examples fit on a device at once, the same number on all, or that of an earlier start of the run.

        Another number would change the noise of dropout.
        """
        for start in self.state["starts"]:
            if start.get("micro_batch_size"):
                return start["micro_batch_size"]
        # besides the activations there are gradients, their sums over devices, Adam's moments, and what its step needs
        kinds = 2 + (self.accelerator.num_processes > 1) + 2 * (not self.optimizer.state)
        reserved = kinds * sum(p.nbytes for p in self.trained.values())
        size, need, free = examples_that_fit(self.try_examples, self.share(), self.accelerator.device, reserved)
        size = min(self.accelerator.gather(torch.tensor([size], device=self.accelerator.device)).tolist())
        text = f"--micro_batch_size auto: {size} of {self.share()} examples at once"
        self.run.print(f"{text}, which take about {need // MIB:,} of the {free // MIB:,} MiB that are free")
        return size

    def share(self) -> int:
        """The most examples of a batch that a device gets."""
        return math.ceil(min(len(self.examples), self.config["batch_size"]) / self.accelerator.num_processes)

    def try_examples(self, number: int) -> None:
        """What a step does with the `number` longest examples, in every stage; leaves no trace."""
        self.model.train()
        visited = visited_examples(len(self.examples), self.config)  # a teacher answers for no others
        order = np.lexsort((-self.examples.num_targets[visited], -self.examples.lengths[visited]))
        for name, _ in self.stages:
            self.model.stage = name
            batch = self.model.batch(self.examples, visited[order[:number]], np.random.default_rng(0))
            try:
                with self.accelerator.autocast():
                    terms = self.model({n: v.to(self.accelerator.device) for n, v in batch.items()})
                sum(terms.values()).backward()
            finally:  # also where memory was short
                self.optimizer.zero_grad(set_to_none=True)

    def one_step(self, step: int) -> dict:
        """One optimiser step, counted from 0; returns its row of the log."""
        begun = time.perf_counter()
        self.set_stage(step)
        index = self.batch_index(step)
        terms = None
        try:
            terms = self.backward(index, step, shares=(step + 1) % self.config["eval_steps"] == 0)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if terms is None:  # what the error held is free again
            self.out_of_memory()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config["max_grad_norm"]).item()
        self.check_finite(terms, norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        self.state["step"] += 1
        self.state["train_seconds"] += seconds
        rates = {group["rate"]: group["lr"] for group in self.optimizer.param_groups}
        return {"step": step + 1, **terms, "grad_norm": norm, **rates, "samples_per_second": len(index) / seconds}

    def set_stage(self, step: int) -> None:
        """Tell the model its stage, and set the learning rate: each has a warm-up, schedule and Adam of its own."""
        for name, count in self.stages:  # noqa: B007
            if step < count:
                break
            step -= count
        if step == 0:  # moments of another loss would make its first steps far too large, or too small
            self.optimizer.state.clear()
        self.model.stage = name
        factor = rate_factor(self.config["lr_scheduler"], self.config["warmup_steps"], count, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def batch_index(self, step: int) -> np.ndarray:
        """Examples of a step: a pure function of the seed and the step."""
        epoch, at = divmod(step, self.per_epoch)
        return shuffled_batches(len(self.examples), self.config["batch_size"], self.config["seed"], epoch)[at]

    def backward(self, index: np.ndarray, step: int, shares: bool) -> dict[str, float]:
        """Accumulate the gradient of the global batch `index`; returns its loss terms, named, with their sum as loss.

        Each device takes every n-th example of the batch, and each micro-batch counts by the targets it holds, so that
        the gradient is that of the mean over the global batch whatever the devices and the micro-batch size. shares:
        log how much of the gradient each term makes.
        """
        accelerator, config, model, examples = self.accelerator, self.config, self.model, self.examples
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed(((config["seed"] * 1_000_003 + step) * world + rank) % 2**63)
        rng = np.random.default_rng([config["seed"], step, rank])
        self.wrapped.train()
        targets = examples.num_targets
        own, size = index[rank::world], self.micro_batch or len(index)
        parts = [own[at : at + size] for at in range(0, len(own), size)]
        weights = [float(targets[part].sum() / targets[index].sum()) for part in parts]
        # With weight 0, a device without a share takes part in the exchange of gradients. All run a sharded base
        # together, so as often as the first one, which has most.
        least = math.ceil(len(index[::world]) / size) if self.run.sharded else 1
        while len(parts) < least:
            parts, weights = [*parts, index[:1]], [*weights, 0.0]
        sums: dict[str, torch.Tensor] = {}
        with ExitStack() as accumulation:
            if len(parts) > 1 and world == 1:  # several devices exchange gradients in a backward pass, not after it
                with accelerator.autocast():
                    accumulation.enter_context(model.for_accumulation())
            for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                batch = {n: v.to(accelerator.device) for n, v in model.batch(examples, part, rng).items()}
                sync = number == len(parts) - 1
                with nullcontext() if sync or self.run.sharded else accelerator.no_sync(self.wrapped):
                    with accelerator.autocast():
                        terms = {name: value * weight for name, value in self.wrapped(batch).items()}
                    if shares and sync and len(terms) > 1:
                        self.run.log({"step": step + 1, "gradient_share": gradient_shares(terms, self.trained)})
                    accelerator.backward(sum(terms.values()) * world)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
        if self.run.sharded:  # elsewhere the backward pass sees to it
            gradients = [parameter.grad for parameter in self.trained.values()]
            mean = accelerator.reduce(nn.utils.parameters_to_vector(gradients), "mean")
            nn.utils.vector_to_parameters(mean, gradients)
        names = list(sums)
        values = accelerator.reduce(torch.stack([sums[name] for name in names]), "sum").tolist()
        return dict(zip(names, values, strict=True)) | {"loss": sum(values)}

    def out_of_memory(self) -> NoReturn:
        """RunError that says how much an example takes, and which flag helps."""
        self.optimizer.zero_grad(set_to_none=True)
        now, device = min(self.micro_batch or self.share(), self.share()), self.accelerator.device
        if device.type not in MEASURED or self.run.sharded:
            raise RunError(f"out of memory with {now} examples at once; give a smaller --micro_batch_size")
        size, need, free = examples_that_fit(self.try_examples, now, device)
        take = f"{size} take {need // MIB:,} of {free // MIB:,} MiB, about {need / size / MIB:.1f} each"
        less = min(size, max(1, now // 2))
        raise RunError(
            f"out of memory with {now} examples at once; {take}; --micro_batch_size {less} makes it need less, and may "
            "change with --resume auto"
        )

    def check_finite(self, terms: dict[str, float], norm: float, step: int) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            saved = sorted(self.run.checkpoints.glob("step-*"))
            what = f"loss term {bad[0]} is {terms[bad[0]]}" if bad else f"the gradient norm is {norm}"
            raise RunError(
                f"step {step + 1}: {what}; stopped before it reached the weights; last good checkpoint: "
                f"{saved[-1] if saved else 'none yet'}; try a lower --learning_rate"
            )

    def select(self) -> None:
        """Evaluate on validation and keep the weights if they are the best so far."""
        run, state = self.run, self.state
        metrics, _ = run.evaluate(self.model, "valid")
        (metrics,) = broadcast_object_list([metrics])  # machines may round differently: all stop by the first's
        kind, name = self.config["select_by"].split("/")
        best = max((e["metrics"][kind][name] for e in state["evaluations"]), default=-math.inf)
        state["evaluations"].append({"step": state["step"], "metrics": metrics})
        state["evaluated"] = state["step"]
        value = metrics[kind][name]
        if value > best:
            state["best_step"] = state["step"]
            run.save_best(self.trained)
        run.log({"step": state["step"], "valid": metrics})
        note = " (best)" if value > best else ""
        if self.out_of_patience() and state["step"] < self.total:
            note = f"; stopped early (--patience {self.config['patience']}), {self.total} steps were planned"
        run.print(f"step {state['step']}: valid {kind} {name} {value:.4f}{note}")
        self.accelerator.wait_for_everyone()

    def out_of_patience(self) -> bool:
        """Whether --patience evaluations came after the best one."""
        since = sum(evaluation["step"] > self.state["best_step"] for evaluation in self.state["evaluations"])
        return self.config["patience"] is not None and since >= self.config["patience"]


def rate_factor(kind: str, warmup: int, total: int, step: int) -> float:
    """What the learning rate is multiplied by at `step`, from 0: `warmup` steps up, then as `kind` says up to `total`.

    transformers has the same functions, but to import them takes longer than all else that step 1 imports.
    """
    if step < warmup:
        return step / warmup
    done, left = (step - warmup) / max(1, total - warmup), (total - step) / max(1, total - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": left, "constant": 1.0}[kind]


def parameter_groups(model: nn.Module, trained: dict[str, nn.Parameter], config: dict) -> list[dict]:
    """What trains, for the optimizer. Norms and biases have no weight decay.

    With --head_learning_rate `model.head_parameters()` train at that rate; `rate` is what a group's is called in the
    log.
    """
    own = config.get("head_learning_rate")
    heads = {id(parameter) for parameter in model.head_parameters()} if own else set()
    groups: dict[tuple, dict] = {}
    for parameter in trained.values():
        rate, lr = ("head_lr", own) if id(parameter) in heads else ("lr", config["learning_rate"])
        decay = config["weight_decay"] if parameter.ndim > 1 else 0.0
        values = {"lr": lr, "initial_lr": lr, "weight_decay": decay, "rate": rate}
        group = groups.setdefault((rate, decay), {"params": [], **values})
        group["params"].append(parameter)
    return list(groups.values())


def gradient_shares(terms: dict[str, torch.Tensor], trained: dict[str, nn.Parameter]) -> dict[str, float]:
    """Each term's gradient norm over the sum of all terms' norms: who really steers the step.

    An estimate where a batch is split over micro-batches or devices: the main process's last micro-batch speaks, and
    what micro-batches share is left out.
    """
    norms = {}
    for name, value in terms.items():
        gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(g.norm().item() ** 2 for g in gradients if g is not None))
    total = sum(norms.values()) or 1.0
    return {name: norm / total for name, norm in norms.items()}
