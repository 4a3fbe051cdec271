"""Command lines: fire collects the arguments and renders the help; this gate checks them before any work starts.

Flags are the keyword-only parameters of `main`, and the fields of the Config of the model that --model names. Values
come from the defaults, then the dataset's recipe, then the command line. `main` is called only when every flag is
known, of its annotated type and within its range; otherwise one line says what is wrong and the exit code is 2.
"""

import dataclasses
import difflib
import errno
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fire
import yaml
from fire import decorators, helptext
from fire import trace as fire_trace

from utils.errors import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPE_SECTIONS = ("data", "sr", "teacher", "student")
Models = Mapping[str, type] | None  # a registry: the classes by the names that --model takes

# Every flag in the signature of a script: its meaning and, for numbers, the range of values that make sense.
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
    "num_layers": ("layers kept of the base model", ">= 1"),
    "layer_selection": ("keep the first layers of the base, or layers at an even interval", ""),
    "train_strategy": ("train LoRA adapters, all decoder layers, or neither (the two linear maps always train)", ""),
    "lora_r": ("rank of the adapters", ">= 1"),
    "lora_alpha": ("scale of the adapters", "> 0"),
    "lora_dropout": ("dropout before the adapters", "0..1"),
    "lora_target_modules": ("comma-separated modules that get adapters", ""),
    "max_seq_length": ("newest items of a history that are read", ">= 1"),
    "train_targets": ("training targets per user: last (the released protocol), all, or a number of newest ones", ""),
    "batch_size": ("examples per optimiser step, over all devices", ">= 1"),
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
    "run": ("run folder of a trained recommender", ""),
    "split": ("users' held-out items that are ranked", ""),
    "negatives": ("sampled candidates per user beside the held-out item", ">= 1"),
    "candidate_seed": ("seed of the sampled candidates", ">= 0"),
    "history": ("items of one history, ids or titles, oldest first, separated by ';'", ""),
    "input": ("histories: a .jsonl or .csv file, or - for standard input", ""),
    "k": ("items recommended per history", ">= 1"),
    "exclude_seen": ("leave out the items of the history", ""),
    "candidates": ("file with the only items to rank, one per line (default: all)", ""),
    "output": ("write to this .jsonl or .csv file (default: print)", ""),
    "record": ("also write a record of each run to results/runs/", ""),
    "mode": ("offline: a frozen teacher, whose states are computed once", ""),
}


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


