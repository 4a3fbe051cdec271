"""Whose logits the term L_kl learns: a finished run, a traditional one or a language model, checked and loaded."""

from pathlib import Path

from models.interface import Recommender
from models.llm.storage import load_llm_rec
from models.llm.teacher_states import Answers, teacher_vectors
from models.slmrec import SLMRec
from models.sr.storage import load_recommender
from utils.cli import ROOT, portable_path
from utils.data import Examples, Sequences, check_same_dataset
from utils.errors import UserError
from utils.files import sha256
from utils.metrics import RANKS_FILE
from utils.run import Run
from utils.run_files import finished_run


def weights_sha256(folder: Path) -> dict[str, str]:
    """Of the weights that a finished run keeps; a kill in its last moment may have left checkpoints beside them."""
    kept = [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(kept) if path.name != RANKS_FILE}


def find_kl_teacher(config: dict, default: Path | None, data: Sequences) -> None:
    """Check the flags of the logit term, and put into `config` from which run its logits come.

    default: the run that is meant where --kl_teacher is not given; None where there is none. With --mode online it is
    the teacher that trains, so no run.
    """
    flags = ("kl_teacher", "kl_items", "kl_blocks", "temperature")
    given = {name: config[name] for name in flags if config.get(name) not in (None, False)}
    if config["lambda_kl"] is None and given:  # with --lambda_kl 0 it was switched off
        name, value = next(iter(given.items()))
        raise UserError(f"--{name} {value} has no effect without the logit term: add --lambda_kl, its weight")
    config["lambda_kl"] = config["lambda_kl"] or 0.0
    if not config["lambda_kl"]:
        return
    config["temperature"] = config["temperature"] or 1.0
    if config.get("mode") == "online" and config["kl_teacher"] is None:
        return
    source = config["kl_teacher"] or default
    if source is None:
        raise UserError(
            f"--lambda_kl {config['lambda_kl']}: no single run made the item table; say whose logits: --kl_teacher RUN"
        )
    source = Path(source)
    taught, _ = finished_run(source, f"--kl_teacher {source} holds no finished run; give the folder of one")
    if taught.get("kind") not in ("sr", "teacher", "student"):
        raise UserError(f"--kl_teacher {source} is no run of train_sr_trad.py, finetune.py or distill.py")
    check_same_dataset(data, taught, source)
    length, reads = config["max_seq_length"], taught["max_seq_length"]
    if taught["kind"] != "sr" and length > reads:
        what = f"--kl_teacher {source} reads {reads} items, who learns from it no more"
        raise UserError(f"--max_seq_length {length}: {what}")
    config |= {"kl_teacher": portable_path(source), "kl_teacher_sha256": weights_sha256(source)}


def check_elsewhere(flag: str, source: Path, run: Run) -> None:
    """UserError where a run that is read would be replaced by the run that reads it."""
    if source.resolve() == run.folder.resolve():
        raise UserError(f"--{flag} {source} is where this run is written; choose another --output_dir")


def load_kl_teacher(config: dict, run: Run) -> tuple[Recommender, Path, list]:
    """The recommender whose logits are learned, its folder, and what tells its weights from others."""
    source = ROOT / config["kl_teacher"]
    check_elsewhere("kl_teacher", source, run)
    taught, _ = finished_run(source, f"--kl_teacher {source} holds no finished run any more")
    if taught["kind"] == "sr":
        teacher, base = load_recommender(source, taught, run.data.training_part()), None
    else:
        teacher = load_llm_rec(source)
        base = taught["base_fingerprint"]  # without one it is not loaded
    if type(teacher).scores is not Recommender.scores:
        title = taught["title"]
        raise UserError(f"--kl_teacher {source}: {title} scores items by no dot product, which the logit term needs")
    return teacher, source, [base, config["kl_teacher_sha256"]]


def give_logits(
    model: SLMRec, config: dict, examples: Examples, run: Run, states: tuple[Path, Answers] | None = None
) -> None:
    """Give `model` what its logit term reads, if it has one.

    states: the folder of a language model and its `teacher_states`, from which its logits can be made.
    """
    if not config["lambda_kl"] or config["kl_teacher"] is None:  # an online teacher answers in the step itself
        return
    teacher, folder, key = load_kl_teacher(config, run)
    known = states[1] if states is not None and folder.resolve() == states[0].resolve() else None
    model.teacher_vectors = teacher_vectors(teacher, folder, key, examples, run, known)
    model.teacher_table = teacher.item_vectors().detach().float()
