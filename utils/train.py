"""One run of one training script: its folder, the training loop, resuming, selection on validation, the results.

The loop serves every step. A model that trains here answers `forward(batch) -> {term: loss}`, whose sum is minimised,
and is a `Recommender` (utils/metrics.py); `head_parameters()` are those that --head_learning_rate is for. Everything
random in step k depends on the seed and k alone: batches on (seed, epoch), dropout noise on (seed, step).
So a run continues exactly from weights, optimiser state and a step number.
"""

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm
from transformers import get_scheduler

from utils.cli import ROOT, print_config, shown
from utils.data import Examples, Sequences, shuffled_batches
from utils.errors import RunError, UserError
from utils.files import (
    load_tensors,
    read_json,
    remove,
    remove_left_over,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)
from utils.metrics import SPLITS, Recommender, draw_negatives, evaluate
from utils.report import card, environment, git_commit, peak_memory, plot_curve, protocol

SELECTION_METRIC = ("sampled", "NDCG@10")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
RUN_FILES = ("metrics.json", "checkpoints", "log.jsonl", "curve.png", "README.md")  # beside config.json
WEIGHTS = ("model.safetensors", "rec_heads.safetensors", "decoder.safetensors", "adapter", "states")
LOCK = ".slmrec.lock"  # the first file of a run folder, held while a process trains in it
# what does not change what is trained: these may differ when a run is continued
NOT_COMPARED = ("resume", "report_to", "output_dir", "micro_batch_size", "eval_batch_size", "run_id")


