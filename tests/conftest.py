"""Eight simulated devices or, with TEST_ON_GPU=1, the GPUs; and fixtures for several test files."""

import importlib.util
import os
import pathlib

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
ON_GPU = os.environ.get("TEST_ON_GPU") == "1"
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if ON_GPU else "cpu"
if ON_GPU:  # leave memory for the commands that tests run
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import hypothesis
import jax
import numpy as np
import pytest
from absl import logging
from helpers import COMPILATION_CACHE, OPTIONS, TINY, config_of, write_jsonl

from rho1_jax.data.preparation import prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models import decoder
from rho1_jax.train import train_model
from rho1_jax.train_tokenizer import train_tokenizer

logging.set_verbosity(logging.ERROR)
jax.config.update("jax_compilation_cache_dir", COMPILATION_CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# `make test-faults` sets HYPOTHESIS_PROFILE=faults, and the number of examples.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile(
    "faults", deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 20_000)), derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Only `make test-peers` installs the libraries these tests need. Elsewhere `pytest -m peers` finds no tests and fails.
collect_ignore = [] if importlib.util.find_spec("torch") else ["peers"]
# Only `make test-gpu` sets TEST_ON_GPU. Without it, `pytest -m gpu` finds no tests and fails.
collect_ignore += [] if ON_GPU else ["gpu"]


@pytest.fixture(scope="session")
def params():
    """Parameters of the small model from two seeds: policy and reference."""
    return decoder.init_params(TINY, 0), decoder.init_params(TINY, 1)


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


@pytest.fixture(scope="session")
def data(corpus, tokenizer, tmp_path_factory) -> pathlib.Path:
    """The corpus as a prepared data set: rows of 16 targets, a tenth of the documents held out."""
    output = tmp_path_factory.mktemp("data") / "rows"
    prepare([corpus], tokenizer, output, OPTIONS, workers=1)
    return output


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """The workdir of a trained reference."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    train_model(config_of("reference", data), workdir)
    return workdir
