"""Compares each kernel with JAX's own attention, forward and backward."""

import contextlib
import functools

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_checks
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models.attention import attention, attention_mask, cached_attention, splash_kernel
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError


def inputs(length, kv_heads, head_width=8):
    """Queries, keys, values, and documents whose ends match neither a row nor a block; the last one is padding."""
    rng = np.random.default_rng(0)
    q = jnp.array(rng.normal(size=(2, length, 4, head_width)), jnp.float32)
    k, v = (jnp.array(rng.normal(size=(2, length, kv_heads, head_width)), jnp.float32) for _ in range(2))
    cut, end = length // 3, length - 3
    segments = np.ones((2, length), np.int32)
    segments[0, cut:], segments[0, end:] = 2, 0
    return q, k, v, jnp.array(segments)


def theirs(q, k, v, segments, sliding_window):
    window = None if sliding_window is None else (sliding_window - 1, 0)
    same = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, local_window_size=window)


def check(ours, q, k, v, segments, sliding_window, other=theirs):
    def both(function):
        def outputs(q, k, v):
            mixed = function(q, k, v)
            return (mixed**2).sum(), mixed

        (_, mixed), gradients = jax.jit(jax.value_and_grad(outputs, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return mixed, *gradients

    expected = both(lambda *qkv: other(*qkv, segments, sliding_window=sliding_window))
    for mine, reference in zip(both(ours), expected):
        np.testing.assert_allclose(mine, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sliding_window", [None, 3, 70])
@pytest.mark.parametrize("length", [12, 150, 700])
def test_xla_in_blocks_equals_jax_nn(kv_heads, sliding_window, length):
    q, k, v, segments = inputs(length, kv_heads)
    check(
        lambda q, k, v: attention(q, k, v, segments, sliding_window=sliding_window, kernel="xla"),
        *(q, k, v, segments, sliding_window),
    )


@pytest.mark.parametrize("kv_heads, sliding_window, sizes", [(4, None, None), (1, 70, None), (2, None, (2, 1, 2))])
def test_splash_equals_jax_nn(monkeypatch, kv_heads, sliding_window, sizes):
    """Runs in Pallas's interpreter. With sizes, on a mesh with rows and heads each over two devices."""
    q, k, v, segments = inputs(256, kv_heads, head_width=128)
    ours = functools.partial(attention, sliding_window=sliding_window, kernel="splash")
    on_tpu = splash_kernel.make_splash_mha_single_device
    monkeypatch.setattr(splash_kernel, "make_splash_mha_single_device", functools.partial(on_tpu, interpret=True))
    with contextlib.ExitStack() as stack:
        if sizes is not None:
            mesh = jax.make_mesh(sizes, sharding.AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:4])
            stack.enter_context(jax.set_mesh(mesh))
        check(lambda q, k, v: ours(q, k, v, segments), q, k, v, segments, sliding_window)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_cudnn_gets_the_arguments_of_jax_nn(monkeypatch, sliding_window):
    """Without a GPU, JAX's own implementation runs with cuDNN's arguments."""
    q, k, v, segments = inputs(64, 2)
    implementations = []
    original = jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        implementations.append(implementation)
        return original(*arrays, **options)

    expected = theirs(q, k, v, segments, sliding_window)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    mixed = attention(q, k, v, segments, sliding_window=sliding_window, kernel="cudnn")
    assert implementations == ["cudnn"]
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)


def test_cudnn_lowers_to_its_fused_kernels(monkeypatch):
    monkeypatch.setattr(cudnn_checks, "check_cudnn_version", lambda: 91_000)
    q, k, v = (jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(q, k, v, segments):
        return attention(q, k, v, segments, sliding_window=64, kernel="cudnn").astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(q, k, v, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in lowered


def capped(q, k, v, segments, sliding_window):
    """Attention with a soft cap of 1.5 and a query scale of 0.15, written out."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = 1.5 * jnp.tanh(jnp.einsum("BLHC,BSHC->BHLS", 0.15 * q, k) / 1.5)
    mask = attention_mask(segments, segments, 0, sliding_window)[:, None]
    return jnp.einsum("BHLS,BSHC->BLHC", jax.nn.softmax(logits, where=mask), v)


CAP = {"query_scale": 0.15, "soft_cap": 1.5}


@pytest.mark.parametrize("kernel, sliding_window", [("xla", None), ("xla", 70), ("splash", None), ("splash", 70)])
def test_soft_cap_and_query_scale(monkeypatch, kernel, sliding_window):
    q, k, v, segments = inputs(256, 2, head_width=128)
    on_tpu = splash_kernel.make_splash_mha_single_device
    monkeypatch.setattr(splash_kernel, "make_splash_mha_single_device", functools.partial(on_tpu, interpret=True))
    ours = functools.partial(attention, sliding_window=sliding_window, kernel=kernel, **CAP)
    expected = functools.partial(capped, sliding_window=sliding_window)
    check(lambda q, k, v: ours(q, k, v, segments), q, k, v, segments, sliding_window, expected)


def test_cached_attention_with_soft_cap_and_query_scale():
    q, k, v, _ = inputs(12, 2)
    cached = cached_attention(q[:, -1], k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), jnp.ones((2, 12), bool), **CAP)
    expected = capped(q, k, v, jnp.ones((2, 12), int), None)[:, -1]
    np.testing.assert_allclose(cached, expected, rtol=1e-4, atol=1e-5)


def test_cudnn_refuses_a_soft_cap_and_auto_avoids_it(monkeypatch):
    q, k, v, segments = inputs(64, 2)
    with pytest.raises(UserError, match="attention kernel 'cudnn' cannot compute a soft cap .1.5.; use 'xla'"):
        attention(q, k, v, segments, kernel="cudnn", soft_cap=1.5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(
        attention(q, k, v, segments, **CAP), capped(q, k, v, segments, None), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_to_cached_keys_equals_jax_nn(kv_heads):
    """The last query of each row sees the visible keys of its row, at any positions."""
    q, k, v, _ = inputs(12, kv_heads)
    visible = np.random.default_rng(1).random((2, 12)) < 0.5
    mixed = cached_attention(q[:, -1], k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), jnp.array(visible))
    expected = jax.nn.dot_product_attention(q[:, -1:], k, v, mask=visible[:, None, None])
    np.testing.assert_allclose(mixed, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_splash_refuses_rows_it_cannot_divide():
    q, k, v, segments = inputs(100, 2)
    with pytest.raises(
        UserError, match="attention kernel 'splash' needs rows of a multiple of 128 .*not 100; use 'xla'"
    ):
        attention(q, k, v, segments, kernel="splash")


def test_no_buffer_holds_the_logits_of_all_pairs():
    q = jax.ShapeDtypeStruct((1, 4096, 4, 16), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def temporaries(function):
        gradient = jax.grad(lambda *qkv: function(*qkv).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(q, q, q, segments).compile().memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda q, k, v, segments: attention(q, k, v, segments, kernel="xla"))
    assert ours < temporaries(lambda *qkv: theirs(*qkv, None)) / 2


def test_mask_by_hand():
    mask = attention_mask(jnp.array([[1, 2]]), jnp.array([[0, 1, 1, 2]]), 2, None)
    np.testing.assert_array_equal(mask, [[[False, True, True, False], [False, False, False, True]]])
