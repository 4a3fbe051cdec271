"""One run of one training script: its folder, what is refused, resuming, and its records.

`utils/train.py` is the loop. A run folder holds config.json, checkpoints/ while it trains, and metrics.json when it has
finished.
"""

import importlib.util
import json
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from utils.candidates import SPLITS, Negatives
from utils.catalogue import CATALOGUE_FILE, Catalogue
from utils.checked import REPLACED, FromFile, load_tensors, read_json
from utils.cli import ROOT, portable_path, print_config
from utils.data import Sequences
from utils.errors import UserError
from utils.files import atomic_file, atomic_folder, check_writable, remove, remove_left_over, save_tensors, write_json
from utils.flags import FORMER_DEFAULTS
from utils.memory import check_measured, check_sharded
from utils.metrics import RANKS_FILE, metrics_by_kind, rank_users, save_ranks
from utils.report import card, flatten, git_commit, log_rows, peak_memory, plot_curve, protocol
from utils.run_files import check_shapes, is_finished, read_config, read_metrics, read_state, without

# beside config.json
RUN_FILES = ("metrics.json", "checkpoints", "log.jsonl", "curve.png", "README.md", CATALOGUE_FILE, RANKS_FILE)
WEIGHTS = ("model.safetensors", "rec_heads.safetensors", "decoder.safetensors", "adapter", "states")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam, per weight: a stage may leave weights out
LOCK = ".slmrec.lock"  # the first file of a run folder, held while a process trains in it
# these may differ when a run is continued
NOT_COMPARED = ("resume", "report_to", "output_dir", "micro_batch_size", "eval_batch_size", "run_id", "num_users")


