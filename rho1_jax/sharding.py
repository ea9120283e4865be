"""The device mesh, and one table that says how every parameter lies on it."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rho1_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Rows of a batch are spread over both of these; parameters are spread over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")

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


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over all devices. One of the three sizes may be -1: whatever the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.device_count()
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0:
        sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices or min(sizes) < 1:
        wanted = f"data={data}, fsdp={fsdp}, tensor={tensor}"
        raise UserError(f"config.mesh ({wanted}) does not fit {devices} devices: the sizes must multiply to that")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] spread over the data axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_activations(hidden_BLD: jax.Array) -> jax.Array:
    """Keeps rows on the data axes, wherever a mesh is set; otherwise returns its argument."""
    if jax.sharding.get_abstract_mesh().empty:
        return hidden_BLD
    return jax.lax.with_sharding_constraint(hidden_BLD, PartitionSpec(BATCH_AXES))
