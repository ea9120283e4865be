"""Compares each kernel with JAX's own attention, forward and backward."""

import contextlib
import functools
import re
import types
from collections import Counter

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_checks
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models import attention as kernels
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


def mesh_of(sizes):
    axes = sharding.AXES, (jax.sharding.AxisType.Auto,) * 3
    return (
        contextlib.nullcontext()
        if sizes is None
        else jax.set_mesh(jax.make_mesh(sizes, *axes, devices=jax.devices()[:4]))
    )


@pytest.mark.parametrize("kv_heads, sliding_window, sizes", [(4, None, None), (1, 70, None), (2, None, (2, 1, 2))])
def test_splash_equals_jax_nn(monkeypatch, kv_heads, sliding_window, sizes):
    """Runs in Pallas's interpreter. With sizes, on a mesh with rows and heads each over two devices."""
    q, k, v, segments = inputs(256, kv_heads, head_width=128)
    ours = functools.partial(attention, sliding_window=sliding_window, kernel="splash")
    on_tpu = splash_kernel.make_splash_mha_single_device
    monkeypatch.setattr(splash_kernel, "make_splash_mha_single_device", functools.partial(on_tpu, interpret=True))
    with mesh_of(sizes):
        check(lambda q, k, v: ours(q, k, v, segments), q, k, v, segments, sliding_window)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """JAX's own implementation with cuDNN's arguments, in any dtype. Returns the implementations asked for."""
    implementations = []
    original = jax.nn.dot_product_attention

    def instead(*arrays, implementation=None, **options):
        implementations.append(implementation)
        return original(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(kernels, "_cudnn_refusal", lambda *_: None)
    return implementations


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_cudnn_gets_the_arguments_of_jax_nn(cudnn_on_cpu, sliding_window):
    q, k, v, segments = inputs(64, 2)
    mixed = attention(q, k, v, segments, sliding_window=sliding_window, kernel="cudnn")
    assert cudnn_on_cpu == ["cudnn"]
    np.testing.assert_allclose(mixed, theirs(q, k, v, segments, sliding_window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kv_heads, sliding_window, sizes", [(4, None, None), (1, 70, None), (2, 600, None), (2, None, (2, 1, 2))]
)
def test_cudnn_in_blocks_equals_jax_nn(cudnn_on_cpu, kv_heads, sliding_window, sizes):
    """Two blocks of queries. With sizes, on a mesh with rows and heads each over two devices."""
    q, k, v, segments = inputs(704, kv_heads)
    ours = functools.partial(attention, sliding_window=sliding_window, query_scale=8**-0.5, kernel="cudnn")
    with mesh_of(sizes):
        check(lambda q, k, v: ours(q, k, v, segments), q, k, v, segments, sliding_window)
    assert cudnn_on_cpu.count("cudnn") == 2


def lowered_for_cuda(monkeypatch, length=1024, head_width=64, dtype=jnp.bfloat16, backward=True, **options):
    """What a GPU gets to compile, as text, for 4 query heads and 2 key/value heads."""
    monkeypatch.setattr(cudnn_checks, "check_cudnn_version", lambda: 91_000)
    q, k, v = (jax.ShapeDtypeStruct((2, length, heads, head_width), dtype) for heads in (4, 2, 2))
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(q, k, v, segments):
        return (attention(q, k, v, segments, **options).astype(jnp.float32) ** 2).sum()

    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else loss
    return jax.jit(function).trace(q, k, v, segments).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_lowers_to_its_fused_kernels(monkeypatch):
    lowered = lowered_for_cuda(monkeypatch, length=128, sliding_window=64, kernel="cudnn")
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in lowered


@pytest.mark.parametrize("sizes", [None, (2, 1, 2)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 700])
def test_cudnn_has_no_buffer_of_all_pairs(monkeypatch, sliding_window, backward, sizes):
    """Eight blocks, and the forward kernel runs once for each, in the backward pass too."""
    with mesh_of(sizes):
        lowered = lowered_for_cuda(
            monkeypatch, length=4096, backward=backward, sliding_window=sliding_window, kernel="cudnn"
        )
    calls = Counter(re.findall(r"@__cudnn\$fmhaScaleBiasSoftmax(\w*)\(", lowered))
    assert calls == ({"": 8, "Backward": 8} if backward else {"": 8})
    shapes = [[int(size) for size in shape.split("x")] for shape in re.findall(r"tensor<([\dx]+\d)x\w+>", lowered)]
    assert shapes and not [shape for shape in shapes if sum(size >= 4096 for size in shape) > 1]


def test_the_masks_of_cudnn_are_not_built_before_the_loop_over_layers(cudnn_on_cpu):
    def loss(x, segments):
        def layer(x, _):
            return attention(x, x, x, segments, kernel="cudnn"), None

        return jax.lax.scan(layer, x, length=3)[0].sum()

    x, segments = jax.ShapeDtypeStruct((2, 1024, 1, 8), jnp.float32), jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(x, segments).compile().as_text()
    assert re.search(r"pred\[[\d,]*512,1024\]", compiled)
    assert not re.search(r"pred\[[\d,]*512,1024\]", compiled[compiled.index("\nENTRY") :])


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
    on_gpu(monkeypatch)
    np.testing.assert_allclose(
        attention(q, k, v, segments, **CAP), capped(q, k, v, segments, None), rtol=1e-3, atol=1e-4
    )


def on_gpu(monkeypatch, compute_capability=8.9):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_compute_capability", lambda: compute_capability)


REFUSED = [
    ({"length": 192}, "needs rows of a multiple of 128 tokens, not 192"),
    ({"dtype": jnp.float32}, "needs config.model.compute_dtype=bfloat16 or float16, not float32"),
    ({"head_width": 136}, "needs a head width that is a multiple of 8, at most 128 on this device, not 136"),
    ({"head_width": 20}, "needs a head width that is a multiple of 8, at most 128 on this device, not 20"),
]


@pytest.mark.parametrize("shapes, message", REFUSED)
def test_cudnn_refuses_what_it_cannot_compute_and_auto_avoids_it(monkeypatch, shapes, message):
    with pytest.raises(UserError, match=f"attention kernel 'cudnn' {message}; use 'xla'"):
        lowered_for_cuda(monkeypatch, kernel="cudnn", **shapes)
    on_gpu(monkeypatch)
    assert "__cudnn$" not in lowered_for_cuda(monkeypatch, **shapes)


@pytest.mark.parametrize(
    "compute_capability, head_width, cudnn",
    [
        (0.0, 64, False),
        (7.5, 64, False),
        (8.0, 128, True),
        (8.9, 256, False),
        (9.0, 256, True),
        (10.0, 256, False),
        (12.0, 128, True),
    ],
)
def test_auto_selects_cudnn_by_compute_capability(monkeypatch, compute_capability, head_width, cudnn):
    on_gpu(monkeypatch, compute_capability)
    # Without a GPU, JAX's own check of the head width assumes the narrower limit.
    monkeypatch.setattr(cudnn_checks, "check_compute_capability", lambda least: compute_capability >= float(least))
    lowered = lowered_for_cuda(monkeypatch, head_width=head_width)
    assert ("__cudnn$" in lowered) == cudnn


def test_cudnn_refuses_old_gpus(monkeypatch):
    on_gpu(monkeypatch, 7.5)
    message = "attention kernel 'cudnn' needs a GPU of compute capability 8.0 or newer, not 7.5; use 'xla'"
    with pytest.raises(UserError, match=message):
        lowered_for_cuda(monkeypatch, kernel="cudnn")


@pytest.mark.parametrize("name, value", [("8.9", 8.9), ("12.0", 12.0), ("gfx942", 0.0), (None, 0.0)])
def test_compute_capability(monkeypatch, name, value):
    """AMD's GPUs name their architecture there, and other devices have none."""
    device = types.SimpleNamespace() if name is None else types.SimpleNamespace(compute_capability=name)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert kernels._compute_capability() == value


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
