"""Step 1: train a traditional sequential recommender.

python train_sr_trad.py                               MovieLens-100K, SASRec, no accelerator needed
python train_sr_trad.py --dataset my-data --train_targets last
python train_sr_trad.py --init_items item_embeddings-titles
python train_sr_trad.py --resume auto                 go on with an interrupted run
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from dataclasses import asdict
from typing import Literal

from models.interface import Recommender
from models.sr import MODELS
from models.sr.popularity import Popularity
from models.sr.storage import check_sizes
from models.sr.transitions import Transitions
from utils import assets, cli
from utils.checked import attributes_fingerprint
from utils.data import Sequences, training_examples
from utils.files import save_tensors
from utils.item_tables import find_table, read_table
from utils.metrics import DEFAULT_SELECTION, SelectBy
from utils.report import closing_table
from utils.run import Run
from utils.run_files import read_metrics
from utils.train import fit


def main(
    *,
    dataset: str = "ml-100k",
    model: str = "sasrec",
    model_config: Recommender.Config,
    init_items: str | None = None,
    train_targets: str = "last",
    batch_size: int = 256,
    micro_batch_size: int | Literal["auto"] | None = None,
    eval_batch_size: int = 512,
    num_epochs: float = 20.0,
    max_steps: int = -1,
    optimizer: Literal["adamw", "adam"] = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup_steps: int = 50,
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine",
    max_grad_norm: float = 1.0,
    eval_steps: int = 100,
    select_by: SelectBy = DEFAULT_SELECTION,
    patience: int | None = None,
    seed: int = 42,
    dtype: Literal["float32", "bfloat16"] = "float32",
    output_dir: str | None = None,
    resume: Literal["auto", "never"] = "never",
    report_to: Literal["none", "tensorboard", "wandb"] = "none",
) -> None:
    config = dict(locals()) | {"kind": "sr", "title": MODELS[model].__name__}
    check_sizes(own := asdict(config.pop("model_config")))
    config |= own
    data = Sequences.load(assets.dataset_folder(dataset))
    known = data.training_part()
    examples = training_examples(data, train_targets, model_config.max_seq_length)
    if init_items:
        source = find_table(init_items, data)
        start, table = read_table("--init_items", source, data)
        config |= {"init_items": cli.portable_path(source), "init_items_sha256": table["table_sha256"]}

    if MODELS[model].reads_attributes:
        config["attributes_fingerprint"] = attributes_fingerprint(known.attributes) if len(known.attributes) else None

    run = Run(config, data, default_dir=model)
    if MODELS[model].reads_attributes and not len(known.attributes):
        run.print(f"dataset {data.name} has no attributes (--attributes of datasets/process.py): {model} goes without")
    if not run.finished:
        recommender = MODELS[model](model_config, known)
        if init_items:
            recommender.init_items(start)
        state = fit(run, recommender, examples)
        size = sum(p.numel() for p in recommender.parameters())
        run.finish(
            recommender,
            state,
            parameters={"total": size, "trained": size},
            save=lambda folder: save_tensors(recommender.state_dict(), folder / "model.safetensors"),
            baselines={kind.__name__: kind(None, known) for kind in (Popularity, Transitions)},
        )
    run.print(closing_table(run.folder.parent, data.fingerprint))
    if text := advice(read_metrics(run.folder), select_by):
        run.print(text)


def advice(metrics: dict, select_by: str) -> str:
    """What to try where a trained recommender is no better on validation than popularity; else nothing."""
    kind, name = select_by.split("/")
    popularity = metrics.get("baselines", {}).get("Popularity")  # records of early versions have none
    if popularity is None or metrics["valid"][kind][name] > popularity["valid"][kind][name]:
        return ""
    reached, popular = (of["valid"][kind][name] for of in (metrics, popularity))
    text = f"no better than popularity: valid {kind} {name} {reached:.4f} against {popular:.4f}"
    return f"{text}; train longer (--num_epochs), at a higher --learning_rate, or on more --train_targets"


if __name__ == "__main__":
    cli.run(main, section="sr", models=MODELS)
