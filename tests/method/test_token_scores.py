"""Every score on numbers worked out by hand, and scores that users add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import selection_of

from rho1_jax.method import token_scores
from rho1_jax.method.token_scores import SCORES, evaluate, register

# Two tokens: the policy doubts the first more than the reference does, and the second less.
SIGNALS = dict(
    policy_loss_BL=jnp.array([[3.0, 1.0]]),
    policy_entropy_BL=jnp.array([[2.0, 0.5]]),
    reference_loss_BL=jnp.array([[1.0, 4.0]]),
    reference_entropy_BL=jnp.array([[0.25, 1.5]]),
    random_BL=jnp.array([[0.2, 0.7]]),
    external_BL=jnp.array([[5.0, -6.0]]),
)
BY_HAND = {
    "excess": [2.0, -3.0],
    "reference_loss": [-1.0, -4.0],
    "reference_entropy": [-0.25, -1.5],
    "policy_loss": [3.0, 1.0],
    "policy_entropy": [2.0, 0.5],
    "random": [0.2, 0.7],
    "external": [5.0, -6.0],
}


def test_every_score_has_its_sign_pinned():
    assert {name for name, function in SCORES.items() if function.__module__ == token_scores.__name__} == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_on_hand_computed_numbers(name):
    np.testing.assert_array_equal(evaluate(name, SIGNALS), [np.float32(BY_HAND[name])])


def test_no_gradient_passes_through_a_score():
    def kept(policy_loss):
        return evaluate("excess", SIGNALS | {"policy_loss_BL": policy_loss}).sum()

    np.testing.assert_array_equal(jax.grad(kept)(SIGNALS["policy_loss_BL"]), [[0.0, 0.0]])


@pytest.fixture
def added():
    """Removes what a test registers."""
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


def test_a_score_of_your_own(added):
    @register
    def gain(policy_loss_BL, reference_loss_BL):
        return policy_loss_BL / reference_loss_BL

    assert selection_of(score="gain").needs == {"policy_loss_BL", "reference_loss_BL"}
    np.testing.assert_array_equal(evaluate("gain", SIGNALS), [[3.0, 0.25]])
    register(gain)  # as when the config file is loaded twice


def test_a_bad_score_is_refused(added):
    def excess(policy_loss_BL):
        return policy_loss_BL

    def typo(policy_los_BL):
        return policy_los_BL

    def unnamed(advantage):
        return advantage

    def weighted(policy_loss_BL, weight_BL):
        return weight_BL * policy_loss_BL

    with pytest.raises(ValueError, match="score 'weighted': 'weight_BL' is not one of"):
        register(weighted)
    with pytest.raises(ValueError, match="score 'excess' is built in"):
        register(excess)
    with pytest.raises(
        ValueError, match="score 'typo': 'policy_los_BL' is not one of policy_loss_BL.*did you mean policy_loss_BL"
    ):
        register(typo)
    with pytest.raises(
        ValueError, match="score 'unnamed': 'advantage' is not one of .*a column of the data ends in _BL"
    ):
        register(unnamed)
