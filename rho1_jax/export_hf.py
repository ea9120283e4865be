"""Turns a checkpoint into a Hugging Face folder, for other tools to serve and evaluate.

rho1 export --checkpoint=DIR --output=DIR [--dtype=bfloat16] [--verify | --weights_only | --raw]

--verify compares token ids with those of Transformers, which must be installed. --weights_only writes a run directory
with one checkpoint that has no optimizer state, a third of the size: every command opens it as a model, but no run can
be resumed from it. --raw writes only the parameters, as safetensors, with this package's names and shapes.
`safetensors.numpy` reads them without this package.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import sentencepiece
from absl import flags
from flax import traverse_util
from safetensors.numpy import save_file

from rho1_jax.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from rho1_jax.models import hf_config
from rho1_jax.models.decoder import param_count
from rho1_jax.models.families import Family, family_of
from rho1_jax.models.hf_folder import DTYPES, INDEX_FILE, SINGLE_FILE
from rho1_jax.models.hf_tensors import fused_with, named_tensors
from rho1_jax.models.verify_hf import verify_tokens
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, write_text
from rho1_jax.runtime.processes import usage
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.schema import read_json
from rho1_jax.training import checkpoint
from rho1_jax.training.description import read_description
from rho1_jax.training.pretrained import Pretrained, write_parameters

SHARD_BYTES = 4 << 30
# For these model types, Transformers 5 uses its own byte-level tokenizer, regardless of the folder's files.
BYTE_LEVEL_TYPES = ("qwen2",)
READS_TOKENIZER_JSON = "PreTrainedTokenizerFast"  # the class that Transformers 4 and 5 have for any tokenizer.json
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shards(
    directory: pathlib.Path, family: Family | None, dtype: str | None, progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the named tensors of a checkpoint, SHARD_BYTES or all layers of one parameter at a time.

    The parts of a fused tensor wait in memory until all of them have been read.

    Without a family, tensors are the parameters under their own names.

    Raises:
      UserError: a finite value of the checkpoint is not finite in the dtype.
    """
    shard: dict[str, np.ndarray] = {}
    parts: dict[str, np.ndarray] = {}
    for path, array in checkpoint.iterate_params(directory):
        with np.errstate(over="ignore"):
            cast = array.astype(jnp.dtype(dtype or array.dtype), copy=False)
        if not np.isfinite(cast.astype(np.float32, copy=False)).all():
            raise UserError(f"{path} has values too large for {dtype}; choose another --dtype")
        parts[path] = cast
        complete = fused_with(family.tensors, path) if family else {path}
        if complete <= parts.keys():
            whole = {name: parts.pop(name) for name in complete}
            shard |= named_tensors(family.tensors, whole) if family else whole
        progress.advance(array.size)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def sentencepiece_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that makes Transformers return the same ids as a bare SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    ids["pad_token"] = model.pad_id()
    return {
        "tokenizer_class": "TokenizersBackend",  # LlamaTokenizer gives other ids for several spaces in a row
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        **{name: model.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0},
        "legacy": True,  # adds a space even before a text that starts with one, as SentencePiece does
        "add_prefix_space": tokenizer.pieces(tokenizer.encode("a"))[0].startswith(" "),
    }


def complete_tokenizer_settings(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Completes tokenizer_config.json, so that Transformers reads the tokenizer's own file.

    Without a class, it would build the tokenizer that it has for the model type from the vocabulary alone.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path, dict[str, Any]) if path.exists() else {}
    if tokenizer.path.name == SENTENCEPIECE_FILE:
        added = {} if path.exists() else sentencepiece_settings(tokenizer)
    else:
        added = {} if {"tokenizer_class", "auto_map"} & settings.keys() else {"tokenizer_class": READS_TOKENIZER_JSON}
    if added:
        write_text(path, json.dumps(settings | added, indent=2) + "\n")


def check_tokenizer(tokenizer: Tokenizer, family: Family) -> None:
    """Raises UserError if Transformers would tokenize differently, regardless of the folder's files."""
    byte_level = tokenizer.path.name != SENTENCEPIECE_FILE and b'"ByteLevel"' in tokenizer.path.read_bytes()
    if family.model_type in BYTE_LEVEL_TYPES and not byte_level:
        raise UserError(
            f"cannot export {tokenizer.path.name} with a {family.model_type} model: Transformers reads every "
            f"{family.model_type} folder with a byte-level tokenizer, and would give other token ids. Train with a "
            "byte-level tokenizer.json, or with another config.model.family"
        )


