"""The device mesh, and one table that says how every parameter is sharded over it."""

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

# Rows of a batch are sharded over these two axes, parameters over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")
ROWS = PartitionSpec(BATCH_AXES)  # arrays [B, L, ...]
HEADS = PartitionSpec(BATCH_AXES, None, "tensor")  # arrays [B, L, H, C] and [B, L, F]

HOST_MEMORY = "pinned_host"

# Pattern of the end of a parameter path -> the mesh axes its own axes are sharded over. Layers have a leading axis N.
# Exactly one pattern must match each parameter.
RULES = {
    r"embedding": PartitionSpec("tensor", "fsdp"),
    r"head": PartitionSpec("tensor", "fsdp"),
    r"attention/[qkv]": PartitionSpec(None, "fsdp", "tensor", None),
    r"attention/[qkv]_bias": PartitionSpec(None, "tensor", None),
    r"attention/o_bias": PartitionSpec(),
    r"attention/[qk]_norm/scale": PartitionSpec(),
    r"attention/o": PartitionSpec(None, "tensor", None, "fsdp"),
    r"feed_forward/(gate|up)": PartitionSpec(None, "fsdp", "tensor"),
    r"feed_forward/down": PartitionSpec(None, "tensor", "fsdp"),
    r"feed_forward/(gate|up)_bias": PartitionSpec(None, "tensor"),
    r"feed_forward/down_bias": PartitionSpec(),
    r"norm/(scale|bias)": PartitionSpec(),
    r"layers/\w+_norm/(scale|bias)": PartitionSpec(),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over all devices. One of the three sizes may be -1: all devices that the others leave.

    Only the axis `data` crosses TPU slices, because only the data-center network connects them.

    Args:
      data: copies of the model.
      fsdp: devices that share parameters, gradients and optimizer state.
      tensor: devices that share heads, feed-forward width and vocabulary.
      devices: the devices to use instead of all.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        mesh = f"mesh (data={data}, fsdp={fsdp}, tensor={tensor})"
        raise UserError(f"{mesh} does not fit {len(devices)} devices: the sizes must multiply to that number")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise UserError(f"mesh axis data={sizes[0]} must be a multiple of the {slices} slices")
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of_run(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh a run was trained on or, if it does not fit the devices, a mesh with all of them along `fsdp`."""
    try:
        return make_mesh(data, fsdp, tensor)
    except UserError as error:
        say(f"{error}; sharding the model over all of them instead")
        return make_mesh(data=1, fsdp=-1, tensor=1)


def path_name(path: tuple) -> str:
    """A pytree path as text, such as layers/attention/q."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    specs = [spec for pattern, spec in RULES.items() if re.search(rf"(^|/){pattern}$", name)]
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} sharding rules match {name}: sharding.RULES must have exactly one")
    (spec,) = specs
    mesh_axes = [axis for axis in spec if axis is not None]
    if len(set(mesh_axes)) < len(mesh_axes):
        raise ValueError(f"the sharding rule {spec} of {name} uses one mesh axis for two axes")
    for size, axis in zip(shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} has an axis of {size}, which mesh axis {axis}={mesh.shape[axis]} does not divide; "
                f"choose another size for {axis}"
            )
    return spec


def param_shardings(tree, mesh: Mesh):
    """Shardings of a pytree of parameters, or of an optimizer state that contains trees of their shape.

    Raises:
      UserError: the mesh does not divide an axis of a parameter.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition_spec(path_name(path), leaf.shape, mesh)), tree
    )


def on_host(shardings):
    """The same shardings in host memory, except for scalars.

    Raises:
      UserError: the devices cannot address host memory.
    """
    devices = jax.tree.leaves(shardings)[0].mesh.devices.flat
    if devices[0].platform != "tpu" and HOST_MEMORY not in {
        memory.kind for memory in devices[0].addressable_memories()
    }:
        platform = devices[0].platform
        raise UserError(f"{platform} devices have no memory {HOST_MEMORY!r}; keep the optimizer state on the devices")
    return jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY) if s.spec else s, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of rows [B, ...] over the data axes."""
    return NamedSharding(mesh, ROWS)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch, numbered 0 to `rows` - 1, that this process's devices hold, in ascending order."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_is_set() -> bool:
    """True while tracing under `jax.set_mesh`."""
    return not jax.sharding.get_abstract_mesh().empty


def shard_activations(hidden_BLD: jax.Array, decoding: bool) -> jax.Array:
    """Shards rows over the data axes. Without a mesh, returns its argument.

    In decoding, where rows have one token, the states are sharded like the weights: the states cross the mesh instead
    of the weights.
    """
    spec = PartitionSpec("data", None, "fsdp") if decoding else ROWS
    return _constrain(hidden_BLD, spec)


def even_rows(rows: int) -> int:
    """`rows`, rounded up to a multiple of the mesh's data-parallel size. Without a mesh, just `rows`."""
    shape = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(shape[axis] for axis in BATCH_AXES) if mesh_is_set() else 1
    return -(-rows // shards) * shards


def shard_cache(cache: jax.Array) -> jax.Array:
    """Shards a cache [B, K, ...]: rows over the data axes, key/value heads over `tensor`. Needs no mesh."""
    return _constrain(cache, PartitionSpec(BATCH_AXES, "tensor"))


def replicate(x: jax.Array) -> jax.Array:
    """Puts a whole copy on every device, so that every process can read it. Needs no mesh."""
    return _constrain(x, PartitionSpec())


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec) if mesh_is_set() else x


def on_mesh(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Maps the function over each device's part of the arguments. Without a mesh, returns the function itself."""
    if not mesh_is_set():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
