"""Flags: what is known of each, and how a text becomes its value."""

import dataclasses
import difflib
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from utils.checked import LONE_SURROGATE
from utils.errors import UserError, at_home

Models = Mapping[str, type] | None  # a registry: the classes by the names that --model takes

# Every flag in the signature of a script: its meaning and, for numbers, the range of values that make sense.
FLAGS: dict[str, tuple[str, str]] = {
    "dataset": ("a processed dataset: a name under datasets/, or the path of its folder", ""),
    "model": ("traditional recommender; of extract_emb.py: which one's run is read (default: sasrec)", ""),
    "base_model": (
        "language model: smollm2-135m (fetched once), a local folder, or a hub id (id@revision for one of its commits)",
        "",
    ),
    "item_embeddings": (
        "folder written by extract_emb.py, a path or a name in outputs/<dataset>/; several, with commas, stand side by "
        "side (default: item_embeddings-sasrec)",
        "",
    ),
    "init_items": (
        "folder written by extract_emb.py, a path or a name in outputs/<dataset>/, from whose table the recommender's "
        "item table starts (default: random numbers)",
        "",
    ),
    "text": ("make a table from this text of the items instead of a trained recommender", ""),
    "text_model": (
        "what reads the text: all-minilm-l6-v2 (fetched once), or a language model as base_model takes it "
        "(default: all-minilm-l6-v2)",
        "",
    ),
    "import_table": ("take the table out of this .npy, .safetensors, .csv or .tsv file instead", ""),
    "row_order": ("rows of an imported array: in the order of items.tsv, or numbered by the items' own ids", ""),
    "pca_dim": (
        "width after PCA with centred, whitened, unit rows (default: 128 of a text, no PCA of an imported table)",
        ">= 1",
    ),
    "sr_dir": ("run folder of train_sr_trad.py (default: this dataset's)", ""),
    "teacher": ("run folder of finetune.py, or of distill.py (default: this dataset's teacher-8)", ""),
    "output_dir": (
        "where this is written (default: under outputs/<dataset>/; evaluate.py --fuse writes beside --run, and "
        "--layers only where this is given)",
        "",
    ),
    "num_layers": (
        "layers kept of the base model (default: 8, of a student 4; or as many as --layer_selection lists)",
        ">= 1",
    ),
    "layer_selection": (
        "which layers of the base are kept: first, interval (at an even one), influence (those that change their input "
        "most), or their numbers, as in 0,1,2,5",
        "",
    ),
    "train_strategy": ("train LoRA adapters, all decoder layers, or neither (the maps around it always train)", ""),
    "lora_r": ("rank of the adapters, and of item_output residual", ">= 1"),
    "lora_alpha": ("scale of the adapters", "> 0"),
    "lora_dropout": ("dropout before the adapters", "0..1"),
    "lora_target_modules": ("comma-separated modules that get adapters, or all-linear for every linear map", ""),
    "read_out": ("user vectors are read after the response tokens (the paper), or at each item, without them", ""),
    "normalize_items": ("rows of the item table minus their mean, at length 1", ""),
    "input_map": ("what maps item vectors to the decoder's: one linear layer, or two with a GELU between", ""),
    "item_output": (
        "table that scores items: frozen; plus a trained matrix of rank lora_r (residual); all of it trained",
        "",
    ),
    "item_dropout": ("dropout of the item vectors that the decoder reads", "0..1"),
    "state_dropout": ("dropout of the states that become user vectors", "0..1"),
    "teacher_states": (
        "the teacher's hidden states: stored once, in bfloat16 for half the disk, or computed per batch, slower",
        "",
    ),
    "max_seq_length": ("newest items of a history that are read", ">= 1"),
    "train_targets": ("training targets per user: last (the released protocol), all, or a number of newest ones", ""),
    "batch_size": ("examples per optimiser step, over all devices; of recommend.py histories scored at once", ">= 1"),
    "micro_batch_size": (
        "examples at once on a device (default: all of them; auto: as many as fit); the rest is accumulated",
        ">= 1",
    ),
    "eval_batch_size": ("users scored at once", ">= 1"),
    "num_epochs": ("passes over the training examples", "> 0"),
    "max_steps": (
        "optimiser steps, instead of num_epochs, and the most of a pre-training stage; -1: by epochs",
        "-1 or >= 1",
    ),
    "optimizer": ("adamw; or adam, whose weight decay is a part of the gradient", ""),
    "learning_rate": ("peak learning rate", "> 0"),
    "head_learning_rate": ("peak learning rate of what is around the decoder (default: learning_rate)", "> 0"),
    "weight_decay": ("weight decay; norms and biases have none", ">= 0"),
    "warmup_steps": ("steps of linear warm-up", ">= 0"),
    "lr_scheduler": ("what follows the warm-up", ""),
    "max_grad_norm": ("gradient norm above which gradients are scaled down", "> 0"),
    "eval_steps": (
        "steps between two evaluations on validation; checkpoints precede them and follow each epoch",
        ">= 1",
    ),
    "select_by": ("metric on validation that chooses the weights", ""),
    "patience": ("stop after so many evaluations in a row without a better one (default: never)", ">= 1"),
    "seed": ("seed of initialisation, dropout and batches (candidates have their own)", ">= 0"),
    "dtype": ("precision of the forward pass and of a frozen base", ""),
    "resume": ("auto: continue the run in output_dir, if any, or leave it where it is finished; never: replace it", ""),
    "report_to": ("also log to this tracker", ""),
    "num_blocks": ("blocks into which both stacks are cut", ">= 1"),
    "lambda_cos": ("weight of 1 - cosine of the hidden states of teacher and student at block ends (lambda_1)", ">= 0"),
    "lambda_norm": ("weight of the distance between these states, D_norm (lambda_2)", ">= 0"),
    "lambda_ms": ("weight of the multi-supervision term L_ms (lambda_3)", ">= 0"),
    "lambda_ms_teacher": ("weight of L_ms for heads on an online teacher (0: none)", ">= 0"),
    "lambda_kl": ("weight of the logit term L_kl (default: 0; the paper has none)", ">= 0"),
    "kl_teacher": (
        "run folder whose logits L_kl learns (default: of a student the teacher, of a teacher the model whose table it "
        "reads)",
        "",
    ),
    "kl_blocks": ("L_kl at each block of an online teacher, by the heads of L_ms, not at the last alone", ""),
    "kl_items": ("classes of L_kl: this many best items of the teacher, and all others as one (default: all)", ">= 1"),
    "temperature": ("L_kl divides logits by this (default: 1)", "> 0"),
    "norm_form": ("D_norm as the released code has it (l2) or as the paper prints it (squared)", ""),
    "block_reduction": ("over blocks: sum as in the released code, or mean as printed", ""),
    "run": ("run folder of a trained recommender", ""),
    "fuse": ("also weigh in the scores of this run folder; the weight is chosen on validation", ""),
    "beam_width": (
        "first tokens of items that a beam search follows (default: all, so that the scores of all items are exact)",
        ">= 1",
    ),
    "layers": ("measure the states after these layers, as in 1,8,30, instead of the last; all: after each of them", ""),
    "split": ("users' held-out items that are ranked", ""),
    "negatives": ("sampled candidates per user beside the held-out item", ">= 1"),
    "candidate_seed": ("seed of the sampled candidates", ">= 0"),
    "history": ("items of one history, ids or titles, oldest first, separated by ';'", ""),
    "input": ("histories: a .jsonl or .csv file, or - for standard input", ""),
    "k": ("items recommended per history", ">= 1"),
    "exclude_seen": ("leave out the items of the history", ""),
    "candidates": ("file with the only items to rank, one per line (default: all)", ""),
    "output": ("write to this .jsonl or .csv file (default: print)", ""),
    "mode": ("offline: a frozen teacher; online: a new one, built like it, is trained beside the student", ""),
}
# of scripts that measure or use what is trained, and read no recipe
OF_TRAINED = {"run", "fuse", "layers", "split", "negatives", "candidate_seed", "history", "input", "k", "exclude_seen"}
OF_TRAINED |= {"candidates", "output"}
# what a run did whose version did not have the flag yet
FORMER_DEFAULTS = {
    "select_by": "sampled/NDCG@10",
    "read_out": "response",
    "input_map": "linear",
    "item_output": "frozen",
}
FORMER_DEFAULTS |= {"teacher_states": "stored", "optimizer": "adamw"}


