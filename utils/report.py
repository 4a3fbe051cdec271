"""What a run leaves for people: environment, card, curve, and the table that puts the recommenders side by side."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from utils.candidates import CANDIDATE_SEED, NUM_NEGATIVES, negative_counts
from utils.checked import check, load_tensors, read_text
from utils.cli import ROOT, portable_path
from utils.data import Sequences
from utils.errors import UserError
from utils.metrics import RANKS_FILE, bootstrap, metrics_by_kind, metrics_of_users
from utils.run_files import LOG, finished_run, read_config

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
ORDER = ("sr", "open_p5", "teacher", "student", "fusion")


def git_commit() -> str:
    """The checkout's commit, marked -dirty if tracked files outside results/ differ; 'unknown' outside a git checkout.

    What reproduce.py records in results/ between two runs changes nothing that a run computes.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(accelerator) -> dict:
    """All that a figure must be traceable to."""
    device = accelerator.device
    hardware = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }


def protocol(data: Sequences, max_length: int, num: int = NUM_NEGATIVES, seed: int = CANDIDATE_SEED) -> dict:
    """How the metrics were measured, among `num` negatives drawn with `seed`."""
    counts = negative_counts(data, num)
    fewest, most = int(counts.min()), int(counts.max())
    drawn = f"{num}" if fewest == num else f"{fewest} to {most} (not {num})"
    return {
        "split": "leave-one-out: the last item tests, the one before validates",
        "users": len(data.users),
        "items": data.num_items,
        "interactions": len(data.items),
        "sampled": f"1 positive and {drawn} negatives the user never touched, seed {seed}",
        "negatives": {"fewest": fewest, "most": most, "mean": float(counts.mean())},
        "users_without_negatives": int((counts == 0).sum()),
        "full": "the whole catalogue, items of the history masked",
        "rank": "number of other candidates with score >= the positive's: ties count against",
        "max_seq_length": max_length,
    }


