"""Checkpoints through Orbax: written asynchronously and atomically; the newest ones are kept.

A checkpoint holds parameters, optimizer state, a moving reference and a JSON description, each readable on its own:

    WORKDIR/checkpoints/STEP/params  .../opt_state  [.../reference]  .../meta
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import TOKENIZER_DIR
from rho1_jax.models.decoder import Params, abstract_params
from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.sharding import param_shardings, path_name
from rho1_jax.training.config import complete
from rho1_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"


class Meta(NamedTuple):
    """A checkpoint's description of its run.

    Attributes:
      step: updates done.
      tokens_seen: target positions that went through the policy, padding included.
      tokens_selected: target positions that were trained on.
      config: the resolved config.
      data: fingerprint and weight of each data set of the mixture.
      tokenizer: fingerprint of the tokenizer.
      reference: path and fingerprint of the reference model; None if the run has none.
      format_version: of what is on disk, see `runtime.formats`.
      permuted_rows: True if the rows of a step are permuted; older runs keep their order.
      health: of the run so far, as `training.health.Health` counts it; None: no step was made.
      pending: what is logged of the last step, if its evaluation is still to do.
    """

    step: int
    tokens_seen: int
    tokens_selected: int
    config: dict[str, Any]
    data: list[dict[str, Any]]
    tokenizer: str
    reference: dict[str, str] | None
    format_version: int = formats.FORMAT_VERSION
    permuted_rows: bool = False
    health: dict[str, Any] | None = None
    pending: dict[str, float] | None = None

    @classmethod
    def read(cls, stored: dict[str, Any], where: object) -> "Meta":
        """The description as any version so far stored it.

        Raises:
          UserError: a newer version wrote it, or its config has a key that this version does not know.
        """
        formats.check_format(stored, where)
        return cls(**stored | {"config": complete(stored["config"], str(where)), formats.KEY: formats.FORMAT_VERSION})


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            item_names=("params", "opt_state", "reference", "meta"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep or None, cleanup_tmp_directories=True),
        )

    def latest_meta(self) -> Meta | None:
        """The description of the newest complete checkpoint; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        stored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return Meta.read(stored, self._manager.directory / str(step))

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts to save. The arrays may be donated once this returns. Skips what is None in the state."""
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        self._manager.save(meta.step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta._asdict())))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores a step, in the shapes, dtypes and shardings of the abstract state."""
        items = {name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        count = jax.device_put(jnp.int32(step), abstract.step.sharding)
        return TrainState(count, **{name: restored[name] for name in items})

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved: all but the step."""
    return {name: item for name, item in state._asdict().items() if name != "step" and item is not None}


def find(path: str | pathlib.Path, key: str) -> pathlib.Path:
    """The checkpoint directory that a path names: the newest one of a run, or itself.

    Args:
      path: WORKDIR or WORKDIR/checkpoints/STEP.
      key: the config key or flag the path came from, for errors.

    Raises:
      UserError: there is no checkpoint.
    """
    directory = local_path(path, key).absolute()
    if (directory / "meta").is_dir():
        return directory
    saved_steps = steps(directory)
    if not saved_steps:
        raise UserError(f"{key}={path}: no checkpoint here; give a run's directory or one of its checkpoints")
    return at(directory, saved_steps[-1])


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(child.name) for child in (workdir / CHECKPOINTS).glob("*") if child.name.isdigit())


def at(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint directory of a run's step."""
    return workdir.absolute() / CHECKPOINTS / str(step)


def load_meta(checkpoint: pathlib.Path) -> Meta:
    """The description of a checkpoint directory. Raises UserError if this version cannot read it."""
    return Meta.read(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(checkpoint.absolute() / "meta"), checkpoint)


def load_params(checkpoint: pathlib.Path, config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameters of a checkpoint directory in a dtype, on the mesh.

    Raises:
      UserError: they are not those of a model of this config.
    """
    wanted = abstract_params(config)
    shardings = param_shardings(wanted, mesh)
    wanted = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=s), wanted, shardings)
    try:
        return ocp.StandardCheckpointer().restore(checkpoint.absolute() / "params", wanted)
    except ValueError as error:
        raise UserError(f"{checkpoint}: does not fit the model: {' '.join(str(error).split())[:300]}") from error


def tokenizer_path(checkpoint: pathlib.Path) -> pathlib.Path:
    """The folder of the tokenizer that a run keeps beside its checkpoints."""
    return checkpoint.parent.parent / TOKENIZER_DIR


def iterate_params(checkpoint: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Path and array, as stored, of each parameter of a checkpoint directory; one in memory at a time."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    directory = checkpoint.absolute() / "params"
    stored = handler.metadata(directory).item_metadata.tree
    for path, _ in jax.tree_util.tree_flatten_with_path(stored)[0]:
        only_this: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(path):
            only_this = {key.key: only_this}
        item = jax.tree.map(lambda _: 0, only_this, is_leaf=lambda x: isinstance(x, ocp.RestoreArgs))
        arguments = ocp.args.PyTreeRestore(item, restore_args=only_this, partial_restore=True)
        restored = handler.restore(directory, arguments)
        yield path_name(path), jax.tree.leaves(restored)[0]


@jax.jit
def _checksums(params: Params) -> Params:
    def checksum(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        index = jnp.arange(math.prod(leaf.shape), dtype=jnp.uint32).reshape(leaf.shape)
        mixed = (bits ^ (index * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        return (mixed ^ (mixed >> 15)).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, params)


def fingerprint(params: Params) -> str:
    """A hash, in hex, of the names, shapes, dtypes and bits of parameters, the same on every mesh.

    The sums are integers modulo 2**32, so their order does not matter.
    """
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(params)))[0]
    shapes = jax.tree.leaves(jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", params))
    described = [(path_name(path), shape, int(checksum)) for (path, checksum), shape in zip(leaves, shapes)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