def run(
    main: Callable,
    section: str | None,
    argv: list[str] | None = None,
    *,
    inherits: Sequence[str] = (),
    models: Models = None,
) -> None:
    """Check the command line, and call `main` with the value of every flag.

    section: of the recipe, None where a script has none. inherits: flags that come from an earlier step's run unless
    this step is given its own.
    models: the registry that --model chooses from; `main` gets its Config as `model_config` if it takes one.
    """
    script = Path(sys.modules[main.__module__].__file__).name
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows what it cannot print as \u2019
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if {"--help", "-h", "help"} & set(argv):
            print(help_text(main, script, argv, models))
            return
        main(**resolve(main, section, argv, inherits=inherits, models=models))
    except UserError as error:
        stop(script, str(error), 2)
    except RunError as error:
        stop(script, str(error), 1)
    except OSError as error:
        stop(script, describe(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = [f"--{name}" for name in ("micro_batch_size", "eval_batch_size") if name in flags_of(main)]
        advice = f"; {' and '.join(flags)} make it need less and may change with --resume auto" if flags else ""
        stop(script, f"out of memory{advice}", 1)
    except KeyboardInterrupt:
        stop(script, "interrupted; start it again with --resume auto to go on", 130)


def stop(script: str, message: str, code: int) -> typing.NoReturn:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space, or choose another place")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to")
ADVICE |= {errno.EMFILE: "allow more open files (ulimit -n)", errno.ENAMETOOLONG: "choose a shorter name"}


def describe(error: OSError) -> str:
    """The system's own words, the file that they are about, and what helps."""
    place = f": {error.filename}" if error.filename else ""
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    return f"{error.strerror or error}{place}{advice}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: NumPy has MemoryError, torch an error of its own or a plain RuntimeError."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "allocate memory" in text


def resolve(
    main: Callable, section: str | None, argv: list[str], *, inherits: Sequence[str] = (), models: Models = None
) -> dict:
    """Every flag's value; raises UserError on anything that is not exactly right."""
    given = collect(argv)
    parameters = inspect.signature(main).parameters
    name = Path(given.get("dataset", parameters["dataset"].default)).name if section else ""
    path, sections = read_recipe(name)
    check_recipe(path, sections, models)
    model = None
    if models and "model" in parameters:
        chosen = {"model": parameters["model"].default} | sections["data"] | sections.get(section, {}) | given
        model = str(chosen["model"])
        if model not in models:
            raise UserError(f"--model {model}: expected one of {', '.join(models)}")
    flags = flags_of(main, models, model)
    for name in given:
        if name not in flags:
            raise UserError(f"unknown flag --{name}{suggest(name, flags)}{of_another(name, models)}; see --help")
    values = {name: flag.default for name, flag in flags.items()}
    parts = [part for title in RECIPE_SECTIONS for part in per_model(title, sections[title], models)]
    values |= recipe_values(path, parts, section, flags, inherits, f"{section}.{model}")
    values |= {name: coerce(f"--{name}", text, flags[name]) for name, text in given.items()}
    if "model_config" not in parameters:
        return values
    own = {field.name: values.pop(field.name) for field in dataclasses.fields(models[model].Config)}
    return values | {"model_config": models[model].Config(**own)}


def of_another(name: str, models: Models) -> str:
    """A hint where a flag belongs to another model."""
    owners = [
        m for m, kind in (models or {}).items() if name in {field.name for field in dataclasses.fields(kind.Config)}
    ]
    return f" (a flag of --model {' or '.join(owners)})" if owners else ""


def collect(argv: list[str]) -> dict[str, str]:
    """Flags and their texts as fire splits them, untouched by its guessing of types."""
    found: dict[str, str] = {}

    @decorators.SetParseFn(str)
    def gather(*words, **flags):
        if words:
            raise UserError(f"stray word {words[0]!r}: every value belongs to a flag, as in --batch_size 64")
        found.update(flags)

    for at in reversed(range(1, len(argv))):  # standard input as a value, which fire takes for a separator
        if argv[at] == "-" and argv[at - 1].startswith("--") and "=" not in argv[at - 1]:
            argv = [*argv[: at - 1], f"{argv[at - 1]}=-", *argv[at + 1 :]]
    if {"-", "--"} & set(argv):
        raise UserError("stray '-' on the command line; see --help")
    # a flag without a value is given fire's own True, before fire takes --nonsense for a negated --nsense
    bare = [word.startswith("--") and "=" not in word for word in argv]
    ends = [at + 1 == len(argv) or argv[at + 1].startswith("--") for at in range(len(argv))]
    words = [f"{word}=True" if bare[at] and ends[at] else word for at, word in enumerate(argv)]
    fire.Fire(gather, command=words)
    return found


def coerce(source: str, value: object, flag: Flag) -> object:
    """`value` as the flag's type, within its range; anything else is a UserError naming `source`."""
    options = alternatives(flag.annotation)
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
    if not math.isfinite(number) or not within(number, flag.limits):
        raise UserError(f"{source} {value}: expected a number {flag.limits}")
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


def read_recipe(dataset: str) -> tuple[Path, dict[str, dict]]:
    """The recipe of a dataset, every section of it; empty sections where there is none."""
    path = ROOT / "recipes" / f"{dataset}.yaml"
    empty: dict[str, dict] = {title: {} for title in RECIPE_SECTIONS}
    if not path.is_file():
        return path, empty
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{path}: expected sections, one of {', '.join(RECIPE_SECTIONS)}")
    for title, entries in sections.items():
        if title not in RECIPE_SECTIONS:
            raise UserError(f"{path}: unknown section {title}; expected {', '.join(RECIPE_SECTIONS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{path}: section {title}: expected name: value lines")
    return path, empty | sections


def per_model(title: str, entries: dict, models: Models) -> list[tuple[str, object]]:
    """The parts of a recipe's section: what it says of every model, then what it says of each by name."""
    apart = {name: part for name, part in entries.items() if name in (models or {})}
    plain = {name: value for name, value in entries.items() if name not in apart}
    return [(title, plain), *((f"{title}.{name}", part) for name, part in apart.items())]


def check_recipe(path: Path, sections: dict[str, dict], models: Models) -> None:
    """UserError for a key that is a flag of no script and no model, in whichever section."""
    known = set(FLAGS).union(*({field.name for field in dataclasses.fields(m.Config)} for m in (models or {}).values()))
    for title, entries in sections.items():
        for place, part in per_model(title, entries, models):
            if not isinstance(part, dict):
                raise UserError(f"{path}: section {place}: expected name: value lines")
            for name in part:
                if name not in known:
                    raise UserError(f"{path}: unknown key {place}.{name}{suggest(str(name), known)}")


def recipe_values(
    path: Path, sections: list, section: str, flags: dict[str, Flag], inherits: Sequence[str], own: str
) -> dict:
    """The recipe's values for this script: section `data`, then the script's own, then what that has for the model.

    own: where the model's stand, as in "sr.sasrec". What a step inherits is not taken from `data`: the earlier step
    knows better what it was trained with.
    """
    entries: dict[str, tuple[str, object]] = {}
    for place, part in sections:
        if place not in ("data", section, own):
            continue
        for name, value in part.items():
            if name not in flags and place != "data":
                raise UserError(f"{path}: {place}.{name} is no flag of this step{suggest(str(name), flags)}")
            if name in flags and not (place == "data" and name in inherits):
                entries[name] = (f"{path}: {place}.{name}", value)
    values = {name: coerce(source, value, flags[name]) for name, (source, value) in entries.items()}
    if values:
        print(f"recipe {path.name}: " + ", ".join(f"{name}={value}" for name, value in values.items()))
    return values


def help_text(main: Callable, script: str, argv: list[str], models: Models) -> str:
    """fire's help of the flags, with the meaning of each."""
    model = next((argv[at + 1] for at, word in enumerate(argv[:-1]) if word == "--model"), None)
    flags = flags_of(main, models, model if model in (models or {}) else None)
    lines = [inspect.getdoc(sys.modules[main.__module__]) or ""]
    if models:
        lines += [f"Models: {', '.join(models)}. Each has flags of its own: --model NAME --help."]
    lines += ["", "Args:"]
    for name, flag in flags.items():
        limits = flag.limits or ", ".join(choices(flag.annotation))
        if len(str(flag.default)) > 20:  # fire cuts long defaults short
            limits = f"default: {flag.default}"
        lines.append(f"    {name}: {flag.meaning}" + (f" ({limits})" if limits else ""))

    def shown_by_fire(**flags) -> None: ...

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, kind, default=f.default, annotation=f.annotation) for n, f in flags.items()]
    shown_by_fire.__signature__, shown_by_fire.__doc__ = inspect.Signature(parameters), "\n".join(lines)
    text = helptext.HelpText(shown_by_fire, trace=fire_trace.FireTrace(shown_by_fire, name=script))
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
