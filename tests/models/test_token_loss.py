"""Compares token losses and their gradients with optax's in float64, on one device and on meshes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.models.structure import soft_cap
from rho1_jax.models.token_loss import token_losses
from rho1_jax.runtime import sharding

B, L, D, V = 8, 24, 16, 48


def optax_losses(hidden, output, targets, cap=None):
    logits = soft_cap(jnp.einsum("bld,vd->blv", hidden, output), cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def inputs(selected):
    """Hidden states, output embedding, targets, and the weight of each token's loss: 0 if it is not selected."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((B, L)) < selected, rng.random((B, L)), 0)
    return rng.normal(size=(B, L, D)), rng.normal(size=(V, D)), rng.integers(0, V, (B, L)), weights


def expected(hidden, output, targets, weights, cap=None):
    """Losses and both gradients, from optax in float64."""
    with jax.enable_x64(True):
        # As JAX arrays: an operation that gets NumPy's may find a program that was compiled for float32.
        hidden, output, weights = (jnp.asarray(x, jnp.float64) for x in (hidden, output, weights))

        def total(hidden, output):
            return (weights * optax_losses(hidden, output, targets, cap)).sum()

        losses = optax_losses(hidden, output, targets, cap)
        gradients = jax.grad(total, argnums=(0, 1))(hidden, output)
    return losses, *gradients


def check(results, hidden, output, targets, weights, cap=None):
    for ours, theirs in zip(results, expected(hidden, output, targets, weights, cap)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def ours(hidden, output, targets, weights, chunk, cap=None, kept_gib=0.0):
    hidden, output, weights = (jnp.asarray(x, jnp.float32) for x in (hidden, output, weights))
    targets = jnp.asarray(targets)
    losses, gradient = jax.vjp(lambda h, o: token_losses(h, o, targets, chunk, False, cap, kept_gib)[0], hidden, output)
    return losses, *gradient(weights)


@pytest.mark.parametrize("selected", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("chunk", [1, 5, 24, 64, 1000])
def test_losses_and_gradients_equal_optax(chunk, selected):
    given = inputs(selected)
    check(ours(*given, chunk), *given)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_losses_and_gradients_with_a_soft_cap(chunk):
    given = inputs(0.6)
    check(ours(*given, chunk, cap=3.0), *given, cap=3.0)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_on_a_mesh_with_a_different_number_selected_on_each_device(sizes, cap):
    hidden, output, targets, weights = inputs(0.6)
    weights[0], weights[1:3, 5:] = 0, 0
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        results = jax.jit(ours, static_argnums=(4, 5))(hidden, output, targets, weights, 7, cap)
    check(results, hidden, output, targets, weights, cap)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_kept_logits(sizes, cap):
    given, size = inputs(0.6), math.prod(sizes)
    gib = 4 * B * L * V / size / 2**30
    with jax.set_mesh(sharding.make_mesh(*sizes, devices=jax.devices()[:size])):
        for kept_gib, products in ((gib, 3), (0.99 * gib, 4)):
            jitted = jax.jit(ours, static_argnums=(4, 5, 6))
            check(jitted(*given, 8, cap, kept_gib), *given, cap=cap)
            assert jitted.lower(*given, 8, cap, kept_gib).as_text().count("dot_general") == products


def test_kept_logits_may_be_large():
    """exp(100) is infinite in float32, and the last chunk has more places than tokens with a weight."""
    hidden, output, targets, weights = inputs(0.6)
    hidden[-1, -1] = 100 * output[0] / (output[0] ** 2).sum()
    check(
        jax.jit(ours, static_argnums=(4, 5, 6))(hidden, output, targets, weights, 8, None, 1.0),
        hidden,
        output,
        targets,
        weights,
    )


def entropies(hidden, output, targets, chunk):
    hidden, output = jnp.asarray(hidden, jnp.float32), jnp.asarray(output, jnp.float32)
    return token_losses(hidden, output, jnp.asarray(targets), chunk, True)[1]


def expected_entropies(hidden, output):
    with jax.enable_x64(True):
        hidden, output = jnp.asarray(hidden, jnp.float64), jnp.asarray(output, jnp.float64)
        logits = jnp.einsum("bld,vd->blv", hidden, output)
        return optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_entropies_equal_optax(chunk):
    hidden, output, targets, _ = inputs(1.0)
    entropy = entropies(hidden, output, targets, chunk)
    np.testing.assert_allclose(entropy, expected_entropies(hidden, output), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_entropies_on_a_mesh(sizes):
    hidden, output, targets, _ = inputs(1.0)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        entropy = jax.jit(entropies, static_argnums=3)(hidden, output, targets, 7)
    np.testing.assert_allclose(entropy, expected_entropies(hidden, output), rtol=1e-4, atol=1e-5)


def test_entropies_of_large_and_of_equal_logits():
    hidden = jnp.full((1, 1, 4), 100.0)
    sure, unsure = jnp.stack([jnp.full(4, 100.0), jnp.full(4, -100.0)]), jnp.ones((2, 4))
    np.testing.assert_array_equal(token_losses(hidden, sure, jnp.zeros((1, 1), int), 8, True)[1], [[0.0]])
    np.testing.assert_allclose(token_losses(hidden, unsure, jnp.zeros((1, 1), int), 8, True)[1], [[np.log(2)]])


def test_tokens_without_a_gradient_are_not_touched():
    """If their logits were computed, they would give NaN, even times zero."""
    hidden, output, targets, weights = inputs(0.6)
    results = {}
    for filler in (0.0, np.nan):
        filled = np.where(weights[..., None] == 0, filler, hidden)
        _, *results[filler] = ours(filled, output, targets, weights, 7)
    for plain, with_nan in zip(*results.values()):
        np.testing.assert_array_equal(with_nan, plain)


def test_large_logits_stay_finite():
    hidden, output = jnp.full((1, 2, 4), 100.0), jnp.stack([jnp.full(4, 100.0), jnp.full(4, -100.0)])
    np.testing.assert_allclose(token_losses(hidden, output, jnp.array([[0, 1]]), 8, False)[0], [[0.0, 80_000.0]])


def test_temporaries_of_loss_and_gradient_are_at_most_a_fifth_of_the_plain_ones():
    """At 16,384 tokens and a vocabulary of 32,000."""
    shapes = [((32, 512, 64), jnp.float32), ((32_000, 64), jnp.float32), ((32, 512), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def temporaries(losses):
        gradient = jax.grad(lambda h, o, t: losses(h, o, t).mean(), argnums=(0, 1))
        return jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda h, o, t: token_losses(h, o, t, 512, False)[0]) <= temporaries(optax_losses) / 5
