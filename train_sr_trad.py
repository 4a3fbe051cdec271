"""Step 1: train a traditional sequential recommender.

python train_sr_trad.py                               MovieLens-100K, SASRec, no accelerator needed
python train_sr_trad.py --dataset my-data --train_targets last
python train_sr_trad.py --resume auto                 go on with an interrupted run
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from typing import Literal

import torch

from models.sr import MODELS
from models.sr.popularity import Popularity
from utils import assets, cli
from utils.data import Sequences, training_counts, training_examples
from utils.errors import UserError
from utils.files import save_tensors
from utils.report import closing_table
from utils.train import Run


def main(
    *,
    dataset: str = "ml-100k",
    model: Literal["sasrec"] = "sasrec",
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 2,
    dropout: float = 0.2,
    max_seq_length: int = 30,
    train_targets: str = "last",
    num_negatives: int = 0,
    batch_size: int = 256,
    micro_batch_size: int | None = None,
    eval_batch_size: int = 512,
    num_epochs: float = 20.0,
    max_steps: int = -1,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup_steps: int = 50,
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine",
    max_grad_norm: float = 1.0,
    eval_steps: int = 100,
    seed: int = 42,
    dtype: Literal["float32", "bfloat16"] = "float32",
    output_dir: str | None = None,
    resume: Literal["auto", "never"] = "never",
    report_to: Literal["none", "tensorboard", "wandb"] = "none",
) -> None:
    config = dict(locals()) | {"kind": "sr", "title": MODELS[model].__name__}
    if hidden_size % num_heads:
        raise UserError(f"--num_heads {num_heads} does not divide --hidden_size {hidden_size}")
    data = Sequences.load(assets.dataset_folder(dataset))
    examples = training_examples(data, train_targets, max_seq_length)
    counts = torch.from_numpy(training_counts(data))

    run = Run(config, data, default_dir=model)
    if not run.finished:
        recommender = MODELS[model](
            data.num_items,
            dim=hidden_size,
            max_length=max_seq_length,
            num_layers=num_layers,
            num_heads=num_heads,
            dropout=dropout,
            num_negatives=num_negatives,
            counts=counts,
        )
        state = run.fit(recommender, examples)
        size = sum(p.numel() for p in recommender.parameters())
        run.finish(
            recommender,
            state,
            parameters={"total": size, "trained": size},
            save=lambda folder: save_tensors(recommender.state_dict(), folder / "model.safetensors"),
            floor={"Popularity": Popularity(counts)},
        )
    run.print(closing_table(run.folder.parent, data.fingerprint))


if __name__ == "__main__":
    cli.run(main, section="sr")