class Run:
    """A run folder and what happens in it. Construct it only when every input has been checked.

    With --resume auto a finished run of the same configuration is left as it is (`finished`), an interrupted one goes
    on, and one of another configuration is refused. With --resume never the folder's earlier run is replaced, in the
    moment in which `start` writes the new configuration: it holds a new `run_id`, and metrics and checkpoints with
    another one belong to no run. So a folder always holds the old run or the new one, wherever a kill comes.
    """

    def __init__(self, config: dict, data: Sequences, default_dir: str) -> None:
        self.folder = Path(config["output_dir"] or ROOT / "outputs" / data.name / default_dir)
        self.config = config | {"output_dir": shown(self.folder), "dataset_fingerprint": data.fingerprint}
        self.data = data
        self.checkpoints = self.folder / "checkpoints"
        self.lock = FileLock(self.folder / LOCK)
        tracker = config.get("report_to", "none")
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise UserError(f"--report_to {tracker}: the package is not installed (pip install {tracker})")
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if config["dtype"] == "bfloat16" else "no",
            log_with=None if tracker == "none" else tracker,
            project_dir=self.folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),  # the item table never changes
                InitProcessGroupKwargs(timeout=timedelta(days=1)),  # others wait for the first's teacher states
            ],
        )
        self.finished = self._open_folder()
        if self.accelerator.is_main_process:
            if (self.folder / LOCK).exists():  # tell a folder in use before long work; `start` keeps the lock
                self._take_lock()
                self.lock.release()
            print_config(self.config)
            print(data.describe(), flush=True)
            if self.finished:
                self._leave_finished()
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was
        torch.manual_seed(config["seed"] % 2**63)

    def _open_folder(self) -> bool:
        """Check what stands in the folder; True if it is this very run, finished."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir {self.folder} is a file; choose a folder")
        earlier = self.folder / "config.json"
        if not earlier.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LOCK).exists():
                raise UserError(f"--output_dir {self.folder} holds something that is no run; choose another folder")
            return False
        old = read_json(earlier, "")
        if old.get("kind") != self.config["kind"]:
            raise UserError(
                f"--output_dir {self.folder} holds something that is no run of this step; choose another folder"
            )
        if self.config["resume"] != "auto":
            return False
        new = {n: json.loads(json.dumps(value)) for n, value in self.config.items() if n not in NOT_COMPARED}
        # a flag that the run's own version did not have, and that is off, changes nothing in what it did
        changed = [n for n, value in new.items() if (n in old or value) and old.get(n) != value]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self.folder} holds a run with {name}={old.get(name)}, not {self.config[name]}: pass its "
                "flags to continue it, --resume never to replace it, or another --output_dir"
            )
        metrics = self.folder / "metrics.json"
        return metrics.exists() and read_json(metrics, "").get("run_id") == old.get("run_id")

    def _take_lock(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}: wait until it ends, or choose another --output_dir"
            ) from None

    def _leave_finished(self) -> None:
        """Say which run it is, and end the clean-up that a kill may have cut off."""
        remove([self.checkpoints])
        ran, now = read_json(self.folder / "metrics.json", "")["environment"]["git_commit"], git_commit()
        text = f"{self.folder} is finished, at commit {ran}, and left as it is"
        if ran != now or now.endswith("-dirty"):
            has = "may have changed" if ran == now else f"has changed, it is at {now} now"
            text += f"; the code {has}: --resume never trains it again"
        print(text, flush=True)

    def record(self, **found: str) -> None:
        """Add to the configuration what is known only when training starts; UserError where it continues from other."""
        earlier = self.folder / "config.json"
        old = read_json(earlier, "") if self.config["resume"] == "auto" and earlier.exists() else {}
        for name, value in found.items():
            if old.get(name, value) != value:
                raise UserError(
                    f"{self.folder} holds a run with {name}={old[name]}, not {value}: bring that back to continue it, "
                    "or pass --resume never to replace it, or another --output_dir"
                )
        self.config |= found

    def start(self) -> None:
        """Make the folder this run's: after this, what an earlier run left there is gone unless it is continued."""
        if self.accelerator.is_main_process:
            Path(os.path.realpath(self.folder)).mkdir(parents=True, exist_ok=True)  # also where a link leads nowhere
            self._take_lock()
            if self._open_folder():
                raise UserError(f"another process has finished {self.folder} meanwhile; start again to see its results")
            self._start_tracker()
            for folder in (self.folder, self.checkpoints):
                remove_left_over(folder)
            earlier = self.folder / "config.json"
            old = read_json(earlier, "") if earlier.exists() and self.config["resume"] == "auto" else {}
            self.config["run_id"] = old.get("run_id")
            continued = bool(old) and self._newest_checkpoint() is not None
            if not continued:
                self.config["run_id"] = uuid.uuid4().hex
            write_json(self.config, earlier)
            if not continued:
                remove(self.folder / name for name in (*RUN_FILES, *WEIGHTS))
        self.accelerator.wait_for_everyone()
        self.config["run_id"] = read_json(self.folder / "config.json", "")["run_id"]

    def _start_tracker(self) -> None:
        if not self.accelerator.log_with:
            return
        flat = {name: value for name, value in self.config.items() if isinstance(value, int | float | str | bool)}
        try:
            self.accelerator.init_trackers("slmrec", config=flat)
        except Exception as error:  # each tracker has errors of its own: no key, no network, no permission
            raise UserError(f"--report_to {self.config['report_to']} cannot start: {error}") from error

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of this very run."""
        for place in sorted(self.checkpoints.glob("step-*"), reverse=True):
            state = place / "state.json"
            if state.exists() and read_json(state, "").get("run_id") == self.config["run_id"]:
                return place
        return None

    def evaluate(self, model: Recommender, split: str, progress: bool = False) -> tuple[dict, float]:
        """Metrics of `model` on a split, and the seconds it took to score and rank its users."""
        if isinstance(model, nn.Module):
            model.to(self.accelerator.device).eval()
        if not hasattr(self, "negatives"):
            self.negatives = {name: draw_negatives(self.data, name) for name in SPLITS}
        return evaluate(
            model,
            self.data,
            split,
            self.negatives[split],
            max_length=self.config["max_seq_length"],
            batch_size=self.config["eval_batch_size"],
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            progress=progress and self.accelerator.is_main_process,
        )

    def fit(self, model: nn.Module, examples: Examples, extra: dict[str, np.ndarray] | None = None) -> dict:
        """Train `model` on `examples` and leave the weights that did best on validation in it.

        extra: arrays with one row a target, handed to `model` in the batch under their names. Returns the state of
        the loop: step, best_step, evaluations, train_seconds.
        """
        if not len(examples):
            raise UserError(f"dataset {self.data.name} gives no training example: every user has too few interactions")
        try:
            self.start()
            return self._train(model, examples, extra or {})
        except BaseException:
            self.lock.release()
            raise

    def _train(self, model: nn.Module, examples: Examples, extra: dict[str, np.ndarray]) -> dict:
        config, accelerator = self.config, self.accelerator
        model.to(accelerator.device)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            parameter_groups(model, trained, config), lr=config["learning_rate"], weight_decay=config["weight_decay"]
        )
        per_epoch = math.ceil(len(examples) / config["batch_size"])
        total = config["max_steps"] if config["max_steps"] > 0 else math.ceil(config["num_epochs"] * per_epoch)
        schedule = get_scheduler(SCHEDULES[config["lr_scheduler"]], optimizer, config["warmup_steps"], total)
        learning_rate_factor = schedule.lr_lambdas[0]  # a function of the step alone
        state = self._resume(trained, optimizer)
        started = state["step"]
        state["starts"] = [*state.get("starts", []), {"step": started} | environment(accelerator)]
        wrapped = accelerator.prepare_model(model)
        self._open_log(started)
        shown = {"total": total, "initial": started, "unit": "step", "mininterval": 1}
        with tqdm(**shown, disable=not accelerator.is_main_process) as bar:
            epoch, batches = -1, []
            while True:
                step = state["step"]
                if step and (step % config["eval_steps"] == 0 or step == total) and state["evaluated"] < step:
                    self._save(state, trained, optimizer)
                    self._select(state, model, trained)
                elif step > started and step % per_epoch == 0:
                    self._save(state, trained, optimizer)
                if step == total:
                    break
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    batches = shuffled_batches(len(examples), config["batch_size"], config["seed"], epoch)
                begun = time.perf_counter()
                factor = learning_rate_factor(step)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                index = batches[step % per_epoch]
                shares = (step + 1) % config["eval_steps"] == 0
                terms = self._backward(wrapped, trained, examples, index, extra, step, shares)
                norm = nn.utils.clip_grad_norm_(trained.values(), config["max_grad_norm"]).item()
                self._check_finite(terms, norm, step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds = time.perf_counter() - begun
                state["step"] += 1
                state["train_seconds"] += seconds
                rate = len(index) / seconds
                bar.update()
                bar.set_postfix(loss=f"{terms['loss']:.4f}", samples_per_s=f"{rate:.1f}", refresh=False)
                rates = [group["lr"] for group in optimizer.param_groups]
                rates = dict(zip(("lr", "head_lr"), rates, strict=False))
                self._log({"step": step + 1, **terms, "grad_norm": norm, **rates, "samples_per_second": rate})
        best = load_tensors(self.checkpoints / "best" / "model.safetensors")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(best[name])
        return state | {"steps_per_epoch": per_epoch}

    def _backward(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        examples: Examples,
        index: np.ndarray,
        extra: dict[str, np.ndarray],
        step: int,
        shares: bool,
    ) -> dict[str, float]:
        """Accumulate the gradient of the global batch `index`; returns its loss terms, named, with their sum as loss.

        Each device takes every n-th example of the batch, and each micro-batch counts by the targets it holds, so that
        the gradient is that of the mean over the global batch whatever the devices and the micro-batch size.
        """
        accelerator, config = self.accelerator, self.config
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed(((config["seed"] * 1_000_003 + step) * world + rank) % 2**63)
        model.train()
        asked = examples.asked
        own = index[rank::world]
        idle = not len(own)  # a device without a share takes part in the exchange of gradients, with weight 0
        own = index[:1] if idle else own
        size = config["micro_batch_size"] or len(own)
        parts = [own[at : at + size] for at in range(0, len(own), size)]
        sums: dict[str, torch.Tensor] = {}
        with ExitStack() as accumulation:
            if len(parts) > 1 and world == 1:  # several devices exchange gradients in a backward pass, not after it
                with accelerator.autocast():
                    accumulation.enter_context(getattr(model, "for_accumulation", nullcontext)())
            for number, part in enumerate(parts):
                rows = examples.target_rows(part)
                batch = examples.batch(part) | {name: torch.from_numpy(array[rows]) for name, array in extra.items()}
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                weight = 0.0 if idle else float(asked[part].sum() / asked[index].sum())
                sync = number == len(parts) - 1
                with nullcontext() if sync else accelerator.no_sync(model):
                    with accelerator.autocast():
                        terms = {name: value * weight for name, value in model(batch).items()}
                    if shares and sync and len(terms) > 1:
                        self._log({"step": step + 1, "gradient_share": gradient_shares(terms, trained)})
                    accelerator.backward(sum(terms.values()) * world)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
        names = list(sums)
        values = accelerator.reduce(torch.stack([sums[name] for name in names]), "sum").tolist()
        return dict(zip(names, values, strict=True)) | {"loss": sum(values)}

    def _check_finite(self, terms: dict[str, float], norm: float, step: int) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            saved = sorted(self.checkpoints.glob("step-*"))
            what = f"loss term {bad[0]} is {terms[bad[0]]}" if bad else f"the gradient norm is {norm}"
            raise RunError(
                f"step {step + 1}: {what}; stopped before it reached the weights; last good checkpoint: "
                f"{saved[-1] if saved else 'none yet'}; try a lower --learning_rate"
            )

    def _resume(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict:
        """The state to start from: that of the newest checkpoint, whose weights are loaded, or a fresh one."""
        saved = self._newest_checkpoint()
        if saved is None:
            fresh = {"step": 0, "evaluated": 0, "best_step": 0, "evaluations": [], "train_seconds": 0.0}
            return {"run_id": self.config["run_id"]} | fresh
        state = read_json(saved / "state.json", f"{saved} is incomplete; remove it and start again")
        weights, moments = (load_tensors(saved / f"{kind}.safetensors") for kind in ("model", "optimizer"))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
                found = {
                    key: moments[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq") if f"{key}.{name}" in moments
                }
                if found:
                    on_device = {key: value.to(parameter.device) for key, value in found.items()}
                    optimizer.state[parameter] = {"step": torch.tensor(float(state["step"]))} | on_device
        self.print(f"continuing from step {state['step']} ({saved})")
        return state

    def _save(self, state: dict, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint of the current step, before it is evaluated if it is; older ones are removed."""
        if not self.accelerator.is_main_process:
            return
        place = self.checkpoints / f"step-{state['step']:08d}"
        moments = {
            f"{key}.{name}": optimizer.state[p][key]
            for name, p in trained.items()
            for key in ("exp_avg", "exp_avg_sq")
            if key in optimizer.state[p]
        }
        with whole_folder(place) as part:
            save_tensors(trained, part / "model.safetensors")
            save_tensors(moments, part / "optimizer.safetensors")
            write_json(state, part / "state.json")
        remove(sorted(self.checkpoints.glob("step-*"))[:-1])

    def _select(self, state: dict, model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
        """Evaluate on validation and keep the weights if they are the best so far."""
        metrics, _ = self.evaluate(model, "valid")
        kind, name = SELECTION_METRIC
        best = max((e["metrics"][kind][name] for e in state["evaluations"]), default=-math.inf)
        state["evaluations"].append({"step": state["step"], "metrics": metrics})
        state["evaluated"] = state["step"]
        value = metrics[kind][name]
        if value > best:
            state["best_step"] = state["step"]
            if self.accelerator.is_main_process:
                with whole_folder(self.checkpoints / "best") as part:
                    save_tensors(trained, part / "model.safetensors")
        self._log({"step": state["step"], "valid": metrics})
        self.print(f"step {state['step']}: valid {kind} {name} {value:.4f}{' (best)' if value > best else ''}")
        self.accelerator.wait_for_everyone()

    def _open_log(self, step: int) -> None:
        """Cut the log back to the step that the run continues from."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if row["step"] < step or (row["step"] == step and "valid" not in row):  # that evaluation is made again
                kept.append(f"{line}\n")
        with whole_file(path) as part:
            part.write_text("".join(kept), encoding="utf-8")

    def _log(self, values: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self.accelerator.log_with:
            self.accelerator.log(flatten({k: v for k, v in values.items() if k != "step"}), step=values["step"])

    def print(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def finish(
        self,
        model: Recommender,
        state: dict,
        parameters: dict[str, int],
        save: Callable[[Path], None],
        floor: dict[str, Recommender] | None = None,
    ) -> None:
        """Measure the chosen weights on test, save them and every report; metrics.json comes last.

        floor: recommenders without training that are measured beside this one.
        """
        chosen = next(e for e in state["evaluations"] if e["step"] == state["best_step"])
        test, seconds = self.evaluate(model, "test", progress=True)
        if self.accelerator.is_main_process:
            save(self.folder)
        below = {}
        for name, other in (floor or {}).items():
            measured = {split: self.evaluate(other, split) for split in SPLITS}
            below[name] = {split: measured[split][0] for split in SPLITS} | {"score_test_seconds": measured["test"][1]}
        epochs = state["step"] / state["steps_per_epoch"]
        if self.accelerator.is_main_process:
            metrics = {
                "valid": chosen["metrics"],
                "test": test,
                "best_step": state["best_step"],
                "steps": state["step"],
                "selected_by": "valid " + " ".join(SELECTION_METRIC),
                "seconds": {
                    "train": state["train_seconds"],
                    "train_epoch": state["train_seconds"] / epochs,
                    "score_test": seconds,
                },
                "parameters": parameters,
                "peak_memory_bytes": peak_memory(),
                "protocol": protocol(self.data, self.config["max_seq_length"], self.negatives["test"]),
                "floor": below,
                "environment": {name: value for name, value in state["starts"][-1].items() if name != "step"},
                "starts": state["starts"],
                "run_id": self.config["run_id"],
            }
            plot_curve(self.folder)
            (self.folder / "README.md").write_text(card(self.config, metrics), encoding="utf-8")
            write_json(metrics, self.folder / "metrics.json")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove([self.checkpoints])
        if self.accelerator.log_with:
            self.accelerator.end_training()
        self.lock.release()


def parameter_groups(model: nn.Module, trained: dict[str, nn.Parameter], config: dict) -> list[dict]:
    """What trains, for the optimizer; with --head_learning_rate `model.head_parameters()` apart, at that rate."""
    own = config.get("head_learning_rate")
    heads = {id(parameter) for parameter in model.head_parameters()} if own else set()
    rest = {"params": [p for p in trained.values() if id(p) not in heads]}
    return [rest, {"params": [p for p in trained.values() if id(p) in heads], "lr": own}] if heads else [rest]


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


def flatten(values: dict, prefix: str = "") -> dict[str, float]:
    """Nested dictionaries to one level, keys joined by '/'."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
