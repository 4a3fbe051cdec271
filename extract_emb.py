"""Step 2: take the item table out of a trained traditional recommender.

python extract_emb.py                                 from outputs/ml-100k/sasrec
python extract_emb.py --sr_dir outputs/my-data/sasrec --output_dir outputs/my-data/item_embeddings
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from pathlib import Path
from typing import Literal

import torch

from models.sr import MODELS
from utils import assets, cli
from utils.data import Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import check_replaceable, load_tensors, read_json, save_tensors, sha256, whole_folder, write_json
from utils.report import finished_run

TABLE_FILE = "item_embeddings.safetensors"


def summarise(table: torch.Tensor, initial_std: float) -> dict[str, float]:
    """Norms of the rows of (V + 1, d); UserError if the table holds NaN, or norms as they were drawn, untrained."""
    if not torch.isfinite(table).all():
        raise UserError("the item table holds NaN or infinity: train_sr_trad.py diverged; lower --learning_rate")
    norms = table[1:].norm(dim=1)
    drawn_mean, drawn_std = initial_std * table.shape[1] ** 0.5, initial_std * 0.5**0.5
    if abs(norms.mean() / drawn_mean - 1) < 0.05 and abs(norms.std() / drawn_std - 1) < 0.25:
        raise UserError("the item table is untrained: its norms are still those of its drawing; train longer")
    summary = {f"norm_{name}": norms.quantile(q).item() for name, q in [("min", 0.0), ("median", 0.5), ("max", 1.0)]}
    return summary | {"norm_mean": norms.mean().item(), "norm_std": norms.std().item()}


def main(
    *,
    dataset: str = "ml-100k",
    model: Literal["sasrec"] = "sasrec",
    sr_dir: str | None = None,
    output_dir: str | None = None,
) -> None:
    data = Sequences.load(assets.dataset_folder(dataset))
    source = Path(sr_dir or cli.ROOT / "outputs" / data.name / model)
    target = Path(output_dir or cli.ROOT / "outputs" / data.name / "item_embeddings")
    train = f"{source} holds no finished run; make it: python train_sr_trad.py --dataset {dataset} --model {model}"
    trained, metrics = finished_run(source, train)
    if trained.get("kind") != "sr":
        raise UserError(f"--sr_dir {source} is no run of train_sr_trad.py")
    check_same_dataset(data, trained.get("dataset_fingerprint"), source)
    check_replaceable(target, ["config.json", TABLE_FILE], "--output_dir")
    held = target / "config.json"
    if held.exists() and read_json(held, "").get("kind") != "item_embeddings":
        raise UserError(f"--output_dir {target} holds something else (config.json); choose another place")

    weights = source / "model.safetensors"
    if trained["model"] not in MODELS:
        raise UserError(f"--sr_dir {source} holds a model {trained['model']!r}, not one of {', '.join(MODELS)}")
    table = load_tensors(weights)[MODELS[trained["model"]].item_table_name]  # (V + 1, d)
    if len(table) != data.num_items + 1:
        raise UserError(f"{weights} has {len(table) - 1} items, dataset {data.name} has {data.num_items}")
    config = {
        "kind": "item_embeddings",
        "dataset": dataset,
        "dataset_fingerprint": data.fingerprint,
        "sr_dir": cli.shown(source),
        "sr_weights_sha256": sha256(weights),
        "sr_test_sampled_NDCG@10": metrics["test"]["sampled"]["NDCG@10"],
        "model": trained["model"],
        "num_items": data.num_items,
        "hidden_size": table.shape[1],
    } | summarise(table, MODELS[trained["model"]].initial_std)
    cli.print_config(config)
    with whole_folder(target) as part:
        save_tensors({"item_table": table, "item_ids": torch.arange(len(table))}, part / TABLE_FILE)
        write_json(config | {"table_sha256": sha256(part / TABLE_FILE)}, part / "config.json")
    print(f"{target / TABLE_FILE}: {data.num_items:,} items, d = {table.shape[1]}")


if __name__ == "__main__":
    cli.run(main, section="extract")
