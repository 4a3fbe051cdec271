"""Command lines: fire collects the arguments and renders the help; this gate checks them before any work starts.

Values come from the defaults in `main`'s signature, then the dataset's recipe, then the command line. `main` is
called only when every flag is known, of its annotated type and within its range; otherwise one line says what is
wrong and the exit code is 2.
"""

import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import fire
import yaml
from fire import decorators, helptext
from fire import trace as fire_trace

from utils.errors import RunError, UserError, describe_error, end_output

ROOT = Path(__file__).resolve().parent.parent
RECIPE_SECTIONS = ("data", "sr", "teacher", "student")

# Every flag of every script: its meaning and, for numbers, the range of values that make sense.
FLAGS: dict[str, tuple[str, str]] = {
    "dataset": ("a processed dataset: a name under datasets/, or the path of its folder", ""),
    "model": ("traditional recommender", ""),
    "base_model": (
        "language model: smollm2-135m (fetched once), a local folder, or a hub id (id@revision for one of its commits)",
        "",
    ),
    "item_embeddings": ("folder written by extract_emb.py (default: this dataset's)", ""),
    "sr_dir": ("run folder of train_sr_trad.py (default: this dataset's)", ""),
    "teacher": ("run folder of finetune.py (default: this dataset's teacher-8)", ""),
    "output_dir": ("where this run is written (default: under outputs/<dataset>/)", ""),
    "num_layers": ("layers kept of the base model, or blocks of the traditional model", ">= 1"),
    "layer_selection": ("keep the first layers of the base, or layers at an even interval", ""),
    "hidden_size": ("item dimension d", ">= 1"),
    "num_heads": ("attention heads", ">= 1"),
    "dropout": ("dropout of the traditional model", "0..1"),
    "train_strategy": ("train LoRA adapters, all decoder layers, or neither (the two linear maps always train)", ""),
    "lora_r": ("rank of the adapters", ">= 1"),
    "lora_alpha": ("scale of the adapters", "> 0"),
    "lora_dropout": ("dropout before the adapters", "0..1"),
    "lora_target_modules": ("comma-separated modules that get adapters", ""),
    "max_seq_length": ("newest items of a history that are read", ">= 1"),
    "train_targets": ("training targets a user: last (the released protocol), all, or a number of newest ones", ""),
    "num_negatives": ("negatives a batch of the sampled softmax; 0: the cross-entropy over all items", ">= 0"),
    "batch_size": ("examples an optimiser step, over all devices", ">= 1"),
    "micro_batch_size": ("examples at once on a device (default: all of them); the rest is accumulated", ">= 1"),
    "eval_batch_size": ("users scored at once", ">= 1"),
    "num_epochs": ("passes over the training examples", "> 0"),
    "max_steps": ("optimiser steps, instead of num_epochs; -1: by num_epochs", "-1 or >= 1"),
    "learning_rate": ("peak learning rate of AdamW", "> 0"),
    "head_learning_rate": ("the same for the maps from items and to user vectors (default: learning_rate)", "> 0"),
    "weight_decay": ("weight decay of AdamW", ">= 0"),
    "warmup_steps": ("steps of linear warm-up", ">= 0"),
    "lr_scheduler": ("what follows the warm-up", ""),
    "max_grad_norm": ("gradient norm above which gradients are scaled down", "> 0"),
    "eval_steps": (
        "steps between two evaluations on validation; checkpoints precede them and follow each epoch",
        ">= 1",
    ),
    "seed": ("seed of initialisation, dropout and batches (candidates have their own)", ">= 0"),
    "dtype": ("precision of the forward pass and of a frozen base", ""),
    "resume": ("auto: continue the interrupted run in output_dir, if any; never: start anew", ""),
    "report_to": ("also log to this tracker", ""),
    "num_blocks": ("blocks into which both stacks are cut", ">= 1"),
    "lambda_cos": ("weight of 1 - D_cos (lambda_1)", ">= 0"),
    "lambda_norm": ("weight of D_norm (lambda_2)", ">= 0"),
    "lambda_ms": ("weight of the multi-supervision term L_ms (lambda_3)", ">= 0"),
    "norm_form": ("D_norm as the released code has it (l2) or as the paper prints it (squared)", ""),
    "block_reduction": ("over blocks: sum as in the released code, or mean as printed", ""),
    "record": ("also write a record of each run to results/runs/", ""),
    "mode": ("offline: a frozen teacher, whose states are computed once", ""),
}


