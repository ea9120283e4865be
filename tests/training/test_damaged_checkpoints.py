"""A damaged checkpoint is never used: it is named, and the one before it is restored."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from rho1_jax.configs import default
from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checkpoint
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import as_saved
from rho1_jax.training.optimizer import make_optimizer
from rho1_jax.training.state import TrainState

ADAMW = make_optimizer(OptimizerConfig(), 1e-2)
NEWEST, BEFORE = 4, 3
# Part of a file's path -> how many of the damages below go into each such file.
KINDS = {
    "meta/metadata": 4,
    "params/_METADATA": 1,
    "params/_sharding": 1,
    "params/manifest.ocdbt": 1,
    "params/array_metadatas": 1,
    "params/d/": 1,
    "params/ocdbt.process_0/manifest.ocdbt": 1,
    "params/ocdbt.process_0/d/": 1,
    "opt_state/_METADATA": 1,
    "opt_state/manifest.ocdbt": 1,
    "opt_state/ocdbt.process_0/d/": 1,
    "reference/d/": 1,
    "reference/ocdbt.process_0/d/": 1,
    f"{NEWEST}/_CHECKPOINT_METADATA": 1,
    "commit_success.txt": 1,
}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    """A run with two checkpoints, and the state in each."""
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    checkpoints, states = Checkpoints(workdir, keep=2), {}
    for step in (BEFORE, NEWEST):
        weights = jax.tree.map(lambda x, step=step: x * step, params[0])
        states[step] = TrainState(jnp.int32(step), weights, ADAMW.init(weights), params[1])
        states[step].opt_state[1][0].mu["embedding"] += weights["embedding"]
        meta = Meta(step, 100 * step, 60 * step, as_saved(default.get_config()), [], "t", None)
        checkpoints.save(states[step], meta, {})
    checkpoints.close()
    return workdir, states


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.integers(1, path.stat().st_size)])


def half_zeros(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(path, rng):
    path.write_bytes(b"")


def remove(path, rng):
    path.unlink()
