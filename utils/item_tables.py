"""Item tables: (V + 1, d), row 0 the padding, as step 2 writes them into a folder and later steps read them."""

from pathlib import Path

import torch
import torch.nn.functional as F

from utils import cli
from utils.checked import load_tensors
from utils.data import Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import atomic_folder, save_tensors, sha256, write_json
from utils.run_files import config_to_replace, read_config

TABLE_FILE = "item_embeddings.safetensors"
ORIGINS = ("import_table", "text", "sr_dir")  # flags of step 2: what a table was made from


def origin(config: dict) -> str | None:
    return next((name for name in ORIGINS if config.get(name)), None)


def check_target(folder: Path, made_from: str) -> str | None:
    """What the table that `folder` holds was made from, None where it holds none.

    UserError unless a table made from one of ORIGINS may replace it: it is free, or holds another such.
    """
    held = config_to_replace(folder, "item_embeddings", ["config.json", TABLE_FILE])
    if held and origin(held) not in (made_from, None):
        raise UserError(f"--output_dir {folder} holds a table from --{origin(held)}; choose another place")
    return held.get(made_from) if held else None


def write_table(folder: Path, table: torch.Tensor, config: dict) -> None:
    """Replace `folder` by a table and its configuration, to which the table's SHA-256 is added."""
    with atomic_folder(folder) as part:
        save_tensors({"item_table": table, "item_ids": torch.arange(len(table))}, part / TABLE_FILE)
        write_json(config | {"table_sha256": sha256(part / TABLE_FILE)}, part / "config.json")


def norm_summary(table: torch.Tensor) -> dict[str, float]:
    """Norms of the rows of (V + 1, d), without the padding and rows of zeros; UserError if no other is there."""
    norms = table[1:].norm(dim=1)
    norms = norms[norms > 0]
    if not len(norms):
        raise UserError("the item table holds nothing but zeros; bring another")
    summary = {f"norm_{name}": norms.quantile(q).item() for name, q in [("min", 0.0), ("median", 0.5), ("max", 1.0)]}
    return summary | {"norm_mean": norms.mean().item(), "norm_std": norms.std(correction=min(1, len(norms) - 1)).item()}


def check_components(dim: int, rows: int, components: int) -> None:
    """UserError unless so many rows, which have at most so many principal components, have `dim` of them."""
    if dim > components:
        advice = f"choose at most {components}" if components else "they are all the same"
        raise UserError(f"--pca_dim {dim}: the {rows:,} rows have at most {components} principal components; {advice}")


def whiten(table: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
    """The `dim` first principal components of the rows, each of variance 1, and then each row at length 1.

    table: (V + 1, D); rows of zeros take no part and stay. Also returns the share of the variance that is kept.
    UserError where the rows have fewer components.
    """
    given = table.abs().amax(dim=1) > 0
    rows = table[given].double()
    size = rows.square().sum() / len(rows)  # of which what is below 1e-10 is rounding
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)  # largest first
    check_components(dim, len(rows), int((values > 1e-10 * size).sum()))
    kept = vectors[:, :dim]
    kept = kept * kept.gather(0, kept.abs().argmax(dim=0, keepdim=True)).sign()  # a component's sign means nothing
    white = torch.zeros(len(table), dim)
    white[given] = F.normalize(rows @ kept / values[:dim].sqrt(), dim=1).float()
    return white, (values[:dim].sum() / values.clamp(min=0).sum()).item()


def normalized(table: torch.Tensor) -> torch.Tensor:
    """Rows of (V + 1, d) minus their mean, at length 1; rows of 0 (the padding, items without a vector) stay 0.

    UserError where all rows are the same, so that nothing is left of them.
    """
    known = (table != 0).any(1, keepdim=True)
    centred = (table - (table * known).sum(0) / known.sum()) * known
    if centred.norm() <= 1e-5 * table.norm():  # of equal rows rounding is left
        raise UserError("--normalize_items leaves nothing of an item table whose rows are all the same; leave it out")
    return F.normalize(centred, dim=1)


