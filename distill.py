"""Step 4: distil the teacher into a student with fewer layers (SLMRec).

python distill.py                                     4 layers from the 8 of outputs/ml-100k/teacher-8
python distill.py --lambda_cos 1 --lambda_norm 0.1 --lambda_ms 1 --lambda_kl 0      the paper's terms, no logits
python distill.py --kl_teacher outputs/ml-100k/sasrec                logits of SASRec in place of the teacher's
python distill.py --mode online                       a new teacher, built like that one, is trained beside the student
python distill.py --teacher outputs/ml-100k/student-4from8 --num_layers 2 --num_blocks 2      a student of a student

A run replaces the one in its folder, outputs/<dataset>/student-4from8 here; --output_dir names another.
"""

import utils.threads  # noqa: F401  before torch is imported

# isort: split

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from models.llm.decoder import block_boundaries, layer_flags, listed_layers, select_layers
from models.llm.influence import explicit_selection
from models.llm.kl_teacher import check_elsewhere, find_kl_teacher, give_logits, weights_sha256
from models.llm.recommender import LLMRec
from models.llm.storage import (
    Base,
    build_llm_rec,
    check_base,
    count_parameters,
    load_base,
    load_llm_rec,
    read_heads,
    recorded_base,
    save_llm_rec,
)
from models.llm.teacher_states import teacher_states
from models.online import OnlineSLMRec
from models.slmrec import SLMRec
from models.sr import MODELS
from utils import assets, cli
from utils.checked import AGAIN
from utils.data import Examples, Sequences, check_same_dataset, training_examples
from utils.errors import UserError
from utils.flags import FORMER_DEFAULTS, alternatives
from utils.metrics import DEFAULT_SELECTION, SelectBy
from utils.report import closing_table
from utils.run import Run
from utils.run_files import TYPES, check_complete, finished_run, read_config
from utils.train import fit

INHERITED = ["base_model", "layer_selection", "train_strategy", "lora_r", "lora_alpha", "lora_dropout"]
INHERITED += ["lora_target_modules", "max_seq_length", "train_targets", "dtype", "item_dim", "table_sha256"]
INHERITED += ["item_embeddings", "table_dims", "table_scales", "normalize_items", "read_out", "input_map"]
INHERITED += ["item_output", "item_dropout", "state_dropout"]


def main(
    *,
    dataset: str = "ml-100k",
    teacher: str | None = None,
    num_layers: int | None = None,
    num_blocks: int = 4,
    lambda_cos: float = 1.0,
    lambda_norm: float = 0.1,
    lambda_ms: float = 1.0,
    lambda_ms_teacher: float = 0.0,
    lambda_kl: float | None = None,
    kl_teacher: str | None = None,
    kl_items: int | None = None,
    kl_blocks: bool = False,
    temperature: float | None = None,
    norm_form: Literal["l2", "squared"] = "l2",
    block_reduction: Literal["sum", "mean"] = "sum",
    mode: Literal["offline", "online"] = "offline",
    teacher_states: Literal["stored", "bfloat16", "per_batch"] = "stored",
    layer_selection: str | None = None,
    train_strategy: Literal["lora", "full", "frozen"] | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_target_modules: str | None = None,
    input_map: Literal["linear", "mlp"] | None = None,
    item_output: Literal["frozen", "residual", "trained"] | None = None,
    item_dropout: float | None = None,
    state_dropout: float | None = None,
    max_seq_length: int | None = None,
    train_targets: str | None = None,
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
    dtype: Literal["float32", "bfloat16"] | None = None,
    output_dir: str | None = None,
    resume: Literal["auto", "never"] = "never",
    report_to: Literal["none", "tensorboard", "wandb"] = "none",
) -> None:
    num_layers, layer_selection = layer_flags(num_layers, layer_selection, default=4)
    config = dict(locals()) | {"kind": "student"}
    data = Sequences.load(assets.dataset_folder(dataset))
    source, taught = find_teacher(config, data)
    examples = training_examples(data, config["train_targets"], config["max_seq_length"])
    run = Run(config, data, config["title"].replace("SLMRec", "student").replace("<-", "from").replace(", ", "-"))
    if not run.finished:
        train_student(run, config, source, taught, examples)
    run.print(closing_table(run.folder.parent, data.fingerprint))


