"""Measure a saved run again, without training, whole or by layer; or fuse its scores with those of another run.

python evaluate.py                                              the default student on test
python evaluate.py --run outputs/ml-100k/sasrec --split valid
python evaluate.py --negatives 99                               another number of sampled candidates
python evaluate.py --layers all                                 and what each of its layers would recommend
python evaluate.py --fuse outputs/ml-100k/sasrec                the default student and SASRec as one recommender
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import uuid
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator

from models.fusion import Fusion, rank_with_weights
from models.llm.decoder import layer_numbers
from recommend import Trained, load, run_config, run_folder
from utils import assets, cli
from utils.candidates import CANDIDATE_SEED, NUM_NEGATIVES, Negatives, negative_counts
from utils.catalogue import CATALOGUE_FILE
from utils.data import Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import atomic_folder, write_json
from utils.metrics import RANKS_FILE, SelectBy, evaluate, metrics_by_kind, rank_each, save_ranks
from utils.report import closing_table, environment, markdown_table, metric_row, peak_memory, protocol
from utils.run_files import config_to_replace, finished_run

WEIGHTS = [k / 10 for k in range(11)]  # of the second run
CRITERIA = [f"valid {metric.replace('/', ' ')}" for metric in get_args(SelectBy)]


def main(
    *,
    run: str = "outputs/ml-100k/student-4from8",
    fuse: str | None = None,
    layers: str | None = None,
    dataset: str | None = None,
    split: Literal["valid", "test"] = "test",
    negatives: int = NUM_NEGATIVES,
    candidate_seed: int = CANDIDATE_SEED,
    eval_batch_size: int = 512,
    output_dir: str | None = None,
) -> None:
    if fuse is not None:
        if layers is not None:
            raise UserError("--layers measures the layers of one run, --fuse two runs as one: leave one of them out")
        if (split, negatives, candidate_seed) != ("test", NUM_NEGATIVES, CANDIDATE_SEED):
            raise UserError(
                "--fuse chooses on valid and measures on test, with the candidates of every run: leave out --split, "
                "--negatives and --candidate_seed"
            )
        fuse_runs(run, fuse, dataset, eval_batch_size, output_dir)
        return
    if output_dir is not None and layers is None:
        raise UserError("--output_dir is where --fuse and --layers write: add --fuse or --layers, or leave it out")
    asked = None if layers is None else asked_layers(run, layers)
    if output_dir is not None:
        config_to_replace(Path(output_dir), "layers", ["config.json", "metrics.json"])
    config = run_config(run)  # what follows is checked before the model is loaded, which takes long
    data = Sequences.load(assets.dataset_folder(dataset or config["dataset"]))
    check_same_dataset(data, config, Path(run))
    if negatives > max(data.num_items, NUM_NEGATIVES):
        raise UserError(f"--negatives {negatives}: {data.name} has {data.num_items} items, so no user has as many")
    trained = load(run)
    drawn = Negatives(data, split, negatives, candidate_seed)
    options = {"max_length": trained.config["max_seq_length"], "batch_size": eval_batch_size, "progress": True}
    options |= {"device": trained.device, "autocast": trained.autocast}
    if asked is None:
        metrics, seconds = evaluate(trained.model, data, split, drawn, **options)
        rows = [metric_row(f"{split}, {kind}", values) for kind, values in metrics.items()]
        print(markdown_table(["split, candidates", *metrics["full"]], rows))
    else:
        metrics, seconds = evaluate_layers(trained, asked, data, split, drawn, **options)
        print(layer_table(metrics, split))
    if output_dir is not None:
        how = protocol(data, options["max_length"], negatives, candidate_seed)
        save_layers(Path(output_dir), run_folder(run), trained.config, metrics, split, how, seconds)
    counts = negative_counts(data, negatives)
    print(f"{len(data.users):,} users, {counts.min()} to {counts.max()} negatives, {seconds:.1f} s")


def asked_layers(run: str, layers: str) -> list[int]:
    """The numbers that --layers names, counted from 1; UserError where the run has none, or not all of them."""
    config, _ = finished_run(run_folder(run), f"--run {run} holds no finished run: give the folder of one")
    if config.get("kind") not in ("teacher", "student"):
        raise UserError(f"--layers {layers}: --run {run} is no run of finetune.py or distill.py, so it has no layers")
    depth = config["num_layers"]
    if layers.strip().lower() == "all":
        return list(range(1, depth + 1))
    some = ",".join(map(str, sorted({1, (depth + 1) // 2, depth})))
    asked = layer_numbers(f"--layers {layers}", layers, f"all, or numbers of layers from 1, as in {some}")
    if asked[0] < 1 or asked[-1] > depth:
        raise UserError(f"--layers {layers}: {run} has {depth} layers; choose from 1..{depth}, as in {some}, or all")
    return asked


def evaluate_layers(
    trained: Trained, layers: list[int], data: Sequences, split: str, negatives: Negatives, **options
) -> tuple[dict[str, dict], float]:
    """`evaluate` by the states after each layer, which answer from one forward pass; keys are the layers' numbers."""
    blocks = partial(trained.model.layer_score_blocks, layers)
    found, seconds = rank_each(trained.model, blocks, len(layers), data, split, negatives, **options)
    metrics = [metrics_by_kind(ranks) for ranks in found]
    return dict(zip(map(str, layers), metrics, strict=True)), seconds


