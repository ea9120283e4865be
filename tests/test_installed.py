"""The wheel, installed into a new environment and used from another folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from helpers import root

import rho1_jax

pytestmark = pytest.mark.slow

SIZES = ("width=32", "layers=2", "heads=4", "kv_heads=2", "head_width=8", "ff_width=48")


def run(*command, cwd, seconds=1500):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from a copy so that no earlier build can leak into it."""
    source, output = tmp_path_factory.mktemp("source") / "rho1_jax", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs", "shared", "site")
    shutil.copytree(root(), source, symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={output}", str(source), cwd=output)
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name.startswith(f"rho1_jax-{rho1_jax.__version__}-")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = root() / "rho1_jax"
    folders = [package, *(path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__")]
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".jsonl", ".typed")}
    assert held == {str(path.relative_to(root())) for path in files}
    assert {"rho1_jax/configs/default.py", "rho1_jax/py.typed", "rho1_jax/evals/exemplars/tabmwp.jsonl"} <= held


def test_the_installed_command_prepares_and_trains(wheel, tmp_path):
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    run(str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--quiet", str(wheel), cwd=tmp_path)
    rho1, work = str(tmp_path / "venv/bin/rho1"), tmp_path / "work"
    work.mkdir()
    run(rho1, "--help", cwd=work)  # compiles the modules
    start = time.monotonic()
    assert "  train      " in run(rho1, "--help", cwd=work)
    assert time.monotonic() - start < 2
    (work / "corpus.txt").write_text("".join(f"{a}+{b}={a + b}, and so on.\n" for a in range(40) for b in range(40)))
    run(rho1, "tokenizer", "--input=corpus.txt", "--output=tokenizer.model", "--vocab_size=280", cwd=work)
    prepare = ("--input=corpus.txt", "--tokenizer=tokenizer.model", "--output=rows", "--seq_len=32")
    assert "rows: 1 documents" in run(rho1, "prepare", *prepare, cwd=work)
    keys = ("data.train=rows", "steps=10", "batch_size=8", *(f"model.{size}" for size in SIZES))
    run(rho1, "train", "--config=default:clm", "--workdir=run", *(f"--config.{key}" for key in keys), cwd=work)
    assert (work / "run/metrics.jsonl").read_text().count('"step": 10,') == 1
    assert (work / "run/checkpoints/10/meta").is_dir()
    generate = ("--checkpoint=run", "--prompt=1+1=", "--max_new_tokens=4")
    assert run(rho1, "generate", *generate, cwd=work).startswith("1+1=")
    location = run(str(tmp_path / "venv/bin/python"), "-c", "import rho1_jax; print(rho1_jax.__file__)", cwd=work)
    assert location.startswith(str(tmp_path / "venv"))
