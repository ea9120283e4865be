"""Token losses against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.token_loss import token_losses


def optax_losses(hidden, output, targets):
    logits = jnp.einsum("bld,vd->blv", hidden, output)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 100])
def test_losses_and_gradients_equal_optax(chunk):
    rng = np.random.default_rng(0)
    hidden, output = jnp.array(rng.normal(size=(3, 24, 16))), jnp.array(rng.normal(size=(50, 16)))
    targets, weights = jnp.array(rng.integers(0, 50, (3, 24))), jnp.array(rng.random((3, 24)))
    np.testing.assert_allclose(
        token_losses(hidden, output, targets, chunk), optax_losses(hidden, output, targets), 1e-5
    )
    ours = jax.grad(lambda h, o: (weights * token_losses(h, o, targets, chunk)).sum(), argnums=(0, 1))(hidden, output)
    theirs = jax.grad(lambda h, o: (weights * optax_losses(h, o, targets)).sum(), argnums=(0, 1))(hidden, output)
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, output = jnp.full((1, 2, 4), 100.0), jnp.stack([jnp.full(4, 100.0), jnp.full(4, -100.0)])
    np.testing.assert_allclose(token_losses(hidden, output, jnp.array([[0, 1]]), 8), [[0.0, 80_000.0]])