class Run:
    """A run folder and what happens in it. Construct it only when every input has been checked.

    With --resume auto a finished run of the same configuration is left as it is (`finished`), an interrupted one goes
    on, and one of another configuration is refused. With --resume never the folder's earlier run is replaced, in the
    moment in which `start` writes the new configuration: it holds a new `run_id`, and metrics and checkpoints with
    another one belong to no run. So a folder always holds the old run or the new one, wherever a kill comes.
    """

    def __init__(self, config: dict, data: Sequences, default_dir: str) -> None:
        self.folder = Path(config["output_dir"] or ROOT / "outputs" / data.name / default_dir).absolute()
        self.config = config | {"output_dir": portable_path(self.folder), "dataset_fingerprint": data.fingerprint}
        self.config["num_users"] = len(data.offsets) - 1
        self.data, self.catalogue = data, Catalogue.of(data)  # the dataset may be made anew while this trains
        self.negatives = {split: Negatives(data, split) for split in SPLITS}
        self.checkpoints = self.folder / "checkpoints"
        self.lock = FileLock(self.folder / LOCK)
        tracker = config.get("report_to", "none")
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise UserError(f"--report_to {tracker}: the package is not installed (pip install {tracker})")
        stages = "pretrain_epochs" in config  # one may leave weights out; buffers never change
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if config["dtype"] == "bfloat16" else "no",
            log_with=None if tracker == "none" else tracker,
            project_dir=self.folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=stages),
                InitProcessGroupKwargs(timeout=timedelta(days=1)),  # others wait for the first's teacher states
            ],
        )
        self.sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")  # set by `accelerate launch --use_fsdp`
        if self.sharded:
            check_sharded(config, self.accelerator.num_processes)
        if config.get("micro_batch_size") == "auto":
            check_measured(self.accelerator.device)
        self.finished = self._open_folder()
        if self.accelerator.is_main_process:
            if not self.finished:  # what is closed, or in use, is told before long work; `start` keeps the lock
                check_writable(self.folder, "--output_dir")
                if (self.folder / LOCK).exists():
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
        earlier = self.folder / "config.json"
        strange = UserError(f"--output_dir {self.folder} holds something that is no run of this step: choose another")
        if not earlier.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LOCK).exists():
                raise strange
            return False
        old = FORMER_DEFAULTS | read_json(earlier, "", advice=REPLACED)  # what is to be replaced may hold anything
        if old.get("kind") != self.config["kind"]:
            raise strange
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
        if old.get("run_id") is None and list(self.checkpoints.glob("step-*")):
            raise UserError(f"{earlier} has no run_id, so its checkpoints are of no run: pass --resume never")
        return is_finished(self.folder, old, "bring it back, or pass --resume never to train it again")

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
        ran, now = read_metrics(self.folder)["environment"]["git_commit"], git_commit()
        text = f"{self.folder} is finished, at commit {ran}, and left as it is"
        if ran != now or now.endswith("-dirty"):
            has = "may have changed" if ran == now else f"has changed, it is at {now} now"
            text += f"; the code {has}: --resume never trains it again"
        print(text, flush=True)

    def record(self, **found: str) -> None:
        """Add to the configuration what is known when training starts; UserError if the run to continue had other."""
        old = self._continued_config()
        for name, value in found.items():
            if old and old.get(name) != value:
                raise UserError(
                    f"{self.folder} holds a run with {name}={old.get(name)}, not {value}: bring that back to continue "
                    "it (of a base: weights, tokenizer and prompt), or pass --resume never to replace it, or another "
                    "--output_dir"
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
            old = self._continued_config()
            self.config["run_id"] = old.get("run_id")
            continued = bool(old) and self.newest_checkpoint() is not None
            if not continued:
                self.config["run_id"] = uuid.uuid4().hex
            write_json(self.config, self.folder / "config.json")
            remove(self.folder / name for name in (*RUN_FILES, *WEIGHTS) if not continued)
        self.accelerator.wait_for_everyone()
        self.config["run_id"] = read_config(self.folder)["run_id"]

    def _continued_config(self) -> dict:
        """config.json of the run to continue, or {}."""
        auto = self.config["resume"] == "auto"
        return read_config(self.folder) if auto and (self.folder / "config.json").exists() else {}

    def _start_tracker(self) -> None:
        if not self.accelerator.log_with:
            return
        flat = {name: value for name, value in self.config.items() if isinstance(value, int | float | str | bool)}
        try:
            self.accelerator.init_trackers("slmrec", config=flat)
        except Exception as error:  # each tracker has errors of its own: no key, no network, no permission
            raise UserError(f"--report_to {self.config['report_to']} cannot start: {error}") from error

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of this very run."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            state = folder / "state.json"
            if state.exists() and read_state(folder).get("run_id") == self.config["run_id"]:
                return folder
        return None

    def evaluate(self, model: nn.Module, split: str) -> tuple[dict, float]:
        """Metrics of `model` on a split, and the seconds it took to score and rank its users."""
        ranks, seconds = self.rank(model, split)
        return metrics_by_kind(ranks), seconds

    def rank(self, model: nn.Module, split: str, progress: bool = False) -> tuple[dict[str, np.ndarray], float]:
        """`rank_users` with the protocol of the run; several processes share the users, and all get all ranks."""
        accelerator = self.accelerator
        model.to(accelerator.device).eval()
        ranks, seconds = rank_users(
            model,
            self.data,
            split,
            self.negatives[split],
            max_length=self.config["max_seq_length"],
            batch_size=self.config["eval_batch_size"],
            device=accelerator.device,
            autocast=accelerator.autocast,
            progress=progress and accelerator.is_main_process,
            share=(accelerator.process_index, accelerator.num_processes),
            together=self.sharded,
        )
        own = {kind: torch.from_numpy(found).to(accelerator.device) for kind, found in ranks.items()}
        return {kind: accelerator.reduce(found, "sum").cpu().numpy() for kind, found in own.items()}, seconds

    # --- checkpoints ---

    def save_checkpoint(self, state: dict, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint of the current step; older ones are removed."""
        if not self.accelerator.is_main_process:
            return
        folder = self.checkpoints / f"step-{state['step']:08d}"
        moments = {
            f"{key}.{name}": optimizer.state[p][key]
            for name, p in trained.items()
            for key in MOMENTS
            if key in optimizer.state[p]
        }
        with atomic_folder(folder) as part:
            save_tensors(trained, part / "model.safetensors")
            save_tensors(moments, part / "optimizer.safetensors")
            write_json(state, part / "state.json")
        remove(sorted(self.checkpoints.glob("step-*"))[:-1])

    @torch.no_grad()
    def load_checkpoint(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict:
        """The state to start from: that of the newest checkpoint, whose weights are loaded, or a fresh one."""
        saved = self.newest_checkpoint()
        if saved is None:
            fresh = {"step": 0, "evaluated": 0, "best_step": 0, "evaluations": [], "train_seconds": 0.0}
            return {"run_id": self.config["run_id"]} | fresh
        state = read_state(saved)
        if saved.name != f"step-{state['step']:08d}":
            raise UserError(f"{saved} holds the state of step {state['step']}; remove it and start again")
        if state["evaluations"]:
            self.load_best(trained)  # what is damaged is told now, not at the end
        weights, moments = (load_tensors(saved / f"{n}.safetensors", without(saved)) for n in ("model", "optimizer"))
        check_shapes(saved, weights, trained)
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            found = {key: moments[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in moments}
            if found:
                wanted = dict.fromkeys(MOMENTS[:2], parameter) | {"step": torch.zeros(())}
                check_shapes(saved, FromFile(saved / "optimizer.safetensors", found), wanted)
                if not 0 <= found["step"] <= state["step"]:
                    raise UserError(f"{saved}: its optimizer is of step {found['step']}; remove it")
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
        self.print(f"continuing from step {state['step']} ({saved})")
        return state

    def save_best(self, trained: dict[str, nn.Parameter]) -> None:
        if self.accelerator.is_main_process:
            with atomic_folder(self.checkpoints / "best") as part:
                save_tensors(trained, part / "model.safetensors")

    @torch.no_grad()
    def load_best(self, trained: dict[str, nn.Parameter]) -> None:
        best = load_tensors(self.checkpoints / "best" / "model.safetensors", without(self.checkpoints))
        check_shapes(self.checkpoints / "best", best, trained)
        for name, parameter in trained.items():
            parameter.copy_(best[name])

    # --- records ---

    def open_log(self, step: int) -> None:
        """Cut the log back to the step that the run continues from."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "log.jsonl"
        rows = log_rows(path) if path.exists() and step else []
        # the evaluation of `step` is made again
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and "valid" not in row)]
        with atomic_file(path) as part:
            part.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")

    def log(self, values: dict) -> None:
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
        model: nn.Module,
        state: dict,
        parameters: dict[str, int],
        save: Callable[[Path], None],
        baselines: dict[str, nn.Module] | None = None,
    ) -> None:
        """Measure the chosen weights on test, save them and every report; metrics.json comes last.

        baselines: recommenders without training that are measured beside this one.
        """
        chosen = next(e for e in state["evaluations"] if e["step"] == state["best_step"])
        ranks, seconds = self.rank(model, "test", progress=True)
        if self.accelerator.is_main_process:
            save(self.folder)
            save_ranks(ranks, self.folder)
            self.catalogue.save(self.folder)
        below = {}
        for name, other in (baselines or {}).items():
            measured = {split: self.evaluate(other, split) for split in SPLITS}
            below[name] = {split: measured[split][0] for split in SPLITS} | {"score_test_seconds": measured["test"][1]}
        if self.accelerator.is_main_process:
            metrics = {
                "valid": chosen["metrics"],
                "test": metrics_by_kind(ranks),
                "steps": state["step"],
                **{name: state[name] for name in ("best_step", "planned_steps", "steps_per_epoch", "starts")},
                "stopped_early": state["step"] < state["planned_steps"],
                "selected_by": "valid " + self.config["select_by"].replace("/", " "),
                "seconds": {
                    "train": state["train_seconds"],
                    "train_epoch": state["train_seconds"] * state["steps_per_epoch"] / state["step"],
                    "score_test": seconds,
                },
                "parameters": parameters,
                "peak_memory_bytes": peak_memory(),
                "protocol": protocol(self.data, self.config["max_seq_length"]),
                "baselines": below,
                "environment": {name: value for name, value in state["starts"][-1].items() if name != "step"},
                "run_id": self.config["run_id"],
            }
            plot_curve(self.folder, self.config["select_by"])
            (self.folder / "README.md").write_text(card(self.config, metrics), encoding="utf-8")
            write_json(metrics, self.folder / "metrics.json")
            remove([self.checkpoints])
        self.accelerator.wait_for_everyone()  # the run is there for the next step of any of them
        if self.accelerator.log_with:
            self.accelerator.end_training()
        self.lock.release()
