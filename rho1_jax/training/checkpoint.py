"""Checkpoints through Orbax: written asynchronously and atomically, and verified when they are read.

A checkpoint holds parameters, optimizer state, a moving reference and a JSON description, each readable on its own:

    WORKDIR/checkpoints/STEP/params  .../opt_state  [.../reference]  .../meta

The description has the shape, dtype and checksum of every array, and a checksum of itself.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.tokenizer import TOKENIZER_DIR
from rho1_jax.models.decoder import Params, abstract_params
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, write_text
from rho1_jax.runtime.processes import gather_json, is_first, say
from rho1_jax.runtime.sharding import param_shardings
from rho1_jax.training.checksums import (
    check_finite,
    checksums,
    named_leaves,
    non_finite_message,
    numpy_checksum,
    shape_text,
)
from rho1_jax.training.description import META_FILE, DamagedCheckpoint, Description, Meta, StoredArray, read_description
from rho1_jax.training.quiet_orbax import hide_complaints, one_line
from rho1_jax.training.retention import KeepBest, best_step, retention_policy
from rho1_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"
BEST = "best"  # WORKDIR/best names the best checkpoint; nothing of that name is written

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: pathlib.Path, keep: int, keep_every: int = 0, best: str = ""):
        """Nothing is written before the first `save`.

        Args:
          workdir: directory of the run.
          keep: newest checkpoints to keep; 0: all.
          keep_every: keep the checkpoints of every K-th step as well; 0: none.
          best: keep the best checkpoint by this metric as well; "": none.
        """
        self._workdir, self._keep, self._keep_every = workdir, keep, keep_every
        self._best = KeepBest(best, {}) if best else None

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Created on first use, when damaged checkpoints have been renamed, since it would count them."""
        for step in steps(self._workdir) if self._best else ():
            with contextlib.suppress(DamagedCheckpoint):
                self._evaluated(step, read_description(at(self._workdir, step)).metrics)
        hide_complaints()
        return ocp.CheckpointManager(
            (self._workdir / CHECKPOINTS).absolute(),
            item_names=("params", "opt_state", "reference", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention_policy(self._keep, self._keep_every, self._best),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # skips files of Orbax that may be damaged
            ),
        )

    def _evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._best and self._best.metric in metrics:
            self._best.values[step] = metrics[self._best.metric]

    def newest(self, abstract: TrainState, check: Callable[[Meta], None]) -> tuple[TrainState, Meta] | None:
        """Restores the newest intact checkpoint; None if the run has no checkpoint.

        Damaged ones are reported and renamed to STEP.damaged, but only if there is an older one to use instead.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          check: raises UserError if a checkpoint belongs to another run.

        Raises:
          UserError: every checkpoint is damaged, or the newest one that can be read has no optimizer state or is
            refused by `check`.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        saved_steps = gather_json(steps(self._workdir))[0]  # a shared file system may show others an older list
        for step in reversed(saved_steps):
            try:
                meta = _load_meta_together(at(self._workdir, step))
                _check_resumable(at(self._workdir, step))
                check(meta)
                state = self.restore(step, abstract)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for damaged_step, damage in damaged.items():
                self._set_aside(damaged_step, damage)
            return state, meta
        if damaged:
            newest = max(damaged)
            raise UserError(
                f"cannot resume: every checkpoint in {self._workdir / CHECKPOINTS} is damaged, the newest one "
                f"({newest}) because {damaged[newest].problem}. Restore one from a copy, or use a new --workdir"
            )
        return None

    def _set_aside(self, step: int, error: DamagedCheckpoint) -> None:
        checkpoint = at(self._workdir, step)
        name, number = f"{step}.damaged", 0
        while (checkpoint.parent / name).exists():
            number += 1
            name = f"{step}.damaged.{number}"
        multihost_utils.sync_global_devices(f"named {name}")
        if is_first():
            checkpoint.rename(checkpoint.parent / name)
        multihost_utils.sync_global_devices(f"renamed {name}")
        say(f"{checkpoint} is damaged: {error.problem}; renamed it to {name}")

    def save(self, state: TrainState, meta: Meta, metrics: Mapping[str, float]) -> None:
        """Starts to save. The arrays may be donated once this returns. Skips items of the state that are None.

        Args:
          state: the state after `meta.step` updates.
          meta: the description of the run.
          metrics: the evaluations at this step; {} if there were none.

        Raises:
          UserError: this checkpoint, or the one before, cannot be written.
        """
        items = _items(state)
        arrays = {}
        for item, tree in items.items():
            sums = checksums(tree)
            for name, leaf in named_leaves(tree).items():
                arrays[f"{item}/{name}"] = StoredArray(str(leaf.dtype), leaf.shape, sums[name])
        described = Description(meta, arrays, metrics).as_json()
        arguments = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        self._evaluated(meta.step, metrics)
        with self._reporting_failure():
            self._manager.save(meta.step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(described)))

    def add_evaluations(self, meta: Meta, metrics: Mapping[str, float]) -> None:
        """Adds the evaluations at `meta.step` to its checkpoint, which was written before they were made."""
        self._evaluated(meta.step, metrics)
        if is_first():
            checkpoint = at(self._workdir, meta.step)
            described = read_description(checkpoint)._replace(meta=meta, metrics=metrics)
            write_text(checkpoint / META_FILE, json.dumps(described.as_json()))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores a step, in the shapes, dtypes and shardings of the abstract state.

        Raises:
          DamagedCheckpoint: an array cannot be read or does not match its checksum.
          UserError: the arrays are not those of the abstract state.
        """
        checkpoint = at(self._workdir, step)
        arrays = read_description(checkpoint).arrays
        items = {item: _restore(checkpoint, arrays, item, tree) for item, tree in _items(abstract).items()}
        return TrainState(jax.device_put(jnp.int32(step), abstract.step.sharding), **items)

    def close(self) -> None:
        """Waits until everything is on disk. Raises UserError if a checkpoint cannot be written."""
        if "_manager" not in vars(self):  # nothing was saved; to create it now, all processes would have to be here
            return
        with self._reporting_failure():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turns any error that Orbax raises while it writes into a UserError."""
        try:
            yield
        except Exception as error:
            complete_steps = steps(self._workdir)
            last = f"the last complete one is step {complete_steps[-1]}" if complete_steps else "none is complete"
            raise UserError(
                f"cannot write a checkpoint to {self._workdir / CHECKPOINTS}: {one_line(error)}; {last}"
            ) from error


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved: all except the step."""
    return {name: item for name, item in state._asdict().items() if name != "step" and item is not None}