def find_teacher(config: dict, data: Sequences) -> tuple[Path, dict]:
    """The teacher's folder and configuration, of a teacher or a student; what is inherited goes into `config`."""
    source = Path(config["teacher"] or cli.ROOT / "outputs" / data.name / "teacher-8")
    make = f"python finetune.py --dataset {config['dataset']} --num_layers 8"
    taught, _ = finished_run(source, f"{source} holds no finished teacher; make it: {make}")
    if taught.get("kind") not in ("teacher", "student"):
        instead = f"; its logits alone can be learned: --kl_teacher {source}" if taught.get("kind") == "sr" else ""
        raise UserError(f"--teacher {source} is no run of finetune.py or distill.py{instead}")
    check_same_dataset(data, taught, source)
    depth, blocks = taught["num_layers"], config["num_blocks"]
    of_lora = [name for name, value in config.items() if name.startswith("lora_") and value is not None]
    cli.inherit(config, FORMER_DEFAULTS | taught, INHERITED, cli.portable_path(source))
    needed = [name for name in INHERITED if name in TYPES and type(None) not in alternatives(TYPES[name])]
    if config["train_strategy"] in ("full", "frozen"):
        cli.check_lora(config, of_lora)
    if lacking := [name for name in needed if config.get(name) is None]:
        raise UserError(f"{source}/config.json has no {lacking[0]}: another version made it; run finetune.py again")
    if (rows := len(read_heads(source, taught.get("item_dim"))["item_table"]) - 1) != data.num_items:
        raise UserError(f"{source}: its item table has {rows} items, the dataset {data.num_items}; train it again")
    if config["num_layers"] > depth:
        raise UserError(f"--num_layers {config['num_layers']}: the teacher has {depth} layers, a student needs no more")
    if config["max_seq_length"] > taught["max_seq_length"]:
        wanted = f"--max_seq_length {config['max_seq_length']}"
        raise UserError(f"{wanted}: the teacher reads {taught['max_seq_length']} items")
    if config["lambda_ms"] and blocks == 1:
        raise UserError("--num_blocks 1 leaves no block before the last for L_ms: add --lambda_ms 0, or more blocks")
    base = recorded_base(taught)
    config["layer_selection"] = explicit_selection(config, base)
    check_student_layers(config["num_layers"], config["layer_selection"], taught)
    check_mode(config)
    if config["teacher_states"] != "stored" and not (config["lambda_cos"] or config["lambda_norm"]):
        what = f"--teacher_states {config['teacher_states']}"
        raise UserError(f"{what} has no effect without a term that reads them: leave it out, or add --lambda_cos")
    if (most := math.gcd(config["num_layers"], depth)) % blocks:
        choice = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
        layers = f"{config['num_layers']} layers of the student and the {depth} of the teacher"
        raise UserError(f"--num_blocks {blocks} does not divide the {layers}; choose from {choice}")
    config |= {"teacher": cli.portable_path(source), "base_shape": taught["base_shape"], "teacher_layers": depth}
    depths = taught["title"].removeprefix("SLMRec-").partition(",")[0] if taught["kind"] == "student" else depth
    title = f"SLMRec-{config['num_layers']}<-{depths}" + ", online" * (config["mode"] == "online")
    config |= {"title": title, "teacher_sha256": weights_sha256(source)}
    config["base_model"] = assets.record_base_model(taught["base_model"], base)
    find_kl_teacher(config, source, data)
    print_flags_without_effect(config)
    return source, taught


def print_flags_without_effect(config: dict) -> None:
    """Print which form of the loss has no effect: a recipe may set it for rows that have other terms."""
    if config["norm_form"] != "l2" and not config["lambda_norm"]:
        print(f"--norm_form {config['norm_form']} has no effect: --lambda_norm is 0")
    of_blocks = ("lambda_cos", "lambda_norm", "lambda_ms", "lambda_ms_teacher", "kl_blocks")
    if any(config[name] for name in of_blocks):
        return
    if config["block_reduction"] != "sum":
        print(f"--block_reduction {config['block_reduction']} has no effect: no term of several blocks is on")
    usual_fits = math.gcd(config["num_layers"], config["teacher_layers"]) % 4 == 0
    if config["num_blocks"] != 4 and usual_fits:
        print(f"--num_blocks {config['num_blocks']} has no effect: no term of several blocks is on")


def check_mode(config: dict) -> None:
    """UserError for flags of the other --mode, and for an online teacher from which the student would learn nothing."""
    blocks = "--kl_blocks true"
    if config["mode"] == "offline":
        for flag, given in (("--lambda_ms_teacher", config["lambda_ms_teacher"]), (blocks, config["kl_blocks"])):
            if given:
                raise UserError(f"{flag} is for a teacher that trains too: add --mode online, or leave it out")
        return
    if config["teacher_states"] != "stored":
        raise UserError(f"--teacher_states {config['teacher_states']} is for --mode offline: an online teacher trains")
    if config["lambda_ms_teacher"] and config["num_blocks"] == 1:
        raise UserError("--num_blocks 1 leaves no block before the last for --lambda_ms_teacher: set it to 0")
    by_block = config["kl_blocks"] and config["lambda_kl"]
    if by_block and config["kl_teacher"]:
        raise UserError(f"{blocks} compares with the teacher's own blocks: leave it or --kl_teacher out")
    if by_block and not (config["lambda_ms"] and config["lambda_ms_teacher"]):
        raise UserError(f"{blocks} needs heads on both sides: --lambda_ms and --lambda_ms_teacher above 0")
    own_logits = config["lambda_kl"] and not config["kl_teacher"]
    if not (config["lambda_cos"] or config["lambda_norm"] or own_logits):
        raise UserError(
            "--mode online has no effect on a student that compares nothing with its teacher: add --lambda_cos, "
            "--lambda_norm, or --lambda_kl without --kl_teacher"
        )


