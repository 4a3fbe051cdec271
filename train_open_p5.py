"""The paper's generative baseline: train Open-P5, a language model that writes the tokens of the next item.

It stands beside the four steps, and reads no item table.

python train_open_p5.py                               8 layers of SmolLM2-135M on MovieLens-100K
python train_open_p5.py --num_layers 30               all layers, in outputs/ml-100k/open-p5-30
python train_open_p5.py --beam_width 20               a narrower beam: faster on many items, and no longer exact
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

from typing import Literal

from finetune import find_base
from models.llm.decoder import layer_flags
from models.llm.open_p5 import build_open_p5, save_open_p5, sequential_index
from models.llm.storage import count_parameters, load_base
from models.sr import MODELS
from utils import assets, cli
from utils.data import Sequences, training_examples
from utils.metrics import DEFAULT_SELECTION, SelectBy
from utils.report import closing_table
from utils.run import Run
from utils.train import fit


def main(
    *,
    dataset: str = "ml-100k",
    base_model: str = "smollm2-135m",
    num_layers: int | None = None,
    layer_selection: str = "first",
    lora_r: int = 16,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
    lora_target_modules: str = "gate_proj,up_proj,down_proj",
    beam_width: int | None = None,
    max_seq_length: int = 30,
    train_targets: str = "last",
    batch_size: int = 256,
    micro_batch_size: int | Literal["auto"] | None = None,
    eval_batch_size: int = 64,
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
    config = dict(locals()) | {"kind": "open_p5", "title": f"Open-P5-{num_layers}"}
    config["train_strategy"] = "lora"  # no flag: the adapter and the new tokens train
    data = Sequences.load(assets.dataset_folder(dataset))
    base = find_base(config)
    examples = training_examples(data, train_targets, max_seq_length)

    run = Run(config, data, default_dir=f"open-p5-{num_layers}")
    if not run.finished:
        kept = load_base(config, base)
        run.record(base_fingerprint=kept.fingerprint)
        model = build_open_p5(config, kept, base, sequential_index(data.training_part()))
        state = fit(run, model, examples)
        run.finish(model, state, count_parameters(model), lambda folder: save_open_p5(model, folder))
    run.print(closing_table(run.folder.parent, data.fingerprint))


if __name__ == "__main__":
    cli.run(main, section="open_p5", models=MODELS)