def special_ids(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of BOS, EOS and padding for config.json.

    Args:
      folder: the tokenizer's files. The config.json of an imported folder comes first; it may name several EOS tokens.
      tokenizer: source of the ids that no config.json gives.
    """
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.path.name == SENTENCEPIECE_FILE:
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
        named = {"bos_token_id": model.bos_id(), "pad_token_id": model.pad_id()}
        ids |= {name: token_id for name, token_id in named.items() if token_id >= 0}
    source = folder / "config.json"
    imported = read_json(source, dict[str, Any]) if source.exists() else {}
    kept = {name: imported[name] for name in SPECIAL_IDS if name in imported}
    return ids | kept | ({"eos_token_id": tokenizer.eos_id} if kept.get("eos_token_id") is None else {})


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


def open_trained(path: str, output: pathlib.Path) -> Pretrained:
    """Opens a checkpoint to export.

    Raises:
      UserError: `output` exists, there is no checkpoint, or it is a Hugging Face folder already.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    trained = Pretrained.open(path, "--checkpoint")
    if trained.folder:
        raise UserError(f"--checkpoint={path} already is a Hugging Face folder; there is nothing to export")
    return trained


def export_hf(path: str, output: pathlib.Path, dtype: str | None, verify: bool = False) -> int:
    """Writes config.json, safetensors and the tokenizer's files.

    Args:
      path: a run directory or one of its checkpoints.
      output: the folder to write, which must not exist.
      dtype: dtype of the tensors; None keeps that of the checkpoint.
      verify: compare token ids with those of Transformers before the folder is renamed to `output`.

    Returns:
      The number of parameters.

    Raises:
      UserError: there is no checkpoint, `output` exists, none of Hugging Face's families can express the model, or
        Transformers would tokenize differently.
    """
    trained = open_trained(path, output)
    directory, model, tokenizer = trained.path, trained.model, trained.tokenizer()
    hf_config.to_hf(model, "float32", None, 0)  # raises before anything is written
    check_tokenizer(tokenizer, family_of(model))
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    complete_tokenizer_settings(partial, tokenizer)
    count = param_count(model)
    with Progress(f"writing {output.name}", count, unit="params") as progress:
        written = write_weights(directory, partial, family_of(model), dtype, progress)
    config = hf_config.to_hf(model, written, tokenizer.bos_id, tokenizer.eos_id) | special_ids(partial, tokenizer)
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    if verify:
        verify_tokens(partial)
    partial.rename(output)
    return count


def export_raw(path: str, output: pathlib.Path, dtype: str | None) -> int:
    """Writes the parameters alone, as safetensors under their own names.

    Arguments and errors are those of `export_hf`.

    Returns:
      The number of parameters.
    """
    trained, partial = open_trained(path, output), output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = param_count(trained.model)
    with Progress(f"writing {output.name}", count, unit="params") as progress:
        write_weights(trained.path, partial, None, dtype, progress)
    partial.rename(output)
    return count


def export_weights(path: str, output: pathlib.Path, dtype: str | None) -> int:
    """Writes a run directory with one checkpoint, which holds the parameters and no optimizer state.

    Arguments and errors are those of `export_hf`.

    Returns:
      The number of parameters.
    """
    trained = open_trained(path, output)
    tokenizer, described = trained.tokenizer(), read_description(trained.path)
    count = param_count(trained.model)
    arrays: dict[str, np.ndarray] = {}
    with Progress(f"reading {trained.path.name}", count, unit="params") as progress:
        for shard in shards(trained.path, None, dtype, progress):
            arrays |= shard
    params = traverse_util.unflatten_dict(arrays, sep="/")
    write_parameters(output, params, described.meta._replace(pending=None), described.metrics, tokenizer)
    return count


def main() -> None:
    """The command: parses the flags and calls `export_hf`, `export_weights` or `export_raw`."""
    path = flags.DEFINE_string("checkpoint", None, "A run directory or one of its checkpoints.", required=True)
    output = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    dtype = flags.DEFINE_enum("dtype", None, list(DTYPES.values()), "Dtype of the tensors. Default: the checkpoint's.")
    weights_only = flags.DEFINE_bool("weights_only", False, "Write a checkpoint without optimizer state.")
    raw = flags.DEFINE_bool("raw", False, "Write only the parameters, with this package's names and shapes.")
    verify = flags.DEFINE_bool("verify", False, "Compare token ids with those of Transformers on several texts.")

    def command() -> None:
        start, folder = time.monotonic(), local_path(output.value, "--output")
        if raw.value + weights_only.value + verify.value > 1:
            raise UserError(
                "--raw, --weights_only and --verify exclude each other: only a Hugging Face folder can be "
                "compared with Transformers. Use one of them"
            )
        if raw.value:
            count = export_raw(path.value, folder, dtype.value)
        elif weights_only.value:
            count = export_weights(path.value, folder, dtype.value)
        else:
            count = export_hf(path.value, folder, dtype.value, verify.value)
        print(f"{output.value}: {count:,} parameters, {usage(start)}")

    run(command)


if __name__ == "__main__":
    main()
