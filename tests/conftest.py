"""Eight simulated devices, and what several test files share."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections import deque

import jax
import numpy as np
import pytest
from absl import logging

from configs import default
from rho1_jax import model
from rho1_jax.data.packing import Batch
from rho1_jax.data.prepare import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.generate import Generator
from rho1_jax.model import ModelConfig
from rho1_jax.selection import Selection
from rho1_jax.sharding import path_name
from rho1_jax.train import train
from rho1_jax.weights import named_tensors
from tools.train_tokenizer import train_tokenizer

logging.set_verbosity(logging.ERROR)
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "rho1_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    ff_width=48,
    context_length=64,
    rope_theta=10_000.0,
    rope_factor=1.0,
    rope_low_frequency_factor=1.0,
    rope_high_frequency_factor=4.0,
    rope_original_length=8192,
    norm_eps=1e-5,
    tied_embeddings=True,
    sliding_window=None,
    compute_dtype="float32",
    attention="auto",
    remat="none",
    unroll=1,
    loss_chunk=64,
)


def tiny(**changes) -> ModelConfig:
    """The tests' small model, with changes."""
    return dataclasses.replace(TINY, **changes)


def selection_of(**changes) -> Selection:
    """The default selection rule, with changes."""
    return Selection(**default.get_config("slm").selection.to_dict() | changes)


def random_batch(rows: int, length: int, seed: int = 0, vocab_size: int = 64) -> Batch:
    """Rows of random tokens, [rows, length + 1]: documents of random lengths, some rows with padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab_size, (rows, length + 1), dtype=np.int32)
    segment_ids = 1 + np.cumsum(rng.random((rows, length + 1)) < 0.15, axis=1, dtype=np.int32)
    for row in range(0, rows, 3):
        padding = int(rng.integers(1, length // 2))
        tokens[row, -padding:] = 0
        segment_ids[row, -padding:] = 0
    return Batch(tokens, segment_ids)


@pytest.fixture(scope="session")
def params():
    """Parameters of the small model, and of another seed, to stand for a reference."""
    return model.init_params(TINY, 0), model.init_params(TINY, 1)


def tensors(tree) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under Hugging Face's names and shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(pair for path, leaf in leaves for pair in named_tensors(path_name(path), np.asarray(leaf)))


def continuations(graphdef, params, tokenizer, prompts, rows=None, **options) -> list[str]:
    """Of all prompts, in their order, so many at a time."""
    found = Generator(graphdef, params, tokenizer, rows or len(prompts)).run(deque(enumerate(prompts)), **options)
    return [text for _, text in sorted(found)]


def write_jsonl(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A JSON lines file of 300 short documents."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(300):
        a, b = rng.integers(0, 50, 2)
        texts.append(f"Document {number}: {a}+{b}={a + b}.\n" + "and so on, " * int(rng.integers(1, 6)))
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([corpus], path, vocab_size=300, templates=["{text}"], max_sentences=1000)
    return Tokenizer(path)


OPTIONS = Options(templates=("{text}",), transcripts=None, seq_len=16, eval_fraction=0.1, max_bad_fraction=0.0)


@pytest.fixture(scope="session")
def data(corpus, tokenizer, tmp_path_factory) -> pathlib.Path:
    """The corpus as a prepared data set of rows of 16 targets, a tenth of it held out."""
    output = tmp_path_factory.mktemp("data") / "rows"
    prepare([corpus], tokenizer, output, OPTIONS, workers=1)
    return output


STEPS = 12


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
    return {**os.environ, "PYTHONPATH": str(root())}


def run_command(module, *arguments, seconds=300):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=root(), env=environment(), capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """A reference's run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    train(config_of("reference", data), workdir)
    return workdir
