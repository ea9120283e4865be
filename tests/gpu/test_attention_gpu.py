"""Compares cuDNN's kernel on a GPU with XLA's in float32, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models.attention import attention

pytestmark = pytest.mark.gpu

LENGTH = 1152  # three blocks of queries, the last one short
# For numbers around 1. A bfloat16 has 8 significant bits, so rounding alone moves them by 0.4 %.
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}


def inputs(heads, kv_heads, head_width, dtype=jnp.bfloat16):
    """Queries, keys, values, and the gradient of the output; each row has two documents, and padding at its end."""
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, count, head_width) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.array(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.zeros((2, LENGTH), np.int32)
    for row, (cut, end) in enumerate([(300, 1000), (513, 1151)]):
        segments[row, :cut], segments[row, cut:end] = 1, 2
    return *arrays, jnp.array(segments)


def outputs_and_gradients(arrays, segments, **options):
    *qkv, mixed_gradient = arrays
    mixed, backward = jax.vjp(lambda *qkv: attention(*qkv, segments, **options), *qkv)
    return mixed, *backward(mixed_gradient)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("sliding_window, query_scale", [(None, None), (5, 0.2), (600, None)])
def test_cudnn_equals_xla(heads, kv_heads, head_width, sliding_window, query_scale):
    *arrays, segments = inputs(heads, kv_heads, head_width)
    options = {"sliding_window": sliding_window, "query_scale": query_scale}
    exact = outputs_and_gradients([x.astype(jnp.float32) for x in arrays], segments, kernel="xla", **options)
    fused = outputs_and_gradients(arrays, segments, kernel="cudnn", **options)
    for name, ours, expected in zip(("mixed", "q", "k", "v"), fused, exact):
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("dtype, fused", [(jnp.bfloat16, True), (jnp.float16, True), (jnp.float32, False)])
def test_auto_selects_cudnn_for_16_bits(dtype, fused):
    *arrays, segments = inputs(4, 2, 64, dtype)
    compiled = jax.jit(outputs_and_gradients).lower(arrays, segments).compile().as_text()
    assert ("__cudnn$fmha" in compiled) == fused


def test_memory_is_linear_in_the_row_length():
    """Twice the length takes twice the memory; a mask of all pairs would take four times as much."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(x, segments):
            def layer(x, _):
                return attention(x, x, x, segments), None

            return (jax.lax.scan(layer, x, length=2)[0].astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss)).lower(x, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)
