"""Checksums of arrays. They cover every bit and its position, and are the same on every mesh and in NumPy."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax.models.decoder import Params
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import path_name

SHOWN = 5  # names in an error
CHUNK = 1 << 22  # elements that `numpy_checksum` mixes at a time


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, such as layers/attention/q."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def shape_text(dtype: Any, shape: tuple[int, ...]) -> str:
    """Dtype and shape as text, such as float32(2, 32)."""
    return f"{dtype}{tuple(shape)}"


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array in a tree, by path.

    A checksum is a sum modulo 2**32, with one term per element. The term is a bijective mix of the element's bits and
    its index, so a change of one element always changes the sum. Other changes go unnoticed with probability 2**-32.
    Each device adds up its own part of an array; nothing is gathered.
    """
    return _fetch(functools.partial(_sum_of_terms, mix=_murmur), tree)


def numpy_checksum(array: np.ndarray) -> int:
    """The checksum of an array in NumPy."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(_murmur(_place(part, index)).sum(dtype=np.uint64))
    return total % 2**32


def fingerprint(params: Params) -> str:
    """A hash, in hex, of the names, shapes, dtypes and bits of parameters, the same on every mesh.

    Older runs recorded it, so it keeps its weaker mix, which misses some swaps of two elements.
    """
    leaves = named_leaves(params)
    sums = _fetch(functools.partial(_sum_of_terms, mix=_short_mix), params)
    described = [(name, shape_text(leaf.dtype, leaf.shape), sums[name]) for name, leaf in leaves.items()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def check_finite(params: Params, path: object) -> None:
    """Raises UserError, naming the arrays, if the parameters read from `path` contain NaN or infinity.

    Each device looks at its own part of an array.
    """
    bad = [name for name, finite in _fetch(_all_finite, params).items() if not finite]
    if bad:
        raise UserError(non_finite_message(path, bad))


def non_finite_message(path: object, names: Sequence[str]) -> str:
    """The error for arrays of a model that contain NaN or infinity."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{path}: NaN or infinity in {', '.join(names[:SHOWN])}{more}; use a model with finite weights"


def _fetch(function: Callable[[jax.Array], jax.Array], tree: Any) -> dict[str, int]:
    """A number for each array, by path. One call per array, so only one leaves host memory at a time."""
    numbers = {name: function(leaf) for name, leaf in named_leaves(tree).items()}
    return {name: int(number) for name, number in jax.device_get(numbers).items()}


@functools.partial(jax.jit, static_argnames="mix")
def _sum_of_terms(array: jax.Array, mix: Callable[[jax.Array], jax.Array]) -> jax.Array:
    array = jax.device_put(array, jax.memory.Space.Device)  # the optimizer state may be in host memory
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    # An element of 64 bits becomes two of 32 bits, along a new last axis.
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}").astype(jnp.uint32)
    # One iota per axis: a reshaped arange could not be sharded. After 2**32 elements the index starts again at 0.
    index = jnp.uint32(0)
    for axis in range(bits.ndim):
        stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    return mix(_place(bits, index)).sum(dtype=jnp.uint32)


def _place(bits: Any, index: Any) -> Any:
    return bits ^ (index * np.uint32(0x9E3779B9))


def _murmur(x: Any) -> Any:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _short_mix(x: Any) -> Any:
    x = x * np.uint32(0x85EBCA6B)
    return x ^ (x >> np.uint32(15))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
