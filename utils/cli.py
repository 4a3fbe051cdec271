"""Command lines: fire collects the arguments and renders the help; this gate checks them before any work starts.

Flags are the keyword-only parameters of `main`, and the fields of the Config of the model that --model names. Values
come from the defaults, then the dataset's recipe, then the command line. `main` is called only when every flag is
known, of its annotated type and within its range; otherwise one line says what is wrong and the exit code is 2.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import fire
from fire import decorators, helptext
from fire import trace as fire_trace

from utils.checked import LONE_SURROGATE
from utils.errors import RunError, UserError, cut_short, is_out_of_memory, told_in_one_line
from utils.flags import Models, choices, coerce, flags_of, suggest, without_choices
from utils.recipes import RECIPE_SECTIONS, check_recipe, per_model, read_recipe, recipe_values

ROOT = Path(__file__).resolve().parent.parent
FLAG = re.compile(r"--?([A-Za-z][\w-]*)")


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
    models: the registry that --model chooses from, whose names a recipe may hold; `main` gets the Config of the chosen
    one as `model_config` if it takes one.
    """
    script = Path(sys.modules[main.__module__].__file__).name
    argv = sys.argv[1:] if argv is None else argv
    resumes = "resume" in flags_of(main)
    with told_in_one_line(script, f"start it again{' with --resume auto to go on' if resumes else ''}"):
        if {"--help", "-h"} & set(argv) or argv == ["help"]:
            with cut_short():
                print(help_text(main, section, script, argv, models))
            return
        check_once(argv)
        try:
            main(**resolve(main, section, argv, inherits=inherits, models=models))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            sizes = ("micro_batch_size", "eval_batch_size", *(() if resumes else ("batch_size",)))
            flags = [f"--{name}" for name in sizes if name in flags_of(main)]
            smaller = ", ".join([*flags, "or model"]) if flags else "model"
            changes = "; these sizes may change with --resume auto" if resumes else ""
            raise RunError(f"out of memory; a smaller {smaller} needs less{changes}") from None


def resolve(
    main: Callable, section: str | None, argv: list[str], *, inherits: Sequence[str] = (), models: Models = None
) -> dict:
    """Every flag's value; raises UserError on anything that is not exactly right."""
    given = collect(argv)
    parameters = inspect.signature(main).parameters
    name = Path(given.get("dataset", parameters["dataset"].default)).absolute().name if section else ""
    path = ROOT / "recipes" / f"{name}.yaml"
    sections = read_recipe(path)
    check_recipe(path, sections, models)
    model = None
    if models and "model" in parameters:
        chosen = {"model": parameters["model"].default} | sections["data"] | sections.get(section, {}) | given
        model = None if chosen["model"] is None else str(chosen["model"])
        if model is not None and model not in models:
            raise UserError(f"--model {model}: expected one of {', '.join(models)}")
    flags = flags_of(main, models, model)
    for name in given:
        if name not in flags:
            raise UserError(f"unknown flag --{name}{suggest(name, flags)}{of_another(name, models)}; see --help")
    values = {name: flag.default for name, flag in flags.items()}
    parts = [part for title in RECIPE_SECTIONS for part in per_model(title, sections[title], models)]
    values |= recipe_values(path, parts, section, flags, inherits, f"{section}.{model}")
    values |= {name: coerce(f"--{name}", text, flags[name]) for name, text in given.items()}
    if "num_epochs" in given and "max_steps" not in given and values.get("max_steps", -1) > 0:
        steps = f"max_steps={values['max_steps']} of {path.name}"
        raise UserError(f"--num_epochs {given['num_epochs']} has no effect beside {steps}: add --max_steps -1")
    if values.get("train_strategy") in ("full", "frozen"):
        check_lora(values, given)
    if "model_config" not in parameters:
        return values
    own = {field.name: values.pop(field.name) for field in dataclasses.fields(models[model].Config)}
    return values | {"model_config": models[model].Config(**own)}


def check_once(argv: list[str]) -> None:
    """UserError for a flag that is given twice, of which fire would keep the last and drop the others."""
    names = [flag[1].replace("-", "_") for flag in map(FLAG.match, argv) if flag]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--{twice} is given twice")


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


def help_text(main: Callable, section: str | None, script: str, argv: list[str], models: Models) -> str:
    """fire's help of the flags, with the meaning of each."""
    words = " ".join(argv).replace("--model=", "--model ").split()
    model = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--model"), None)
    flags = flags_of(main, models, model if model in (models or {}) else None)
    lines = [inspect.getdoc(sys.modules[main.__module__]) or ""]
    takes = inspect.signature(main).parameters
    if "model" in takes:
        own = " Each has flags of its own: --model NAME --help." if "model_config" in takes else ""
        lines += [f"Models: {', '.join(models)}.{own}"]
    lines += ["", *(["A recipe, recipes/<dataset>.yaml, changes defaults."] if section else []), "Args:"]
    for name, flag in flags.items():
        limits = flag.limits or ", ".join(choices(flag.annotation))
        if len(str(flag.default)) > 20:  # fire cuts long defaults short
            limits = f"default: {flag.default}"
        lines.append(f"    {name}: {flag.meaning}" + (f" ({limits})" if limits else ""))

    def shown_by_fire(**flags) -> None: ...

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(n, kind, default=f.default, annotation=without_choices(f.annotation))
        for n, f in flags.items()
    ]
    shown_by_fire.__signature__, shown_by_fire.__doc__ = inspect.Signature(parameters), "\n".join(lines)
    text = helptext.HelpText(shown_by_fire, trace=fire_trace.FireTrace(shown_by_fire, name=script))
    return re.sub(r"(?m)^    -\w, --", "    --", text)  # fire's one-letter flags are not accepted here


def portable_path(path: Path) -> str:
    """A path as configurations hold it: relative to the checkout where it lies inside, so that records are portable."""
    path = path.absolute()
    text = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    if LONE_SURROGATE.search(text):  # as Python reads bytes that are no UTF-8
        raise UserError(f"{text!r} is no text in UTF-8; rename the folder, or choose another")
    return text


def inherit(config: dict, source: dict, names: list[str], where: str) -> None:
    """Fill flags left at None from a predecessor's configuration, and say which were inherited and overridden."""
    names = [name for name in names if name in source]  # an older version may not have had them all
    inherited = [name for name in names if config.get(name) is None]
    overridden = [name for name in names if name not in inherited and config[name] != source[name]]
    config.update({name: source[name] for name in inherited})
    if inherited:
        print(f"inherited from {where}: " + ", ".join(f"{name}={source[name]}" for name in inherited))
    if overridden:
        print("overridden: " + ", ".join(f"{name}={config[name]} (was {source[name]})" for name in overridden))


def check_lora(values: dict, given: Iterable[str]) -> None:
    """UserError for LoRA's flags among those `given` where nothing is adapted.

    The rank is that of --item_output residual too, and a student that leaves it open may inherit that.
    """
    for name in given:
        as_rank = name == "lora_r" and values.get("item_output") in ("residual", None)
        if name.startswith("lora_") and not as_rank:
            raise UserError(f"--{name} has no effect with --train_strategy {values['train_strategy']}: leave one out")


def print_config(config: dict) -> None:
    width = max(map(len, config))
    print("configuration:")
    for name, value in config.items():
        print(f"  {name:<{width}}  {value}")
