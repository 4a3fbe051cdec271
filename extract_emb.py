"""Step 2: take the item table out of a trained traditional recommender, or make one from titles or a file.

python extract_emb.py                                 from outputs/ml-100k/sasrec
python extract_emb.py --dataset my-data               from outputs/my-data/sasrec
python extract_emb.py --text titles                   -> outputs/ml-100k/item_embeddings-titles
python extract_emb.py --import_table mine.npy         -> outputs/ml-100k/item_embeddings-mine
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import sys
from pathlib import Path
from typing import Literal

import torch

from models.sr import MODELS
from models.sr.storage import load_recommender, new_recommender
from models.text import TextModel
from utils import assets, cli
from utils.catalogue import Catalogue
from utils.data import Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import is_plain_name, sha256
from utils.import_table import import_table as read_import
from utils.item_tables import TABLE_FILE, check_components, check_target, norm_summary, origin, whiten, write_table
from utils.run_files import finished_run

TEXT_DIM = 128


def check_trained(table: torch.Tensor, drawn: torch.Tensor) -> None:
    """UserError where the table (V + 1, d) holds NaN or is still `drawn`, the one that the run's seed gave it."""
    if not torch.isfinite(table).all():
        raise UserError("the item table holds NaN or infinity: train_sr_trad.py diverged; lower --learning_rate")
    if (table - drawn).norm() < 1e-4 * drawn.norm():
        raise UserError("the item table is untrained: it is still as it was drawn; raise --learning_rate, train longer")
    if same := int((table[1:] == drawn[1:]).all(dim=1).sum()):  # HGN and Caser train the rows of items that they read
        print(f"{same:,} of {len(table) - 1:,} items were not trained: their rows are still as they were drawn")


def from_recommender(data: Sequences, dataset: str, model: str | None, sr_dir: str | None) -> tuple[torch.Tensor, dict]:
    """The table of a trained recommender, and what its configuration holds of it."""
    name = model or "sasrec"
    source = Path(sr_dir or cli.ROOT / "outputs" / data.name / name)
    train = f"{source} holds no finished run; make it: python train_sr_trad.py --dataset {dataset} --model {name}"
    trained, metrics = finished_run(source, train)
    if trained.get("kind") != "sr":
        raise UserError(f"--sr_dir {source} is no run of train_sr_trad.py")
    check_same_dataset(data, trained, source)
    if sr_dir and model not in (None, trained.get("model")):
        raise UserError(f"--model {model}: {source} is a run of {trained.get('model')}; leave --model out")
    known = data.training_part()
    table = load_recommender(source, trained, known).item_table()
    torch.manual_seed(trained.get("seed", 0) % 2**63)  # as the run did before it drew its weights
    check_trained(table, new_recommender(trained, known).item_table())
    return table, {
        "sr_dir": cli.portable_path(source),
        "sr_weights_sha256": sha256(source / "model.safetensors"),
        "sr_test_sampled_NDCG@10": metrics["test"]["sampled"]["NDCG@10"],
        "model": trained["model"],
    }


def from_titles(data: Sequences, text_model: str, pca_dim: int) -> tuple[torch.Tensor, dict]:
    """Vectors of the titles, before PCA, zeros for an item without one; and what the configuration holds of them."""
    titles = Catalogue.of(data).titles
    items = [item for item, title in enumerate(titles, 1) if title.strip()]
    if not items:
        raise UserError(f"dataset {data.name} has no titles: make it again with them (--titles, datasets/README.md)")
    different = len({titles[item - 1] for item in items})
    check_components(pca_dim, different, different - 1)
    model = TextModel(text_model)
    check_components(pca_dim, different, model.width)
    vectors, cut = model.vectors([titles[item - 1] for item in items])
    table = torch.zeros(len(titles) + 1, model.width)
    table[items] = vectors
    found = {"text": "titles", "titles_sha256": sha256(data.folder / "items.tsv"), "titles_cut": cut}
    return table, found | {"text_model": model.name, "text_model_fingerprint": model.fingerprint}


def check_flags(model: str | None, sr_dir: str | None, text: str | None, import_table: str | None, only: dict) -> None:
    """UserError for flags that do not go together. only: other flags, and the sources that they belong to."""
    given = {"sr_dir": sr_dir or model, "text": text, "import_table": import_table}
    chosen = [name for name, value in given.items() if value]
    if len(chosen) > 1:
        named = ["model" if name == "sr_dir" and not sr_dir else name for name in chosen]
        raise UserError(f"--{' and --'.join(named)}: a table is made from one of them; leave the others out")
    for name, (value, sources) in only.items():
        if value is not None and not set(chosen) & set(sources):
            raise UserError(f"--{name} {value} is of --{' and --'.join(sources)} alone; add that, or leave it out")


@torch.no_grad()
def main(
    *,
    dataset: str = "ml-100k",
    model: str | None = None,
    sr_dir: str | None = None,
    text: Literal["titles"] | None = None,
    text_model: str | None = None,
    import_table: str | None = None,
    row_order: Literal["dataset", "id"] | None = None,
    pca_dim: int | None = None,
    output_dir: str | None = None,
) -> None:
    only = {"text_model": (text_model, ["text"]), "row_order": (row_order, ["import_table"])}
    check_flags(model, sr_dir, text, import_table, only | {"pca_dim": (pca_dim, ["text", "import_table"])})
    data = Sequences.load(assets.dataset_folder(dataset))

    def target(made_from: str, name: str) -> tuple[Path, str | None]:
        if not output_dir and not is_plain_name(name):
            raise UserError(f"--{made_from}: {name!r} makes no folder's name; give one with --output_dir")
        folder = Path(output_dir or cli.ROOT / "outputs" / data.name / f"item_embeddings-{name}")
        return folder, check_target(folder, made_from)

    if text:
        (folder, held), pca_dim = target("text", text), pca_dim or TEXT_DIM
        table, found = from_titles(data, text_model or assets.EMBEDDED_ENCODER, pca_dim)
    elif import_table:
        path = Path(import_table)
        folder, held = target("import_table", path.stem)
        table = read_import(path, row_order, Catalogue.of(data))
        if path.resolve().parent == folder.resolve():
            raise UserError(f"--import_table {path} lies in {folder}, which is to be replaced; choose another place")
        found = {"import_table": cli.portable_path(path), "import_sha256": sha256(path), "row_order": row_order}
    else:
        table, found = from_recommender(data, dataset, model, sr_dir)
        folder, held = target("sr_dir", found["model"])
    if pca_dim:
        table, found["pca_variance"] = whiten(table, pca_dim)
    zeros = int((table[1:] == 0).all(dim=1).sum())
    config = {"kind": "item_embeddings", "dataset": dataset, "dataset_fingerprint": data.fingerprint} | found
    config |= {"num_items": data.num_items, "item_dim": table.shape[1], "zero_rows": zeros} | norm_summary(table)
    cli.print_config(config)
    if held not in (None, found[origin(found)]):
        print(
            f"{folder} held a table made from {held}, which is replaced; another --output_dir keeps both",
            file=sys.stderr,
        )
    write_table(folder, table, config)
    of_zeros = f"; {zeros:,} items without {'a title' if text else 'numbers'} have rows of zeros" if zeros else ""
    print(f"{folder / TABLE_FILE}: {data.num_items:,} items, d = {table.shape[1]}{of_zeros}")


if __name__ == "__main__":
    cli.run(main, section="extract", models=MODELS)
