"""Helpers for several test files: small models, batches and configs, and running commands as a user does."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import deque

import jax
import numpy as np
from safetensors.numpy import save_file

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data import manifest
from rho1_jax.data.packing import Batch
from rho1_jax.data.preparation import Options
from rho1_jax.method.selection import Selection
from rho1_jax.models import hf_config
from rho1_jax.models.families import FAMILIES
from rho1_jax.models.generation import Generator
from rho1_jax.models.hf_tensors import named_tensors
from rho1_jax.runtime.sharding import path_name

# The small model of the tests. Other keys have their defaults.
TINY = ModelConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, ff_width=48, context_length=64, loss_chunk=64
)
OPTIONS = Options(templates=("{text}",), transcripts=None, seq_len=16, eval_fraction=0.1, max_bad_fraction=0.0)
STEPS = 12
COMPILATION_CACHE = os.path.join(tempfile.gettempdir(), "rho1_jax_test_cache")


def tiny(**changes) -> ModelConfig:
    """TINY with changes."""
    return dataclasses.replace(TINY, **changes)


def selection_of(**changes) -> Selection:
    """The default selection rule, with changes."""
    return Selection(**changes)


# A small model of each family with switches of its own. Patterns over the layers end in the middle.
MODELS = {
    "gemma2": tiny(
        family="gemma2",
        layers=3,
        sliding_window=3,
        global_every=2,
        query_scale=5**-0.5,
        attention_soft_cap=2.0,
        logit_soft_cap=4.0,
    ),
    "gemma3": tiny(
        family="gemma3",
        layers=5,
        sliding_window=3,
        global_every=2,
        query_scale=8**-0.5,
        rope_local_theta=100.0,
        rope_scaling="linear",
        rope_factor=8.0,
        logit_soft_cap=5.0,
    ),
    "olmo2": tiny(family="olmo2", layers=2, tied_embeddings=False),
    "smollm3": tiny(family="smollm3", layers=5, no_rope_every=2),
    "gpt_neox": tiny(family="gpt_neox", kv_heads=4, rope_fraction=0.5, tied_embeddings=False),
    "granite": tiny(family="granite", embedding_scale=12.0, residual_scale=0.22, query_scale=0.25, logit_divisor=5.0),
    "phi3": tiny(
        family="phi3",
        sliding_window=9,
        rope_fraction=0.5,
        rope_scaling="long",
        rope_short_factors=(1.0, 1.5),
        rope_long_factors=(2.0, 30.0),
        rope_original_length=8,
        rope_attention_factor=1.2,
    ),
}
RUN_SETTINGS = {"compute_dtype": "float32", "attention": "auto", "remat": "none", "unroll": 1, "loss_chunk": 64}


def random_batch(rows: int, length: int, seed: int = 0, vocab_size: int = 64) -> Batch:
    """Random tokens [rows, length + 1] in documents of random lengths. Every third row ends in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab_size, (rows, length + 1), dtype=np.int32)
    segment_ids = 1 + np.cumsum(rng.random((rows, length + 1)) < 0.15, axis=1, dtype=np.int32)
    for row in range(0, rows, 3):
        padding = int(rng.integers(1, length // 2))
        tokens[row, -padding:] = 0
        segment_ids[row, -padding:] = 0
    return Batch(tokens, segment_ids)


def tensors(tree, family="llama") -> dict[str, np.ndarray]:
    """Parameters or their gradients, under Hugging Face's names and in its shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(named_tensors(FAMILIES[family].tensors, {path_name(path): np.asarray(leaf) for path, leaf in leaves}))


def write_hf_folder(path, config: ModelConfig, params, tokenizer):
    """Writes our parameters as a Hugging Face folder."""
    path.mkdir()
    save_file(tensors(params, config.family), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf_config.to_hf(config, "float32", None, tokenizer.eos_id)))
    tokenizer.save(path)
    return path


def continuations(graphdef, params, tokenizer, prompts, rows=None, **options) -> list[str]:
    """Continue all prompts, `rows` at a time, and return the texts in the order of the prompts."""
    answers = Generator(graphdef, params, tokenizer, rows or len(prompts)).run(deque(enumerate(prompts)), **options)
    return [text for _, text, *_ in sorted(answers)]


def options(**changes) -> Options:
    """OPTIONS without a held-out split, with changes."""
    return dataclasses.replace(OPTIONS, **{"eval_fraction": 0.0} | changes)


def write_jsonl(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def edit_manifest(folder: pathlib.Path, **changes) -> None:
    """Changes a manifest and gives it the checksum of its new content."""
    manifest.write(folder, json.loads((folder / "manifest.json").read_text()) | changes)


def config_of(stage, data, reference=""):
    config = default.get_config(stage)
    config.update(steps=STEPS, batch_size=8, log_every=2)
    sizes = {name: getattr(TINY, name) for name in ("width", "layers", "heads", "kv_heads", "head_width", "ff_width")}
    config.model.update(sizes)
    config.data.train = str(data)
    config.reference.checkpoint = str(reference)
    config.optimizer.update(learning_rate=1e-2, warmup_fraction=0.25)
    config.eval.update(every=5, data=f"held_out={data}", rows=16)
    config.checkpoint.every = 4
    return config


def root() -> pathlib.Path:
    return pathlib.Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """The variables of a command. Commands share compiled programs with each other and with the tests."""
    cache = {"JAX_COMPILATION_CACHE_DIR": COMPILATION_CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return {**os.environ, **cache, "PYTHONPATH": str(root())}


def run_command(module, *arguments, seconds=300, stdin=None):
    command, options = [sys.executable, "-m", module, *arguments], {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=root(), env=environment(), timeout=seconds, input=stdin, **options)