def layer_table(metrics: dict[str, dict], split: str) -> str:
    names = ["HR@10", "NDCG@10", "MRR"]
    rows = [
        metric_row(layer, {f"{kind} {name}": found[kind][name] for kind in ("sampled", "full") for name in names})
        for layer, found in metrics.items()
    ]
    return markdown_table([f"{split}, layer", *names, *(f"full {name}" for name in names)], rows)


def save_layers(
    target: Path, folder: Path, config: dict, metrics: dict[str, dict], split: str, how: dict, seconds: float
) -> None:
    """Write the folder of a record: what was measured of the run in `folder`, and `how`, its protocol."""
    described = {
        "kind": "layers",
        "title": f"{config['title']}, by layer",
        "run": cli.portable_path(folder),
        "layers": [int(layer) for layer in metrics],
        "output_dir": cli.portable_path(target),
    } | {name: config[name] for name in ("run_id", "dataset", "dataset_fingerprint")}
    found = {
        "layers": metrics,
        "split": split,
        "protocol": how,
        "environment": environment(Accelerator(cpu=not torch.accelerator.is_available())),
        "seconds": seconds,
        "run_id": config["run_id"],
    }
    with atomic_folder(target) as part:
        write_json(described, part / "config.json")
        write_json(found, part / "metrics.json")