def check_student_layers(num_layers: int, layer_selection: str, taught: dict) -> None:
    """UserError where the base has no such layers, or an inherited list is the teacher's and not the student's."""
    layers = listed_layers(layer_selection)
    if layers and len(layers) != num_layers:
        raise UserError(
            f"--num_layers {num_layers}: the teacher keeps layers {layer_selection} of its base; say which ones the "
            f"student keeps, as in --layer_selection {','.join(map(str, layers[:num_layers]))}"
        )
    select_layers(num_layers, taught["base_shape"]["num_hidden_layers"], layer_selection)


def untrained(config: dict, base: Base, source: Path, taught: dict, say: Callable[[str], None]) -> SLMRec:
    """The untrained student in its loss; with --mode online beside an untrained teacher, built as `taught` records."""
    names = ("num_blocks", "norm_form", "block_reduction", "lambda_cos", "lambda_norm", "lambda_ms", "lambda_kl")
    terms = {name: config[name] for name in names}
    terms |= {"temperature": config["temperature"], "kl_items": config["kl_items"]}
    if config["mode"] == "offline":
        return SLMRec(start_of_student(config, base, source, say), **terms)
    table = read_heads(source, taught.get("item_dim"))["item_table"]
    student = build_llm_rec(config, base, table)
    teacher = build_llm_rec(taught, load_base(taught, recorded_base(taught)), table)
    own = {"lambda_ms_teacher": config["lambda_ms_teacher"], "kl_blocks": config["kl_blocks"]}
    return OnlineSLMRec(student, teacher, **own, **terms)


def start_of_student(config: dict, base: Base, source: Path, say: Callable[[str], None]) -> LLMRec:
    """The untrained student, with the item tables of the teacher in `source`, for the input and for the output."""
    heads = read_heads(source, config.get("item_dim"))
    student = build_llm_rec(config, base, heads["item_table"])
    output = {name: value for name, value in heads.items() if name.startswith("item_output.")}
    own = {name: value.shape for name, value in student.state_dict().items() if name.startswith("item_output.")}
    if own == {name: value.shape for name, value in output.items()}:
        student.load_state_dict(output, strict=False)
    elif output:
        say("the student starts from the frozen table: what its teacher learned of the output has another form")
    return student


def train_student(run: Run, config: dict, source: Path, taught: dict, examples: Examples) -> None:
    """Train and save the student."""
    check_elsewhere("teacher", source, run)
    if config["kl_teacher"]:  # before the teacher's answers are computed
        check_elsewhere("kl_teacher", cli.ROOT / config["kl_teacher"], run)
        check_complete(cli.ROOT / config["kl_teacher"], read_config(cli.ROOT / config["kl_teacher"]), AGAIN)
    check_complete(source, taught, AGAIN)
    base = recorded_base(taught)
    fingerprint = load_base(taught, base).fingerprint
    check_base(taught, fingerprint, base, source)
    kept = load_base(config, base)
    run.record(base_fingerprint=kept.fingerprint)
    student = untrained(config, kept, source, taught, run.print)
    with ExitStack() as stack:
        if config["mode"] == "offline" and student.needs_states:
            boundaries = block_boundaries(config["teacher_layers"], config["num_blocks"])
            if config["teacher_states"] == "per_batch":
                teacher = load_llm_rec(source).to(run.accelerator.device)
                student.teacher = (teacher, boundaries)
                with run.accelerator.autocast():
                    stack.enter_context(teacher.for_inference())  # no weight of it changes while the student trains
            else:
                student.teacher_states = teacher_states(source, fingerprint, examples, boundaries, run)
        stored = student.teacher_states
        give_logits(student, config, examples, run, None if stored is None else (source, stored))
        state = fit(run, student, examples)
    # heads of L_ms, and an online teacher, only train
    size = count_parameters(student.student) | {"trained": count_parameters(student)["trained"]}
    run.finish(student, state, size, lambda folder: save_llm_rec(student.student, folder))


if __name__ == "__main__":
    cli.run(main, section="student", models=MODELS, inherits=INHERITED)
