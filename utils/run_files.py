"""config.json and metrics.json of a run folder or a table's, as later steps read them: what each entry may be."""

from pathlib import Path
from typing import Literal, Union

from utils.checked import COUNT, FLAG, NUMBER, REPLACED, SIZE, TEXT, Rule, check_tensors, maybe, read_json
from utils.errors import UserError
from utils.files import check_replaceable
from utils.flags import FLAGS, alternatives, choices, within

# Flags that later steps read, with the types that the scripts give them; the ranges are those of FLAGS.
TYPES: dict[str, object] = {
    **dict.fromkeys(("max_seq_length", "num_layers", "lora_r", "batch_size", "eval_batch_size", "num_blocks"), int),
    **dict.fromkeys(
        ("lora_alpha", "lora_dropout", "item_dropout", "state_dropout", "learning_rate", "num_epochs"), float
    ),
    **dict.fromkeys(("lambda_cos", "lambda_norm", "lambda_ms", "lambda_kl", "weight_decay"), float),
    **dict.fromkeys(("eval_steps", "max_steps", "seed", "warmup_steps"), int),
    "micro_batch_size": int | Literal["auto"] | None,
    **dict.fromkeys(("patience", "kl_items", "beam_width"), int | None),
    **dict.fromkeys(("dataset", "layer_selection", "lora_target_modules", "train_targets"), str),
    **dict.fromkeys(("base_model", "item_embeddings", "sr_dir", "kl_teacher", "teacher"), str | None),
    "normalize_items": bool,
    "read_out": Literal["response", "item"],
    "train_strategy": Literal["lora", "full", "frozen"],
    "input_map": Literal["linear", "mlp"],
    "item_output": Literal["frozen", "residual", "trained"],
    "dtype": Literal["float32", "bfloat16"],
}


def rule_of(annotation: object, limits: str) -> Rule:
    """What the value of a flag may be, by its type and its range."""
    options = [option for option in alternatives(annotation) if option is not type(None)]
    if len(options) < len(alternatives(annotation)):
        return maybe(rule_of(Union[*options], limits))
    if annotation in (str, bool):
        return TEXT if annotation is str else FLAG
    names, kinds = choices(annotation), {int: (int,), float: (int, float)}
    number = next((option for option in options if option in kinds), None)
    if number is None:
        return f"one of {', '.join(names)}", lambda value: value in names
    words = " or ".join([f"a {'whole ' * (number is int)}number {limits}", *names])
    return (
        words,
        lambda value: value in names or (type(value) in kinds[number] and NUMBER[1](value) and within(value, limits)),
    )


CONFIG: Rule = {name: rule_of(annotation, FLAGS[name][1]) for name, annotation in TYPES.items()} | {
    **dict.fromkeys(("kind", "title", "dataset_fingerprint", "run_id", "model", "table_sha256", "run", "fuse"), TEXT),
    "sr_weights_sha256": TEXT,
    "base_fingerprint": maybe(TEXT),  # early versions had none
    "output_dir": TEXT,
    **dict.fromkeys(("num_users", "item_dim", "teacher_layers"), SIZE),
    "base_shape": {"model_type": TEXT, "*": SIZE},
    "run_ids": [TEXT],
    "weight": ("a number from 0 to 1", lambda value: NUMBER[1](value) and 0 <= value <= 1),
}


def numbers(value: object) -> list:
    """The values of an object, or the value alone: what evaluate.py --layers took is one number."""
    return list(value.values()) if isinstance(value, dict) else [value]