def find(path: str | pathlib.Path, key: str) -> pathlib.Path:
    """The checkpoint directory that a path names: the newest or the best one of a run, or itself.

    Args:
      path: WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP.
      key: the config key or flag the path came from, for errors.

    Raises:
      UserError: there is no checkpoint, or the run does not keep the best one.
    """
    directory = local_path(path, key).absolute()
    if (directory / "meta").is_dir():
        return directory
    if directory.name == BEST and not directory.exists() and steps(workdir := directory.parent):
        return at(workdir, best_step([read_description(at(workdir, step)) for step in steps(workdir)], f"{key}={path}"))
    saved_steps = steps(directory)
    if not saved_steps:
        kinds = "a run's directory, nor one of its checkpoints, nor a Hugging Face folder with safetensors"
        raise UserError(f"{key}={path} is neither {kinds}")
    return at(directory, saved_steps[-1])


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints, ascending. Those renamed to STEP.damaged are left out."""
    return sorted(int(child.name) for child in (workdir / CHECKPOINTS).glob("*") if child.name.isdecimal())


def at(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint directory of a run's step."""
    return workdir.absolute() / CHECKPOINTS / str(step)


def load_meta(checkpoint: pathlib.Path) -> Meta:
    """The description of a checkpoint's run. Raises UserError if it is damaged or this version cannot read it."""
    return read_description(checkpoint).meta


def _load_meta_together(checkpoint: pathlib.Path) -> Meta:
    """`load_meta` in all processes. Raises DamagedCheckpoint in every process if it does in one."""
    try:
        meta, problem = load_meta(checkpoint), ""
    except DamagedCheckpoint as error:
        problem = error.problem
    _raise_together(checkpoint, problem, "the description")
    return meta


def _check_resumable(checkpoint: pathlib.Path) -> None:
    """Raises UserError if a checkpoint was written without optimizer state."""
    arrays = read_description(checkpoint).arrays
    if arrays is not None and not any(name.startswith("opt_state/") for name in arrays):
        raise UserError(
            f"{checkpoint} holds weights only, so no run can be resumed from it; start a new run from it, with "
            f"config.init.checkpoint={checkpoint} and another --workdir"
        )


def stored_arrays(
    checkpoint: pathlib.Path, arrays: Mapping[str, StoredArray] | None, item: str
) -> dict[str, StoredArray]:
    """The arrays of an item, by path. Before format 3, as Orbax describes them."""
    if arrays is not None:
        return {name.removeprefix(f"{item}/"): array for name, array in arrays.items() if name.startswith(f"{item}/")}
    tree = _read(checkpoint, item, lambda: ocp.StandardCheckpointHandler().metadata(checkpoint.absolute() / item).tree)
    return {name: StoredArray(str(leaf.dtype), leaf.shape, None) for name, leaf in named_leaves(tree).items()}


