"""Step 3: train the teacher, a decoder language model that reads item vectors (E4SRec).

python finetune.py                                    8 layers of SmolLM2-135M on MovieLens-100K
python finetune.py --base_model Qwen/Qwen3-0.6B --num_layers 8 --dtype bfloat16
python finetune.py --num_layers 4 --output_dir outputs/ml-100k/teacher-4
python finetune.py --item_embeddings item_embeddings-sasrec,item_embeddings-titles
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from typing import Literal

from models.llm.decoder import base_config, base_shape, layer_flags, select_layers
from models.llm.storage import build_llm_rec, count_parameters, load_base, save_llm_rec
from models.sr import MODELS
from utils import assets, cli
from utils.data import Sequences, training_examples
from utils.item_tables import read_tables
from utils.metrics import DEFAULT_SELECTION, SelectBy
from utils.report import closing_table
from utils.run import Run
from utils.train import fit


def main(
    *,
    dataset: str = "ml-100k",
    base_model: str = "smollm2-135m",
    item_embeddings: str | None = None,
    num_layers: int | None = None,
    layer_selection: str = "first",
    train_strategy: Literal["lora", "full", "frozen"] = "lora",
    lora_r: int = 16,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
    lora_target_modules: str = "gate_proj,up_proj,down_proj",
    read_out: Literal["response", "item"] = "response",
    normalize_items: bool = False,
    input_map: Literal["linear", "mlp"] = "linear",
    item_output: Literal["frozen", "residual", "trained"] = "frozen",
    item_dropout: float = 0.0,
    state_dropout: float = 0.0,
    max_seq_length: int = 30,
    train_targets: str = "last",
    batch_size: int = 256,
    micro_batch_size: int | None = None,
    eval_batch_size: int = 512,
    num_epochs: float = 3.0,
    max_steps: int = -1,
    learning_rate: float = 1e-3,
    head_learning_rate: float | None = None,
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
    num_layers, layer_selection = layer_flags(num_layers, layer_selection, default=8)
    config = dict(locals()) | {"kind": "teacher", "title": f"Teacher-{num_layers}"}
    data = Sequences.load(assets.dataset_folder(dataset))
    item_table, tables = read_tables("--item_embeddings", item_embeddings, data, normalize_items)
    config["item_embeddings"] = tables.pop("item_embeddings")
    cli.inherit(config, tables, list(tables), config["item_embeddings"])
    base = find_base(config)
    examples = training_examples(data, train_targets, max_seq_length)

    run = Run(config, data, default_dir=f"teacher-{num_layers}")
    if not run.finished:
        kept = load_base(config, base)
        run.record(base_fingerprint=kept.fingerprint)
        teacher = build_llm_rec(config, kept, item_table)
        state = fit(run, teacher, examples)
        run.finish(teacher, state, count_parameters(teacher), lambda folder: save_llm_rec(teacher, folder))
    run.print(closing_table(run.folder.parent, data.fingerprint))


def find_base(config: dict) -> str:
    """Where the base model is, which has the layers that are asked for; what is recorded of it goes into `config`."""
    base = assets.base_model_path(config["base_model"])
    shape = base_config(base)
    select_layers(config["num_layers"], shape.num_hidden_layers, config["layer_selection"])
    config |= {"base_model": assets.record_base_model(config["base_model"], base), "base_shape": base_shape(shape)}
    return base


if __name__ == "__main__":
    cli.run(main, section="teacher", models=MODELS)