OF_SPLIT: Rule = {kind: {"*": NUMBER} for kind in ("sampled", "full")}
METRICS: Rule = {
    "run_id": TEXT,
    "valid": OF_SPLIT,
    "test": OF_SPLIT,
    "baselines": {"*": {"valid": OF_SPLIT, "test": OF_SPLIT, "score_test_seconds": NUMBER}},
    "seconds": ("numbers by name, or a number", lambda value: all(map(NUMBER[1], numbers(value)))),
    "parameters": {"*": COUNT},
    "protocol": {**dict.fromkeys(("users", "items", "interactions"), SIZE), "sampled": TEXT},
    "environment": {"git_commit": TEXT, "command": TEXT, "threads": COUNT},
    **{"peak_memory_bytes": COUNT, "layers": {"*": OF_SPLIT}},
}

STATE: Rule = dict.fromkeys(("step", "evaluated", "best_step"), COUNT) | {
    "run_id": TEXT,
    "train_seconds": NUMBER,
    "evaluations": [{"step": COUNT, "metrics": OF_SPLIT}],
    "starts": [{"step": COUNT, "micro_batch_size": SIZE}],
}
# a row of log.jsonl
LOG: Rule = {"step": COUNT, "valid": OF_SPLIT, "gradient_share": {"*": NUMBER}, "*": NUMBER}


def read_config(folder: Path, missing: str = "") -> dict:
    """config.json of a run folder or a table's; UserError with the text `missing` where there is none."""
    return read_json(folder / "config.json", missing, CONFIG)


def read_metrics(folder: Path, missing: str = "") -> dict:
    """metrics.json of a run folder."""
    return read_json(folder / "metrics.json", missing, METRICS)


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint."""
    return read_json(folder / "state.json", f"{folder} is incomplete; {without(folder)}", STATE, without(folder))


def without(checkpoint: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"remove {checkpoint}, or pass --resume never"


def finished_run(folder: Path, missing: str) -> tuple[dict, dict]:
    """config.json and metrics.json of a finished run; UserError with the text `missing` where `folder` holds none."""
    config, metrics = read_config(folder, missing), read_metrics(folder, missing)
    if metrics.get("run_id") != config.get("run_id"):  # metrics of the run that this one replaces
        raise UserError(missing)
    return config, metrics


def is_finished(folder: Path, config: dict, advice: str) -> bool:
    """Whether `folder` holds metrics of the run of `config`; UserError, with `advice`, where parts of it are lost."""
    path = folder / "metrics.json"
    if not path.exists() or read_json(path, "", METRICS, advice).get("run_id") != config.get("run_id"):
        return False
    check_complete(folder, config, advice)
    return True


def check_complete(folder: Path, config: dict, advice: str) -> None:
    """UserError where a weight file of a finished run, or of an item table, is gone or cut off."""
    names = {"sr": ["model"], "item_embeddings": ["item_embeddings"]}.get(config.get("kind"), ["rec_heads"])
    if names == ["rec_heads"]:
        names += {"lora": ["adapter/adapter_model"], "full": ["decoder"]}.get(config.get("train_strategy"), [])
    for name in names:
        check_tensors(folder / f"{name}.safetensors", advice)


def check_shapes(folder: Path, saved: dict, wanted: dict) -> None:
    """UserError unless a checkpoint has each of the `wanted` tensors, in its type and shape."""
    for name, value in wanted.items():
        if (saved[name].dtype, saved[name].shape) != (value.dtype, value.shape):
            kinds = [f"{part.dtype} {tuple(part.shape)}" for part in (saved[name], value)]
            what = f"{name} is {kinds[0]}, not {kinds[1]}"
            raise UserError(f"{folder} does not belong to this run ({what}); remove it and start again")


def config_to_replace(folder: Path, kind: str, names: list[str]) -> dict:
    """config.json of what a step may replace, {} where there is none.

    UserError unless `folder` is free, or holds the files `names` of this kind alone.
    """
    check_replaceable(folder, names, "--output_dir")
    if not (folder / "config.json").exists():
        return {}
    held = read_json(folder / "config.json", "", advice=REPLACED)
    if held.get("kind") != kind:
        raise UserError(f"--output_dir {folder} holds something else (config.json); choose another place")
    return held