def _restore(checkpoint: pathlib.Path, arrays: Mapping[str, StoredArray] | None, item: str, abstract: Any) -> Any:
    """Restores an item as it was stored, verifies it, and casts it to the dtypes of the abstract tree.

    Raises:
      DamagedCheckpoint: it cannot be read, or an array does not match its checksum.
      UserError: its arrays are not those of the abstract tree.
    """
    stored, wanted = stored_arrays(checkpoint, arrays, item), named_leaves(abstract)
    for name in sorted(stored.keys() | wanted.keys()):
        there = shape_text("", stored[name].shape) if name in stored else "missing"
        here = shape_text("", wanted[name].shape) if name in wanted else "missing"
        if there != here:
            sizes = f"{item}/{name} is {there} in the file, but {here} in the model"
            raise UserError(f"{checkpoint} does not fit the model: {sizes}")
    leaves, structure = jax.tree.flatten(abstract)
    as_stored = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(stored[name].dtype), sharding=leaf.sharding)
        for name, leaf in wanted.items()
    ]
    target = ocp.args.StandardRestore(jax.tree.unflatten(structure, as_stored))
    directory = checkpoint.absolute() / item
    restored = jax.tree.leaves(
        _read(checkpoint, item, lambda: ocp.StandardCheckpointHandler().restore(directory, args=target))
    )
    if arrays is not None:
        sums = checksums(dict(zip(wanted, restored)))
        for name, array in stored.items():
            if sums[name] != array.checksum:
                raise DamagedCheckpoint(checkpoint, f"{item}/{name} does not match its checksum")
    for number, leaf in enumerate(leaves):  # one by one, so that each is freed before the next is cast
        if restored[number].dtype != leaf.dtype:
            on_device = jax.device_put(restored[number], jax.memory.Space.Device)
            restored[number] = jax.device_put(on_device.astype(leaf.dtype), leaf.sharding)
    return jax.tree.unflatten(structure, restored)


def _read(checkpoint: pathlib.Path, item: str, read: Callable[[], T]) -> T:
    """Reads an item through Orbax. Raises DamagedCheckpoint in every process if it fails in one.

    Orbax and TensorStore raise all kinds of errors for damaged files. Running out of memory is not damage.
    """
    hide_complaints()
    problem = ""
    try:
        result = read()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        problem = f"cannot read {item}: {one_line(error)}"
    _raise_together(checkpoint, problem, item)
    return result


def _raise_together(checkpoint: pathlib.Path, problem: str, part: str) -> None:
    """Raises DamagedCheckpoint in every process if one of them has a problem with a part of a checkpoint."""
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(problem))).any():
        problem = problem or f"another process cannot read {part}"
    if problem:
        raise DamagedCheckpoint(checkpoint, problem)


def load_params(checkpoint: pathlib.Path, config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameters of a checkpoint directory in a dtype, on the mesh.

    Raises:
      UserError: they are damaged, are not those of a model of this config, or contain NaN or infinity.
    """
    wanted = abstract_params(config)
    shardings = param_shardings(wanted, mesh)
    wanted = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=s), wanted, shardings)
    params = _restore(checkpoint, read_description(checkpoint).arrays, "params", wanted)
    check_finite(params, checkpoint)
    return params


def tokenizer_path(checkpoint: pathlib.Path) -> pathlib.Path:
    """The folder of the tokenizer that a run keeps beside its checkpoints."""
    return checkpoint.parent.parent / TOKENIZER_DIR


def iterate_params(checkpoint: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the path and array of each parameter in a checkpoint, as stored, with one in memory at a time.

    Raises:
      UserError: an array is damaged, or contains NaN or infinity.
    """
    handler, directory = ocp.PyTreeCheckpointHandler(), checkpoint.absolute() / "params"
    for name, stored in stored_arrays(checkpoint, read_description(checkpoint).arrays, "params").items():
        only_this: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(name.split("/")):
            only_this = {key: only_this}
        item = jax.tree.map(lambda _: 0, only_this, is_leaf=lambda x: isinstance(x, ocp.RestoreArgs))
        arguments = ocp.args.PyTreeRestore(item, restore_args=only_this, partial_restore=True)
        (array,) = jax.tree.leaves(
            _read(checkpoint, "params", functools.partial(handler.restore, directory, args=arguments))
        )
        if stored.checksum is not None and numpy_checksum(array) != stored.checksum:
            raise DamagedCheckpoint(checkpoint, f"params/{name} does not match its checksum")
        if not np.isfinite(array).all():
            raise UserError(non_finite_message(checkpoint, [name]))
        yield name, array


def verify(checkpoint: pathlib.Path) -> int:
    """Reads every array of a checkpoint, with one item in memory at a time, and compares it with its checksum.

    Returns:
      The number of arrays compared; 0 if an older version wrote the checkpoint, without checksums.

    Raises:
      DamagedCheckpoint: an array is missing, cannot be read or does not match its checksum.
    """
    arrays, handler = read_description(checkpoint).arrays or {}, ocp.PyTreeCheckpointHandler()
    for item in sorted({name.partition("/")[0] for name in arrays}):
        directory = checkpoint.absolute() / item
        stored = _read(checkpoint, item, functools.partial(handler.metadata, directory)).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        arguments = ocp.args.PyTreeRestore(restore_args=as_numpy)
        tree = _read(checkpoint, item, functools.partial(handler.restore, directory, args=arguments))
        leaves = named_leaves(tree)
        for name, array in stored_arrays(checkpoint, arrays, item).items():
            if name not in leaves or numpy_checksum(np.asarray(leaves[name])) != array.checksum:
                raise DamagedCheckpoint(checkpoint, f"{item}/{name} does not match its checksum")
    return len(arrays)
