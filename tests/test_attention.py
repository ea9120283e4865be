"""Attention against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.attention import attention, attention_mask


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_equals_jax_nn_forward_and_backward(kv_heads, sliding_window):
    rng = np.random.default_rng(0)
    q = jnp.array(rng.normal(size=(2, 12, 4, 8)), jnp.float32)
    k, v = (jnp.array(rng.normal(size=(2, 12, kv_heads, 8)), jnp.float32) for _ in range(2))
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
    mask = attention_mask(segments, segments, 0, sliding_window)

    def theirs(q, k, v):
        window = None if sliding_window is None else (sliding_window - 1, 0)
        same = (segments[:, :, None] == segments[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, local_window_size=window)

    np.testing.assert_allclose(attention(q, k, v, mask), theirs(q, k, v), rtol=1e-4, atol=1e-5)
    ours_grad = jax.grad(lambda *x: (attention(*x, mask) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    their_grad = jax.grad(lambda *x: (theirs(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    for mine, other in zip(ours_grad, their_grad):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_mask_by_hand():
    mask = attention_mask(jnp.array([[1, 2]]), jnp.array([[0, 1, 1, 2]]), 2, None)
    np.testing.assert_array_equal(mask, [[[False, True, True, False], [False, False, False, True]]])
