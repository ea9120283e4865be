"""Turns a checkpoint into a Hugging Face folder, for other tools to serve and evaluate.

rho1 export --checkpoint=DIR --output=DIR [--dtype=bfloat16] [--raw]

With --raw, the folder has only the parameters, as safetensors with the names and shapes they have here. NumPy reads
them without this package.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from rho1_jax.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from rho1_jax.models import hf_config
from rho1_jax.models.decoder import param_count
from rho1_jax.models.families import Family, family_of
from rho1_jax.models.hf_folder import DTYPES, INDEX_FILE, SINGLE_FILE, named_tensors
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, write_text
from rho1_jax.runtime.processes import usage
from rho1_jax.runtime.progress import Progress
from rho1_jax.training import checkpoint
from rho1_jax.training.pretrained import TrainedRun

SHARD_BYTES = 4 << 30


def shards(
    directory: pathlib.Path, family: Family | None, dtype: str | None, progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the named tensors of a checkpoint, SHARD_BYTES or all layers of one parameter at a time.

    Without a family, they are the parameters under their own names.

    Raises:
      UserError: a finite value of the checkpoint is not finite in the dtype.
    """
    shard: dict[str, np.ndarray] = {}
    for path, array in checkpoint.iterate_params(directory):
        with np.errstate(over="ignore"):
            cast = array.astype(jnp.dtype(dtype or array.dtype), copy=False)
        if not np.isfinite(cast.astype(np.float32, copy=False)).all():
            raise UserError(f"{path} has values too large for {dtype}; choose another --dtype")
        shard |= named_tensors(family.tensors[path], cast) if family else {path: cast}
        progress.advance(array.size)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def sentencepiece_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that makes Transformers return the same ids as a bare SentencePiece model."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "eos_token": tokenizer.pieces([tokenizer.eos_id])[0],
        "legacy": False,
        "add_prefix_space": tokenizer.pieces(tokenizer.encode("a"))[0].startswith(" "),
    }


def write_weights(
    directory: pathlib.Path, partial: pathlib.Path, family: Family | None, dtype: str | None, progress: Progress
) -> str:
    """Writes a checkpoint's parameters as safetensors, with an index if there are several files.

    Returns:
      The dtype of the tensors.
    """
    files: list[list[str]] = []
    size, written_dtype = 0, ""
    for shard in shards(directory, family, dtype, progress):
        save_file(shard, partial / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(shard))
        size += sum(tensor.nbytes for tensor in shard.values())
        written_dtype = str(next(iter(shard.values())).dtype)
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE_FILE]
    else:
        weight_map = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(partial / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    for n, name in enumerate(names):
        (partial / f"{n}.part").rename(partial / name)
    return written_dtype


def export_hf(path: str, output: pathlib.Path, dtype: str | None) -> int:
    """Writes config.json, safetensors and the tokenizer's files.

    Args:
      path: a run directory or one of its checkpoints.
      output: the folder to write, which must not exist.
      dtype: dtype of the tensors; None keeps that of the checkpoint.

    Returns:
      The number of parameters.

    Raises:
      UserError: there is no checkpoint, `output` exists, or none of Hugging Face's families can express the model.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    trained = TrainedRun.open(path, "--checkpoint")
    directory, model, tokenizer = trained.directory, trained.model, trained.tokenizer()
    hf_config.to_hf(model, "float32", None, 0)  # raises before anything is written
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    settings = partial / "tokenizer_config.json"
    if not settings.exists() and tokenizer.path.name == SENTENCEPIECE_FILE:
        write_text(settings, json.dumps(sentencepiece_settings(tokenizer), indent=2) + "\n")
    count = param_count(model)
    with Progress(f"writing {output.name}", count, unit="params") as progress:
        written = write_weights(directory, partial, family_of(model), dtype, progress)
    config = hf_config.to_hf(model, written, tokenizer.bos_id, tokenizer.eos_id)
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    partial.rename(output)
    return count


def export_raw(path: str, output: pathlib.Path, dtype: str | None) -> int:
    """Writes the parameters alone, as safetensors under their own names.

    Args and Raises: as for `export_hf`.

    Returns:
      The number of parameters.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    trained, partial = TrainedRun.open(path, "--checkpoint"), output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = param_count(trained.model)
    with Progress(f"writing {output.name}", count, unit="params") as progress:
        write_weights(trained.directory, partial, None, dtype, progress)
    partial.rename(output)
    return count


def main() -> None:
    """The command: parses the flags and calls `export_hf` or `export_raw`."""
    path = flags.DEFINE_string("checkpoint", None, "A run directory or one of its checkpoints.", required=True)
    output = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    dtype = flags.DEFINE_enum("dtype", None, list(DTYPES.values()), "Dtype of the tensors. Default: the checkpoint's.")
    raw = flags.DEFINE_bool("raw", False, "Write only the parameters, with the names and shapes they have here.")

    def command() -> None:
        start = time.monotonic()
        export = export_raw if raw.value else export_hf
        count = export(path.value, local_path(output.value, "--output"), dtype.value)
        print(f"{output.value}: {count:,} parameters, {usage(start)}")

    run(command)


if __name__ == "__main__":
    main()