@dataclass(frozen=True)
class Flag:
    """What is known of a flag: the type and default of its value, its meaning, and the range of a number."""

    annotation: object
    default: object
    meaning: str
    limits: str


def flags_of(main: Callable, models: Models = None, model: str | None = None) -> dict[str, Flag]:
    """The flags of `main`, and those of the Config of `models[model]` where `main` takes a `model_config`."""
    parameters = inspect.signature(main).parameters
    found = {n: Flag(p.annotation, p.default, *FLAGS[n]) for n, p in parameters.items() if n != "model_config"}
    if models and "model_config" in parameters:
        config = models[model or parameters["model"].default].Config
        types_of = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            text = field.metadata["meaning"], field.metadata["limits"]
            found[field.name] = Flag(types_of[field.name], field.default, *text)
    return found


def coerce(source: str, value: object, flag: Flag) -> object:
    """`value` as the flag's type, within its range; anything else is a UserError naming `source`."""
    if isinstance(value, dict | list):  # of a recipe
        raise UserError(f"{source} {value}: expected a single value")
    options = alternatives(flag.annotation)
    if type(None) in options and str(value).lower() == "none":
        return None
    names = choices(flag.annotation)
    if value in names:
        return value
    wanted = next((option for option in options if option is not type(None) and not choices(option)), None)
    if wanted is None:
        raise UserError(f"{source} {value}: expected one of {', '.join(names)}")
    if wanted is str:
        if value is None or str(value) in ("True", ""):  # what fire makes of a flag without a value
            raise UserError(f"{source} needs a value")
        if "\0" in str(value):
            raise UserError(f"{source} holds a character that no path or name can")
        if LONE_SURROGATE.search(str(value)):  # as Python reads bytes that are no UTF-8
            raise UserError(f"{source} is no text in UTF-8")
        return at_home(str(value))
    if wanted is bool:
        if str(value).lower() not in ("true", "false"):
            raise UserError(f"{source} {value}: expected true or false")
        return str(value).lower() == "true"
    try:
        text = str(value)  # ValueError for one of thousands of digits
        number = wanted(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[wanted]
        given = value if isinstance(value, str) else "that is no such number"
        raise UserError(f"{source} {given:.60}: expected {' or '.join([kind, *names])}") from None
    if not abs(number) < 2**63 or not within(number, flag.limits):
        raise UserError(f"{source} {text:.60}: expected a number {flag.limits}, of at most 64 bits")
    return number


def within(number: float, limits: str) -> bool:
    """Whether `number` is in a range of FLAGS: "0..1" (1 excluded), "> 0", ">= 1", "-1 or >= 1"."""
    if limits == "0..1":
        return 0 <= number < 1
    alone, _, limits = limits.rpartition(" or ")
    sign, bound = limits.split()
    if alone and number == float(alone):
        return True
    return number > float(bound) if sign == ">" else number >= float(bound)


def alternatives(annotation: object) -> tuple:
    """The members of a union, or the annotation alone."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def choices(annotation: object) -> tuple[str, ...]:
    """The values of a Literal annotation, optional or not; () for any other."""
    return next((typing.get_args(o) for o in alternatives(annotation) if typing.get_origin(o) is typing.Literal), ())


def without_choices(annotation: object) -> object:
    """A number that may also be a word, as the number alone: fire has no name for such a type."""
    options = [option for option in alternatives(annotation) if typing.get_origin(option) is not typing.Literal]
    return functools.reduce(operator.or_, options) if set(options) - {type(None)} else annotation


def suggest(name: str, known: typing.Iterable[str], dashes: str = "--") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {dashes}{close[0]}?)" if close else ""
