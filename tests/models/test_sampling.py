"""The nucleus and the draws from it, compared with NumPy and SciPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rho1_jax.models.sampling import next_token, nucleus

LOGITS = np.array([1.0, 3.0, 0.5, 2.5, -1.0, 2.0, 0.0, -4.0], np.float32)


def expected_nucleus(logits_V, top_p):
    """The smallest set in float64, and the distance of each token from the boundary."""
    order_V = np.lexsort((np.arange(len(logits_V)), -logits_V))
    probabilities_V = scipy.special.softmax(logits_V.astype(np.float64))
    inside_V, distance_V, total = np.zeros(len(logits_V), bool), np.zeros(len(logits_V)), 0.0
    for token in order_V:
        inside_V[token], distance_V[token] = total < top_p, abs(total - top_p)
        total += probabilities_V[token]
    return inside_V, distance_V


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, scale):
    """For every token, except where the boundary is within the rounding of float32."""
    logits_BV = np.random.default_rng(0).normal(0, scale, (20, 500)).astype(np.float32)
    inside_BV, distance_BV = map(np.stack, zip(*(expected_nucleus(logits_V, top_p) for logits_V in logits_BV)))
    clear_BV = distance_BV > 5e-7
    np.testing.assert_array_equal(np.asarray(nucleus(jnp.array(logits_BV), top_p))[clear_BV], inside_BV[clear_BV])
    assert clear_BV.mean() > 0.99 and inside_BV[clear_BV].any() and inside_BV.any(axis=1).all()


def test_equal_probabilities_and_the_exact_boundary():
    quarters = jnp.zeros((1, 4))
    for top_p, count in ((0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)):
        assert nucleus(quarters, top_p)[0].tolist() == [number < count for number in range(4)]


@partial(jax.jit, static_argnums=(2, 3))
def draws(logits_BV, key, temperature, top_p):
    number_B = jnp.arange(len(logits_BV))
    return next_token(logits_BV, number_B, jnp.full(len(logits_BV), 7), key, temperature, top_p)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.8), (2.0, 0.8), (0.5, 0.95), (3.0, 1e-3)])
def test_draws_follow_the_nucleus_at_the_temperature(temperature, top_p):
    """Chi-square against the renormalized distribution, which for 20,000 draws separates it from its neighbours."""
    inside = expected_nucleus(LOGITS / temperature, top_p)[0]
    probabilities = np.where(inside, scipy.special.softmax(LOGITS / temperature), 0)
    probabilities /= probabilities.sum()
    tokens, logprobs = draws(jnp.tile(LOGITS, (20_000, 1)), jax.random.key(0), temperature, top_p)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert not counts[~inside].any()
    assert inside.sum() == 1 or scipy.stats.chisquare(counts[inside], 20_000 * probabilities[inside]).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, scipy.special.log_softmax(LOGITS)[tokens], rtol=1e-5, atol=1e-6)


def test_temperature_zero_takes_the_likeliest_token_in_any_nucleus():
    logits = jnp.tile(LOGITS, (8, 1))
    assert draws(logits, jax.random.key(0), 0.0, 0.3)[0].tolist() == [1] * 8 == [int(LOGITS.argmax())] * 8


def test_a_draw_depends_on_request_and_length_only():
    logits, key = jnp.tile(LOGITS, (64, 1)), jax.random.key(0)
    together = draws(logits, key, 2.0, 0.9)[0]
    alone = [int(next_token(logits[:1], jnp.array([n]), jnp.array([7]), key, 2.0, 0.9)[0][0]) for n in range(0, 64, 16)]
    assert together[::16].tolist() == alone and len(set(together.tolist())) > 2