def run(main: Callable, section: str, argv: list[str] | None = None, inherits: Sequence[str] = ()) -> None:
    """Check the command line against `main`'s keyword-only annotated flags, and call it.

    section: of the recipe. inherits: flags that come from an earlier step's run unless this step is given its own.
    """
    script = Path(sys.modules[main.__module__].__file__).name
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows what it cannot print as \\u2019
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if {"--help", "-h", "help"} & set(argv):
            print(help_text(main, script))
            return
        main(**resolve(main, section, argv, inherits))
        print(end="", flush=True)
    except UserError as error:
        stop(script, str(error), 2)
    except RunError as error:
        stop(script, str(error), 1)
    except OSError as error:
        stop(script, describe_error(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = [f"--{name}" for name in ("micro_batch_size", "eval_batch_size") if name in flags_of(main)]
        advice = f"; {' and '.join(flags)} make it need less and may change with --resume auto" if flags else ""
        stop(script, f"out of memory{advice}", 1)
    except KeyboardInterrupt:
        stop(script, "interrupted; start it again with --resume auto to go on", 130)
    finally:
        end_output()


def stop(script: str, message: str, code: int) -> typing.NoReturn:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: NumPy has MemoryError, torch an error of its own or a plain RuntimeError."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "allocate memory" in text


def flags_of(main: Callable) -> typing.Mapping[str, inspect.Parameter]:
    return inspect.signature(main).parameters


def resolve(main: Callable, section: str, argv: list[str], inherits: Sequence[str] = ()) -> dict:
    """Every flag's value; raises UserError on anything that is not exactly right."""
    parameters = flags_of(main)
    given = {}
    for name, text in collect(argv).items():
        if name not in parameters:
            raise UserError(f"unknown flag --{name}{suggest(name, parameters)}; see --help")
        given[name] = coerce(f"--{name}", text, parameters[name].annotation, name)
    values = {name: parameter.default for name, parameter in parameters.items()}
    dataset = given.get("dataset", values["dataset"])
    return values | recipe(Path(dataset).name, section, parameters, inherits) | given


def collect(argv: list[str]) -> dict[str, str]:
    """Flags and their texts as fire splits them, untouched by its guessing of types."""
    found: dict[str, str] = {}

    @decorators.SetParseFn(str)
    def gather(*words, **flags):
        if words:
            raise UserError(f"stray word {words[0]!r}: every value belongs to a flag, as in --batch_size 64")
        found.update(flags)

    if {"-", "--"} & set(argv):
        raise UserError("stray '-' on the command line; see --help")
    # a flag without a value is given fire's own True, before fire takes --nonsense for a negated --nsense
    bare = [word.startswith("--") and "=" not in word for word in argv]
    ends = [at + 1 == len(argv) or argv[at + 1].startswith("--") for at in range(len(argv))]
    words = [f"{word}=True" if bare[at] and ends[at] else word for at, word in enumerate(argv)]
    fire.Fire(gather, command=words)
    return found


def coerce(source: str, value: object, annotation: object, name: str) -> object:
    """`value` as the annotated type, within the flag's range; anything else is a UserError naming `source`."""
    if isinstance(value, dict | list):  # of a recipe
        raise UserError(f"{source} {value}: expected a single value")
    options = alternatives(annotation)
    if type(None) in options and str(value).lower() == "none":
        return None
    wanted = next(option for option in options if option is not type(None))
    if choices(wanted):
        if value not in choices(wanted):
            raise UserError(f"{source} {value}: expected one of {', '.join(choices(wanted))}")
        return value
    if wanted is str:
        if value is None or str(value) in ("True", ""):  # what fire makes of a flag without a value
            raise UserError(f"{source} needs a value")
        return str(value)
    if wanted is bool:
        if str(value).lower() not in ("true", "false"):
            raise UserError(f"{source} {value}: expected true or false")
        return str(value).lower() == "true"
    try:
        number = wanted(str(value))
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[wanted]
        raise UserError(f"{source} {value}: expected {kind}") from None
    limits = FLAGS[name][1]
    if not within(number, limits) or not abs(number) < 2**63:
        raise UserError(f"{source} {value}: expected a number {limits}, of at most 64 bits")
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


def suggest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


class OneOfEachKey(yaml.SafeLoader):
    """PyYAML would keep the last of equal keys and drop the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = [key.value for key, _ in node.value]
        twice = next((key for at, (key, _) in enumerate(node.value) if key.value in found[:at]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {twice.start_mark.line + 1}: {twice.value} stands twice in one section")
        return super().construct_mapping(node, deep)


def recipe(
    dataset: str, section: str, parameters: typing.Mapping[str, inspect.Parameter], inherits: Sequence[str] = ()
) -> dict:
    """The recipe's values for this script: its `data` section for every script, then the script's own section.

    What a step inherits is not taken from `data`: the earlier step knows better what it was trained with.
    """
    path = ROOT / "recipes" / f"{dataset}.yaml"
    if not path.is_file():
        return {}
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), OneOfEachKey) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{path}: expected sections, one of {', '.join(RECIPE_SECTIONS)}")
    values: dict[str, dict] = {title: {} for title in RECIPE_SECTIONS}
    for title, entries in sections.items():
        if title not in RECIPE_SECTIONS:
            raise UserError(f"{path}: unknown section {title}; expected {', '.join(RECIPE_SECTIONS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{path}: section {title}: expected name: value lines")
        for name, value in entries.items():
            if name not in (FLAGS if title != section else parameters):
                raise UserError(f"{path}: unknown key {title}.{name}{suggest(str(name), FLAGS)}")
            if title == section or (title == "data" and name in parameters and name not in inherits):
                values[title][name] = coerce(f"{path}: {title}.{name}", value, parameters[name].annotation, name)
    chosen = values["data"] | values.get(section, {})
    if chosen:
        print(f"recipe {path.name}: " + ", ".join(f"{name}={value}" for name, value in chosen.items()))
    return chosen


def help_text(main: Callable, script: str) -> str:
    """fire's help of `main`, with the meaning of each flag taken from FLAGS."""
    lines = [inspect.getdoc(sys.modules[main.__module__]) or "", "", "Args:"]
    for name in inspect.signature(main).parameters:
        meaning, limits = FLAGS[name]
        parameter = inspect.signature(main).parameters[name]
        limits = limits or ", ".join(choices(parameter.annotation))
        if len(str(parameter.default)) > 20:  # fire cuts long defaults short
            limits = f"default: {parameter.default}"
        lines.append(f"    {name}: {meaning}" + (f" ({limits})" if limits else ""))
    main.__doc__ = "\n".join(lines)
    text = helptext.HelpText(main, trace=fire_trace.FireTrace(main, name=script))
    return re.sub(r"(?m)^    -\w, --", "    --", text)  # fire's one-letter flags are not accepted here


def shown(path: Path) -> str:
    """A path as configurations hold it: relative to the checkout where it lies inside, so that records are portable."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def inherit(config: dict, source: dict, names: list[str], where: str) -> None:
    """Fill flags left at None from a predecessor's configuration, and say which were inherited and overridden."""
    inherited = [name for name in names if config.get(name) is None]
    overridden = [name for name in names if name not in inherited and config[name] != source[name]]
    config.update({name: source[name] for name in inherited})
    if inherited:
        print(f"inherited from {where}: " + ", ".join(f"{name}={source[name]}" for name in inherited))
    if overridden:
        print("overridden: " + ", ".join(f"{name}={config[name]} (was {source[name]})" for name in overridden))


def print_config(config: dict) -> None:
    width = max(map(len, config))
    print("configuration:")
    for name, value in config.items():
        print(f"  {name:<{width}}  {value}")