def peak_memory() -> int:
    """Bytes: of the device if it is a GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def log_rows(path: Path) -> list[dict]:
    """Rows of log.jsonl; what a kill cut off is left out, as what is no row of a step."""
    rows = []
    for line in read_text(path).splitlines():
        with suppress(ValueError, RecursionError, UserError):
            row = json.loads(line)
            check(path, row, LOG)
            if "step" in row:
                rows.append(row)
    return rows


def plot_curve(folder: Path, select_by: str) -> None:
    """Loss terms and validation metrics over the steps, from log.jsonl to curve.png."""
    rows = log_rows(folder / "log.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "valid" in row]
    from matplotlib.figure import Figure  # an eighth of the time that step 1 takes to start

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    skipped = {"step", "grad_norm", "lr", "head_lr", "samples_per_second"}
    terms = dict.fromkeys(name for row in steps for name in row if name.isidentifier())
    names = [name for name in terms if name not in skipped]
    names = [name for name in names if len(names) > 2 or name == "loss"]  # a single term is the loss itself
    window = max(1, len(steps) // 50)
    for name in names:
        own = [row for row in steps if name in row]  # a pre-training stage has terms of its own
        width = min(window, len(own))
        smooth = np.convolve([row[name] for row in own], np.ones(width) / width, "valid")
        left.plot([row["step"] for row in own[width - 1 :]], smooth, label=name)
    left.set(xlabel="step", ylabel=f"loss, mean of {window} steps")
    for metric in dict.fromkeys(("sampled/HR@10", "sampled/NDCG@10", select_by)):
        kind, name = metric.split("/")
        own = [row for row in evaluations if name in row["valid"].get(kind, {})]
        values = [row["valid"][kind][name] for row in own]
        right.plot([row["step"] for row in own], values, marker="o", label=f"{kind} {name}")
    right.set(xlabel="step", ylabel="validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "curve.png", dpi=100)


def flatten(values: dict, prefix: str = "") -> dict[str, float]:
    """Nested dictionaries to one level, keys joined by '/'."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]], *rows]
    cells = [
        [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in lines
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def metric_row(title: str, values: dict[str, float]) -> list[str]:
    return [title, *(f"{value:.4f}" for value in values.values())]


def card(config: dict, metrics: dict) -> str:
    """The run folder's README.md."""
    header = ["split, candidates", *metrics["test"]["sampled"]]
    rows = [metric_row(f"{s}, {k}", metrics[s][k]) for s in ("valid", "test") for k in ("sampled", "full")]
    flags = markdown_table(["flag", "value"], [[name, str(value)] for name, value in config.items()])
    run = metrics["environment"]
    stopped = f", stopped early ({metrics['planned_steps']} were planned)" if metrics["stopped_early"] else ""
    return f"""# {config["title"]} on {metrics["protocol"]["users"]:,} users of {config["dataset"]}

{markdown_table(header, rows)}

Weights of step {metrics["best_step"]} of {metrics["steps"]}{stopped}, chosen on validation ({metrics["selected_by"]}).
Sampled: {metrics["protocol"]["sampled"]}. Full: {metrics["protocol"]["full"]}.
Parameters: {metrics["parameters"]["total"]:,} at inference, {metrics["parameters"]["trained"]:,} trained.

    {run["command"]}

Commit {run["git_commit"]}, Python {run["python"]}, {", ".join(f"{k} {v}" for k, v in run["packages"].items())}, \
{run["hardware"]} with {run["threads"]} threads. `metrics.json` and `config.json` hold all figures and flags,
`log.jsonl` every step, `curve.png` the curves.

![curves](curve.png)

{flags}
"""


def compare_ranks(a: Path, b: Path) -> list[dict]:
    """Each metric on test of the runs in two folders, and the paired bootstrap over users of a - b.

    Returns {"metric", "kind", "a", "b", "difference", "low", "high"} of every metric, sampled and full; low and high
    limit the 95 % interval. UserError where a folder holds no ranks, or those of other users or candidates.
    """
    (config, protocol, ranks), (other, other_protocol, other_ranks) = map(finished_ranks, (a, b))
    if config["dataset_fingerprint"] != other["dataset_fingerprint"]:
        what = f"{a} is of {config['dataset']}, {b} of {other['dataset']}, or of another version of it"
        raise UserError(f"{what}: only runs of one dataset have ranks of the same users")
    if protocol["sampled"] != other_protocol["sampled"]:
        what = f"{a} ranked {protocol['sampled']}, {b} {other_protocol['sampled']}"
        raise UserError(f"{what}: train the older one again, to compare them")
    values = [
        {(name, kind): of_users for kind in found for name, of_users in metrics_of_users(found[kind]).items()}
        for found in (ranks, other_ranks)
    ]
    ours, theirs = (np.stack(list(found.values())) for found in values)  # (metrics, users)
    rows = zip(values[0], ours.mean(1).tolist(), theirs.mean(1).tolist(), bootstrap(ours - theirs), strict=True)
    names = ("metric", "kind", "a", "b", "difference", "low", "high")
    return [dict(zip(names, (*of, one, another, *found), strict=True)) for of, one, another, found in rows]


def finished_ranks(folder: Path) -> tuple[dict, dict, dict[str, np.ndarray]]:
    """config.json of a finished run, its protocol, and the ranks (users,) of its test users, sampled and full."""
    config, metrics = finished_run(folder, f"{folder} holds no finished run: give the folder of one")
    if not (folder / RANKS_FILE).is_file():
        raise UserError(f"{folder} holds no ranks of users ({RANKS_FILE}): give the folder of a run of this version")
    saved, protocol = load_tensors(folder / RANKS_FILE), metrics["protocol"]
    try:
        ranks = {kind: saved[f"test_{kind}"].numpy() for kind in ("sampled", "full")}
        fits = all(
            found.dtype.kind == "i" and found.shape == (protocol["users"],) and (found >= 0).all()
            for found in ranks.values()
        )
        means = metrics_by_kind(ranks) if fits else {}
        # hits are counts, the same on every machine; sums of others differ in the last digit
        hits = [(kind, name) for kind, of_kind in means.items() for name in of_kind if name.startswith("HR")]
        same = [metrics["test"][kind][name] == means[kind][name] for kind, name in hits]
    except (TypeError, AttributeError):
        same = []
    if not same or not all(same):
        raise UserError(f"{folder}: {RANKS_FILE} and metrics.json do not belong together; train the run again")
    return config, protocol, ranks


def check_parts(config: dict) -> None:
    """UserError where a fusion was made of runs that have been trained anew since."""
    run_ids = config.get("run_ids", ())
    if config.get("kind") == "fusion" and len(run_ids) != 2:
        raise UserError("a fusion without the run_ids of its two runs: another version made it; fuse them again")
    for flag, run_id in zip(("run", "fuse"), run_ids, strict=False):
        part = ROOT / config[flag] / "config.json"
        if part.exists() and read_config(part.parent).get("run_id") != run_id:
            again = f"python evaluate.py --run {config['run']} --fuse {config['fuse']}"
            raise UserError(f"{config[flag]} was trained anew since they were fused; fuse them again: {again}")


def parts_of(config: dict) -> list[Path]:
    """The folders of the two runs that evaluate.py fused; UserError where one is gone or was trained anew."""
    check_parts(config)
    folders = [ROOT / config[name] for name in ("run", "fuse")]  # where `check_parts` has looked
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder}, part of a fusion, is gone: bring it back, or make it and fuse again")
    return folders


def finished_runs(folder: Path, fingerprint: str) -> tuple[list[dict], list[str]]:
    """{"config", "metrics"} of every finished run and fusion below a folder, on one dataset.

    Also a line for each run that is left out: damaged, or of another dataset than that of `fingerprint`. Other things
    are passed over.
    """
    runs, left_out = [], []
    for path in sorted(folder.glob("*/metrics.json")):
        try:
            config, metrics = finished_run(path.parent, "not finished")
            if config.get("kind") not in ORDER:
                continue
            check_parts(config)
            config |= {"output_dir": portable_path(path.parent)}  # it may have been copied
            run = {"config": config, "metrics": metrics}
            list(table_rows(run))  # it holds what the table needs
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            why = str(error) if isinstance(error, UserError) else f"damaged ({type(error).__name__}: {error})"
            if (path.parent / "config.json").exists():
                left_out.append(f"left out of the table, {path.parent}: {why}")
            continue
        if config.get("dataset_fingerprint") == fingerprint:
            runs.append(run)
        else:
            left_out.append(f"left out of the table, {path.parent}: made from another dataset than the present one")
    return runs, left_out


HEADER = ["test users", "HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR", "full HR@10", "full NDCG@10"]
HEADER += ["params", "trained", "s/epoch", "s to score"]


def table_rows(run: dict) -> Iterator[list[str]]:
    """A run's rows of the table: recommenders without training first, then its own."""

    def row(title: str, test: dict, total: int, trained: int, epoch: str, score: float) -> list[str]:
        figures = [f"{test['sampled'][name]:.4f}" for name in HEADER[1:7]]
        figures += [f"{test['full'][name]:.4f}" for name in ("HR@10", "NDCG@10")]
        return [title, *figures, f"{total / 1e6:.2f} M", f"{trained / 1e6:.2f} M", epoch, f"{score:.1f}"]

    config, metrics = run["config"], run["metrics"]
    for name, baseline in metrics["baselines"].items():
        yield row(name, baseline["test"], 0, 0, "-", baseline["score_test_seconds"])
    seconds, sizes = metrics["seconds"], metrics["parameters"]
    epoch = "-" if config["kind"] == "fusion" else f"{seconds['train_epoch']:.1f}"
    figures = (sizes["total"], sizes["trained"], epoch, seconds["score_test"])
    yield row(f"{config['title']} ({Path(config['output_dir']).name})", metrics["test"], *figures)


def comparison(runs: list[dict]) -> str:
    """The closing table, test users: sampled and full metrics, parameters, seconds. Traditional models come first."""
    in_order = sorted(runs, key=lambda run: ORDER.index(run["config"]["kind"]))
    rows = {row[0]: row for run in in_order for row in table_rows(run)}
    return markdown_table(HEADER, list(rows.values()))


def closing_table(folder: Path, fingerprint: str) -> str:
    """The table of all finished runs of a dataset below `folder`, and what was left out of it."""
    runs, left_out = finished_runs(folder, fingerprint)
    return "\n".join([*left_out, comparison(runs)])
