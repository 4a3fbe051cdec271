"""Step 3: train the teacher, a decoder language model that reads item vectors (E4SRec).

python finetune.py                                    8 layers of SmolLM2-135M on MovieLens-100K
python finetune.py --base_model Qwen/Qwen3-0.6B --num_layers 8 --dtype bfloat16
python finetune.py --num_layers 4 --output_dir outputs/ml-100k/teacher-4
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from pathlib import Path
from typing import Literal

from models.llm.decoder import base_config, base_shape, layer_flags, select_layers
from models.llm.recommender import normalized
from models.llm.storage import build_llm_rec, count_parameters, load_base, save_llm_rec
from models.sr import MODELS
from utils import assets, cli
from utils.data import Sequences, check_same_dataset, training_examples
from utils.errors import UserError
from utils.files import load_tensors, read_json, sha256
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
    source = Path(item_embeddings or cli.ROOT / "outputs" / data.name / "item_embeddings-sasrec")
    make = f"{source} is missing; make it: python extract_emb.py --dataset {dataset}"
    extracted = read_json(source / "config.json", make)
    if extracted.get("kind") != "item_embeddings":
        raise UserError(f"--item_embeddings {source} was not written by extract_emb.py")
    check_same_dataset(data, extracted.get("dataset_fingerprint"), source)
    cli.inherit(config, extracted, ["table_sha256", "item_dim"], cli.portable_path(source))
    config["item_embeddings"] = cli.portable_path(source)
    base = find_base(config)
    table_file = source / "item_embeddings.safetensors"
    item_table = load_tensors(table_file)["item_table"]
    if sha256(table_file) != extracted["table_sha256"]:
        raise UserError(f"{table_file} changed since extract_emb.py wrote it; run extract_emb.py again")
    item_table = normalized(item_table) if normalize_items else item_table
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
