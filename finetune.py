"""Step 3: train the teacher, a decoder language model that reads item vectors (E4SRec).

python finetune.py                                    8 layers of SmolLM2-135M on MovieLens-100K
python finetune.py --base_model Qwen/Qwen3-0.6B --num_layers 8 --dtype bfloat16
python finetune.py --num_layers 4                     in outputs/ml-100k/teacher-4
python finetune.py --num_layers 4 --layer_selection influence    the layers that change hidden states most
python finetune.py --item_embeddings item_embeddings-sasrec,item_embeddings-titles
python finetune.py --lambda_kl 1                      learns the logits of the SASRec whose table it reads too

A run replaces the one in its folder, outputs/<dataset>/teacher-<layers>; --output_dir names another.
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from typing import Literal

import torch

from models.interface import Recommender
from models.llm.decoder import base_config, base_shape, layer_flags, select_layers
from models.llm.influence import explicit_selection
from models.llm.kl_teacher import find_kl_teacher, give_logits
from models.llm.recommender import LLMRec
from models.llm.storage import build_llm_rec, count_parameters, load_base, save_llm_rec
from models.slmrec import SLMRec
from models.sr import MODELS
from utils import assets, cli
from utils.data import Examples, Sequences, training_examples
from utils.errors import UserError
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
    lambda_kl: float | None = None,
    kl_teacher: str | None = None,
    kl_items: int | None = None,
    temperature: float | None = None,
    max_seq_length: int = 30,
    train_targets: str = "last",
    batch_size: int = 256,
    micro_batch_size: int | Literal["auto"] | None = None,
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
    item_table = find_table(config, data)
    base = find_base(config)
    examples = training_examples(data, train_targets, max_seq_length)

    run = Run(config, data, default_dir=f"teacher-{num_layers}")
    if not run.finished:
        kept = load_base(config, base)
        run.record(base_fingerprint=kept.fingerprint)
        teacher = build_llm_rec(config, kept, item_table)
        state = fit(run, with_logits(teacher, config, examples, run), examples)
        run.finish(teacher, state, count_parameters(teacher), lambda folder: save_llm_rec(teacher, folder))
    run.print(closing_table(run.folder.parent, data.fingerprint))


def find_table(config: dict, data: Sequences) -> torch.Tensor:
    """The item table (V + 1, d); what is recorded of it, and whose logits are learned beside it, goes into `config`."""
    table, found = read_tables("--item_embeddings", config["item_embeddings"], data, config["normalize_items"])
    config["item_embeddings"], maker = found.pop("item_embeddings"), found.pop("sr_dir", None)
    weights = found.pop("sr_weights_sha256", None)
    cli.inherit(config, found, list(found), config["item_embeddings"])
    find_kl_teacher(config, maker and cli.ROOT / maker, data)
    same = weights and config["lambda_kl"] and config["kl_teacher"] == maker
    if same and config["kl_teacher_sha256"].get("model.safetensors") != weights:
        made = config["item_embeddings"]
        raise UserError(f"{maker} was trained again since {made} was made of it: run extract_emb.py again")
    return table


def find_base(config: dict) -> str:
    """Where the base model is, which has the layers that are asked for; what is recorded of it goes into `config`."""
    base = assets.base_model_path(config["base_model"])
    shape = base_config(base)
    config["layer_selection"] = explicit_selection(config, base)
    select_layers(config["num_layers"], shape.num_hidden_layers, config["layer_selection"])
    config |= {"base_model": assets.record_base_model(config["base_model"], base), "base_shape": base_shape(shape)}
    return base


def with_logits(teacher: LLMRec, config: dict, examples: Examples, run: Run) -> Recommender:
    """The teacher as it is trained: with the logit term of a student, where that is asked for."""
    if not config["lambda_kl"]:
        return teacher
    how = {"temperature": config["temperature"], "kl_items": config["kl_items"]}
    model = SLMRec(teacher, lambda_kl=config["lambda_kl"], **how)
    give_logits(model, config, examples, run)
    return model


if __name__ == "__main__":
    cli.run(main, section="teacher", models=MODELS)