def fuse_runs(run: str, fuse: str, dataset: str | None, batch_size: int, output_dir: str | None) -> None:
    """Choose the weight of `fuse` beside `run` on validation, measure both as one on test, and write a run folder."""
    folders = [run_folder(name).absolute() for name in (run, fuse)]
    configs, metrics = zip(*map(single_run, ("--run", "--fuse"), folders), strict=True)
    if configs[0]["run_id"] == configs[1]["run_id"]:
        raise UserError(f"--fuse {fuse} is the run of --run; give another one")
    if configs[0]["dataset_fingerprint"] != configs[1]["dataset_fingerprint"]:
        of = [config["dataset"] for config in configs]
        raise UserError(
            f"--fuse {fuse} was trained on {of[1]}, --run {run} on {of[0]}: give two runs of one version of one dataset"
        )
    data = Sequences.load(assets.dataset_folder(dataset or configs[0]["dataset"]))
    check_same_dataset(data, configs[0], folders[0])
    target = Path(output_dir or folders[0].parent / f"{folders[0].name}-with-{folders[1].name}")
    config_to_replace(target, "fusion", ["config.json", "metrics.json", CATALOGUE_FILE, RANKS_FILE])

    parts = [load(folder) for folder in folders]
    lengths = [config["max_seq_length"] for config in configs]
    fusion = Fusion([part.model for part in parts], lengths, [part.autocast for part in parts], weight=0.0)
    fusion.to(parts[0].device)
    figures, ranks = choose_weight(fusion, data, metrics[0]["selected_by"], batch_size, parts[0].device)
    config = {
        "kind": "fusion",
        "title": " + ".join(config["title"] for config in configs),
        "run": cli.portable_path(folders[0]),
        "fuse": cli.portable_path(folders[1]),
        "run_ids": [config["run_id"] for config in configs],
        "weight": fusion.weight,
        "max_seq_length": max(lengths),
        "dtype": "float32",  # of the sum; each part has its own
        "output_dir": cli.portable_path(target),
        "run_id": uuid.uuid4().hex,
    } | {name: configs[0][name] for name in ("dataset", "dataset_fingerprint", "num_users")}
    sizes = {name: sum(found["parameters"][name] for found in metrics) for name in ("total", "trained")}
    with atomic_folder(target) as part:
        write_json(config, part / "config.json")
        parts[0].catalogue.save(part)
        save_ranks(ranks, part)
        write_json(figures | {"parameters": sizes, "run_id": config["run_id"]}, part / "metrics.json")
    print(f"{target}: weight {fusion.weight} of {fuse}, chosen by {figures['selected_by']}:")
    print(", ".join(f"{row['weight']}: {row['valid']:.4f}" for row in figures["weights"]))
    print(closing_table(target.parent, data.fingerprint))


def single_run(flag: str, folder: Path) -> tuple[dict, dict]:
    """config.json and metrics.json of a run that can be fused."""
    config, metrics = finished_run(folder, f"{flag} {folder} holds no finished run: give the folder of one")
    if config.get("kind") not in ("sr", "open_p5", "teacher", "student"):
        raise UserError(f"{flag} {folder} is a {config.get('kind')}: give a run of a training script")
    if metrics["selected_by"] not in CRITERIA:
        raise UserError(f"{folder}: metrics.json has selected_by {metrics['selected_by']!r}; train the run again")
    return config, metrics


def choose_weight(
    fusion: Fusion, data: Sequences, selected_by: str, batch_size: int, device: torch.device
) -> tuple[dict, dict[str, np.ndarray]]:
    """Give `fusion` the weight that is best on validation; returns what metrics.json says of it, and the test ranks.

    selected_by: the metric, as metrics.json names it ("valid sampled NDCG@10"). Of equal weights the lowest is taken.
    """
    options = {"batch_size": batch_size, "device": device, "progress": True}
    found, choosing = rank_with_weights(fusion, WEIGHTS, data, "valid", Negatives(data, "valid"), **options)
    valid = [metrics_by_kind(ranks) for ranks in found]
    _, kind, name = selected_by.split()
    values = [metrics[kind][name] for metrics in valid]
    best = int(np.argmax(values))
    fusion.weight = WEIGHTS[best]
    [ranks], seconds = rank_with_weights(fusion, [fusion.weight], data, "test", Negatives(data, "test"), **options)
    figures = {
        "valid": valid[best],
        "test": metrics_by_kind(ranks),
        "weight": fusion.weight,
        "weights": [{"weight": weight, "valid": value} for weight, value in zip(WEIGHTS, values, strict=True)],
        "selected_by": selected_by,
        "seconds": {"choose_weight": choosing, "score_test": seconds},
        "peak_memory_bytes": peak_memory(),
        "protocol": protocol(data, max(fusion.max_lengths)),
        "baselines": {},
        "environment": environment(Accelerator(cpu=not torch.accelerator.is_available())),
    }
    return figures, ranks


if __name__ == "__main__":
    cli.run(main, section=None)
