"""Step 2: take the item table out of a trained traditional recommender.

python extract_emb.py                                 from outputs/ml-100k/sasrec
python extract_emb.py --sr_dir outputs/my-data/sasrec --output_dir outputs/my-data/item_embeddings-sasrec
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from pathlib import Path

import torch

from models.sr import MODELS
from models.sr.storage import load_recommender, new_recommender
from utils import assets, cli
from utils.data import Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import atomic_folder, check_replaceable, read_json, save_tensors, sha256, write_json
from utils.report import finished_run

TABLE_FILE = "item_embeddings.safetensors"


def summarise(table: torch.Tensor, drawn: torch.Tensor) -> dict[str, float]:
    """Norms of the rows of (V + 1, d); UserError if it holds NaN or has the norms of `drawn`, an untrained table."""
    if not torch.isfinite(table).all():
        raise UserError("the item table holds NaN or infinity: train_sr_trad.py diverged; lower --learning_rate")
    norms, untrained = (rows[1:].norm(dim=1) for rows in (table, drawn))
    if abs(norms.mean() / untrained.mean() - 1) < 0.05 and abs(norms.std() / untrained.std() - 1) < 0.25:
        raise UserError("the item table is untrained: its norms are still those of its drawing; train longer")
    summary = {f"norm_{name}": norms.quantile(q).item() for name, q in [("min", 0.0), ("median", 0.5), ("max", 1.0)]}
    return summary | {"norm_mean": norms.mean().item(), "norm_std": norms.std().item()}


@torch.no_grad()
def main(
    *,
    dataset: str = "ml-100k",
    model: str = "sasrec",
    sr_dir: str | None = None,
    output_dir: str | None = None,
) -> None:
    data = Sequences.load(assets.dataset_folder(dataset))
    source = Path(sr_dir or cli.ROOT / "outputs" / data.name / model)
    train = f"{source} holds no finished run; make it: python train_sr_trad.py --dataset {dataset} --model {model}"
    trained, metrics = finished_run(source, train)
    if trained.get("kind") != "sr":
        raise UserError(f"--sr_dir {source} is no run of train_sr_trad.py")
    check_same_dataset(data, trained.get("dataset_fingerprint"), source)
    target = Path(output_dir or cli.ROOT / "outputs" / data.name / f"item_embeddings-{trained['model']}")
    check_replaceable(target, ["config.json", TABLE_FILE], "--output_dir")
    held = target / "config.json"
    if held.exists() and read_json(held, "").get("kind") != "item_embeddings":
        raise UserError(f"--output_dir {target} holds something else (config.json); choose another place")

    table = load_recommender(source, trained, data.training_part()).item_table()  # (V + 1, d)
    config = {
        "kind": "item_embeddings",
        "dataset": dataset,
        "dataset_fingerprint": data.fingerprint,
        "sr_dir": cli.portable_path(source),
        "sr_weights_sha256": sha256(source / "model.safetensors"),
        "sr_test_sampled_NDCG@10": metrics["test"]["sampled"]["NDCG@10"],
        "model": trained["model"],
        "num_items": data.num_items,
        "item_dim": table.shape[1],
    } | summarise(table, new_recommender(trained, data.training_part()).item_table())
    cli.print_config(config)
    with atomic_folder(target) as part:
        save_tensors({"item_table": table, "item_ids": torch.arange(len(table))}, part / TABLE_FILE)
        write_json(config | {"table_sha256": sha256(part / TABLE_FILE)}, part / "config.json")
    print(f"{target / TABLE_FILE}: {data.num_items:,} items, d = {table.shape[1]}")


if __name__ == "__main__":
    cli.run(main, section="extract", models=MODELS)