def find_table(name: str, data: Sequences) -> Path:
    """Where a table is that is given as a path, or as the name of a folder in outputs/<dataset>/."""
    places = Path(name), cli.ROOT / "outputs" / data.name / name
    return next((place for place in places if (place / "config.json").is_file()), Path(name))


def read_table(flag: str, folder: Path, data: Sequences) -> tuple[torch.Tensor, dict]:
    """A table (V + 1, d) with its configuration; UserError where it is missing, damaged, changed or not of `data`."""
    make = f"python extract_emb.py --dataset {cli.portable_path(data.folder)}"
    missing = f"{flag}: {folder} is no table, nor is there one of that name in outputs/{data.name}/; make it: {make}"
    config = read_config(folder, missing)
    if config.get("kind") != "item_embeddings":
        raise UserError(f"{flag} {folder} was not written by extract_emb.py")
    check_same_dataset(data, config, folder)
    path, again = folder / TABLE_FILE, "run extract_emb.py again"
    table = load_tensors(path)["item_table"]
    if sha256(path) != config["table_sha256"]:
        raise UserError(f"{path} changed since extract_emb.py wrote it; {again}")
    if table.shape != (data.num_items + 1, config["item_dim"]):
        raise UserError(f"{path} is {tuple(table.shape)}, not {data.num_items + 1} x {config['item_dim']}; {again}")
    if not (table.is_floating_point() and (table := table.float()).isfinite().all()):
        raise UserError(f"{path} holds what is no finite number; train the recommender anew, and {again}")
    return table, config


def read_tables(flag: str, names: str | None, data: Sequences, normalize: bool = False) -> tuple[torch.Tensor, dict]:
    """One table or several side by side, (V + 1, sum of their widths), and what configurations hold of them.

    names: comma-separated, None for that of SASRec. normalize: each as `normalized` makes it. A dot product with
    several is the sum of those with each. So that none of them outweighs another by its scale alone, all get the mean
    norm of the first one's rows, those of zeros left out. If they are all of one run, "sr_dir" is that run, and
    "sr_weights_sha256" the hash of its weights.
    """
    names = names or str(cli.ROOT / "outputs" / data.name / "item_embeddings-sasrec")
    whole = (find_table(names, data) / "config.json").is_file()  # a path may hold a comma
    parts = [names] if whole else [part.strip() for part in names.split(",")]
    if not all(parts):
        raise UserError(f"{flag} {names}: a name is missing beside a comma")
    folders = [find_table(part, data) for part in parts]
    tables, configs = zip(*(read_table(flag, folder, data) for folder in folders), strict=True)
    tables = tuple(map(normalized, tables)) if normalize else tables
    hashes = [config["table_sha256"] for config in configs]
    twice = next((at for at, digest in enumerate(hashes) if digest in hashes[:at]), None)
    if twice is not None:
        raise UserError(f"{flag}: {folders[twice]} is the same table as {folders[hashes.index(hashes[twice])]}")
    found = {"item_embeddings": ",".join(map(cli.portable_path, folders)), "table_sha256": ",".join(hashes)}
    found["item_dim"] = sum(table.shape[1] for table in tables)
    makers = {(config["sr_dir"], config.get("sr_weights_sha256")) for config in configs if config.get("sr_dir")}
    if len(makers) == 1:
        found["sr_dir"], found["sr_weights_sha256"] = makers.pop()
    if len(tables) == 1:
        return tables[0], found
    means = [norm_summary(table)["norm_mean"] for table in tables]
    scales = [means[0] / mean for mean in means]
    found |= {"table_dims": [table.shape[1] for table in tables], "table_scales": scales}
    return torch.cat([table * scale for table, scale in zip(tables, scales, strict=True)], dim=1), found
