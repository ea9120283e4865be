"""Checksums: every bit and its place count, and every mesh, memory and NumPy agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checksums
from rho1_jax.training.checksums import numpy_checksum

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "bool"]


def checksum(array):
    return checksums.checksums({"x": array})["x"]


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_agree(dtype, shape):
    array = (jnp.arange(np.prod(shape, dtype=int)) % 5).reshape(shape).astype(dtype)
    assert checksum(array) == numpy_checksum(np.asarray(array))


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_all_64_bits_count(dtype):
    with jax.enable_x64(True):
        array = jnp.arange(1, 13).reshape(3, 4).astype(dtype)
        sums = {checksum(array), numpy_checksum(np.asarray(array))}
        bits = np.array(array).view("uint64")
        bits[1, 2] ^= np.uint64(1 << 40)
        changed = jnp.asarray(bits.view(dtype))
        assert len(sums) == 1 and checksum(changed) not in sums


def test_numpy_sums_large_arrays_in_chunks(monkeypatch):
    array = np.random.default_rng(0).standard_normal((9, 11)).astype("float32")
    monkeypatch.setattr(checksums, "CHUNK", 10)
    assert numpy_checksum(array) == checksum(jnp.asarray(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_flipped_bit_changes_the_checksum(dtype):
    array = np.asarray(jnp.linspace(-3, 3, 40).astype(dtype))
    width = 8 * array.dtype.itemsize
    sums = {numpy_checksum(array)}
    for position in range(array.size):
        for bit in range(width):
            changed = array.copy()
            changed.view(f"uint{width}")[position] ^= 1 << bit
            sums.add(numpy_checksum(changed))
    assert len(sums) == 1 + array.size * width


@pytest.mark.parametrize("values", [np.arange(120, dtype="float32"), np.arange(120, dtype="int32") % 4])
def test_every_swap_of_two_elements_changes_the_checksum(values):
    original = numpy_checksum(values)
    for first in range(values.size):
        for second in range(first):
            if values[first] != values[second]:
                swapped = values.copy()
                swapped[[first, second]] = values[[second, first]]
                assert numpy_checksum(swapped) != original


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_every_mesh_agrees(params, sizes):
    placed = jax.device_put(params[0], sharding.param_shardings(params[0], sharding.make_mesh(*sizes)))
    assert checksums.checksums(placed) == checksums.checksums(params[0])


def test_host_memory_agrees(params):
    mesh = sharding.make_mesh(1, 4, 2)
    placed = jax.device_put(params[0], sharding.on_host(sharding.param_shardings(params[0], mesh)))
    assert placed["embedding"].sharding.memory_kind == sharding.HOST_MEMORY
    assert checksums.checksums(placed) == checksums.checksums(params[0])


def test_an_array_of_a_70b_model_is_not_gathered():
    """More elements than 2**32. Compiled, not run."""
    mesh = sharding.make_mesh(1, 4, 2)
    spec = jax.sharding.NamedSharding(mesh, sharding.RULES[r"feed_forward/(gate|up)"])
    array = jax.ShapeDtypeStruct((80, 8192, 28672), "float32", sharding=spec)
    for function in (
        functools.partial(checksums._sum_of_terms, mix=checksums._murmur),
        functools.partial(checksums._sum_of_terms, mix=checksums._short_mix),
        checksums._all_finite,
    ):
        compiled = jax.jit(function).lower(array).compile()
        assert "all-gather" not in compiled.as_text() and compiled.output_shardings.is_fully_replicated
        # No more than one array of 32 bits on each device. Only on CPU is there one at all.
        assert compiled.memory_analysis().temp_size_in_bytes <= 1.01 * 4 * 80 * 8192 * 28672 / 8


def test_recorded_fingerprints_stay_valid():
    """The values are those of 0.1 and 0.2."""
    params = {"a": jnp.arange(12, dtype="float32").reshape(3, 4) / 7, "b": {"c": jnp.arange(5, dtype="bfloat16")}}
    assert checksums.fingerprint(params) == "e345d86e569735e230f2eca9814b3668b73be1bade400abd6adf11804b8791d9"


def test_arrays_that_are_not_finite_are_named():
    mesh = sharding.make_mesh(2, 2, 2)
    params = {"embedding": jnp.ones((8, 8)), "norm": {"scale": jnp.ones(8)}}
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    checksums.check_finite(placed, "here")
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        bad = placed | {"embedding": placed["embedding"].at[5, 3].set(value)}
        with pytest.raises(UserError, match="here: NaN or infinity in embedding; use"):
            checksums.check_finite(bad, "here")
    with pytest.raises(UserError, match="here: NaN or infinity in embedding, norm/scale; use"):
        checksums.check_finite(jax.tree.map(lambda x: x * jnp.nan, placed), "here")
