"""The device mesh, and one table that says how every parameter lies on it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.processes import say

AXES = ("data", "fsdp", "tensor")

# Rows of a batch are spread over both of these; parameters are spread over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")

HOST_MEMORY = "pinned_host"

# Parameter path (the end of it) -> how its axes lie on the mesh. Layers carry a leading axis N.
RULES = {
    r"embedding": PartitionSpec("tensor", "fsdp"),
    r"head": PartitionSpec("tensor", "fsdp"),
    r"attention/[qkv]": PartitionSpec(None, "fsdp", "tensor", None),
    r"attention/[qkv]_bias": PartitionSpec(None, "tensor", None),
    r"attention/[qk]_norm/scale": PartitionSpec(),
    r"attention/o": PartitionSpec(None, "tensor", None, "fsdp"),
    r"feed_forward/(gate|up)": PartitionSpec(None, "fsdp", "tensor"),
    r"feed_forward/down": PartitionSpec(None, "tensor", "fsdp"),
    r"norm/scale": PartitionSpec(),
    r"layers/\w+_norm/scale": PartitionSpec(),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. One of the three sizes may be -1: whatever the others leave.

    Between TPU slices, which only the data-centre network connects, lies the axis `data` alone.

    Args:
      data: copies of the model.
      fsdp: devices that share parameters, gradients and optimizer state.
      tensor: devices that share heads, feed-forward width and vocabulary.
      devices: those to take, in place of all there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        wanted = f"data={data}, fsdp={fsdp}, tensor={tensor}"
        raise UserError(f"config.mesh ({wanted}) does not fit {len(devices)} devices: the sizes must multiply to that")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise UserError(f"config.mesh.data={sizes[0]} must be a multiple of the {slices} slices")
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of_run(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh that a run was trained on; where the devices at hand are others, all of them along `fsdp`."""
    try:
        return make_mesh(data, fsdp, tensor)
    except UserError as error:
        say(f"{error}; here the model is spread over all of them")
        return make_mesh(data=1, fsdp=-1, tensor=1)


def path_name(path: tuple) -> str:
    """A pytree path as text: layers/attention/q."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    specs = {spec for pattern, spec in RULES.items() if re.search(rf"(^|/){pattern}$", name)}
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} sharding rules match {name}: sharding.RULES must hold exactly one")
    spec = specs.pop()
    taken = [axis for axis in spec if axis is not None]
    if len(set(taken)) < len(taken):
        raise ValueError(f"the sharding rule {spec} of {name} takes one mesh axis for two of its own")
    for size, axis in zip(shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} has an axis of {size}, which config.mesh.{axis}={mesh.shape[axis]} does not divide"
            )
    return spec


def param_shardings(tree, mesh: Mesh):
    """The shardings of a pytree of parameters, or of an optimizer state that holds trees of their shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition_spec(path_name(path), leaf.shape, mesh)), tree
    )


def on_host(shardings):
    """The same shardings in the host's memory, but for scalars.

    Raises:
      UserError: the devices have no such memory.
    """
    devices = jax.tree.leaves(shardings)[0].mesh.devices.flat
    if devices[0].platform != "tpu" and HOST_MEMORY not in {
        memory.kind for memory in devices[0].addressable_memories()
    }:
        raise UserError(f"config.optimizer.host_offload: {devices[0].platform} devices have no memory {HOST_MEMORY!r}")
    return jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY) if s.spec else s, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] spread over the data axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of the rows 0 to `rows` of a global batch lie on this process's devices, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_is_set() -> bool:
    """Whether this is traced under `jax.set_mesh`."""
    return not jax.sharding.get_abstract_mesh().empty


def shard_activations(hidden_BLD: jax.Array) -> jax.Array:
    """Keeps rows on the data axes, wherever a mesh is set; otherwise returns its argument.

    Rows of one token, as in decoding, lie as the weights do: then the states cross the mesh and not the weights.
    """
    spec = PartitionSpec(BATCH_AXES) if hidden_BLD.shape[1] > 1 else PartitionSpec("data", None, "fsdp")
    return jax.lax.with_sharding_constraint(hidden_BLD, spec) if mesh_is_set() else hidden_BLD


def even_rows(rows: int) -> int:
    """So many rows, or as few more as the mesh can spread evenly, where one is set."""
    shape = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(shape[axis] for axis in BATCH_AXES) if mesh_is_set() else 1
    return -(-rows // shards) * shards


def shard_cache(cache: jax.Array) -> jax.Array:
    """Keeps rows on the data axes and key/value heads on `tensor`, [B, K, ...], wherever a mesh is set."""
    return jax.lax.with_sharding_constraint(cache, PartitionSpec(BATCH_AXES, "tensor")) if mesh_is_set() else cache


def replicate(x: jax.Array) -> jax.Array:
    """Keeps a whole copy on every device, so that every process can read it, wherever a mesh is set."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh_is_set() else x


def on_mesh(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function on each device's part of the arguments; on the whole of them where no mesh is set."""
    if not mesh_is_set():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
