"""Compares what the processes of a run were started with, before the first step."""

import hashlib
import pathlib
from importlib import metadata
from typing import Any

import jax
from absl import flags

from rho1_jax.models.hf_folder import is_hugging_face_folder
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.processes import gather_json
from rho1_jax.training import checkpoint
from rho1_jax.training.config import as_saved, changes
from rho1_jax.training.setup import RunSetup, TrainingData

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGE = pathlib.Path(__file__).parents[1]
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # read of each file of a model


def check_same_everywhere(setup: RunSetup, data: TrainingData) -> None:
    """Compares config, code, libraries, data, tokenizer and pretrained models. Does nothing in a single process.

    Raises:
      UserError: a process differs from process 0. The error names the first difference.
    """
    if jax.process_count() == 1:
        return
    first, *others = gather_json(_description(setup, data))
    for number, other in enumerate(others, start=1):
        for change in changes(first, other):
            key = change.key.removeprefix("config.")
            raise UserError(f"process {number} differs from process 0 in {key}: {change.new!r}, not {change.old!r}")


def _description(setup: RunSetup, data: TrainingData) -> dict[str, Any]:
    """What must not differ between processes."""
    config = setup.config
    models = {"init": config.init.checkpoint if setup.initial else "", "reference": config.reference.checkpoint}
    return {
        "config": as_saved(config),
        "code": {name: _digest(path) for name, path in _sources().items()},
        "library": {name: metadata.version(name) for name in LIBRARIES},
        "data": [store.fingerprint for store in data.stores],
        "tokenizer": data.tokenizer.fingerprint,
        "model": {key: _content(path, f"config.{key}.checkpoint") for key, path in models.items() if path},
    }


def _sources() -> dict[str, pathlib.Path]:
    """The files of this package and of plugins."""
    files = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    plugins = flags.FLAGS.plugin if "plugin" in flags.FLAGS else []
    return files | {path: pathlib.Path(path) for path in plugins}


def _content(path: str, key: str) -> dict[str, str]:
    """A digest of each file of a model, so that two models of the same shape differ.

    Hidden files are left out, such as the times of a download in .cache.
    """
    folder = pathlib.Path(path) if is_hugging_face_folder(path) else checkpoint.find(path, key)
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {str(name): _digest(file) for name, file in files.items() if not str(name).startswith(".")}


def _digest(path: pathlib.Path) -> str:
    """Size of a file, and a hash of samples of it. The samples of a short file cover all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:16]}"
