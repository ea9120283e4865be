"""Objectives: the built-in one by hand, and objectives that users add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.method import objectives
from rho1_jax.method.objectives import OBJECTIVES, register_objective

SIGNALS = {"policy_loss_BL": jnp.array([[3.0, 1.0, 2.0]])}
WEIGHT = jnp.array([[1.0, 0.0, 0.5]])


@pytest.fixture
def added():
    """Removes what a test registers."""
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_cross_entropy_weighs_the_losses():
    np.testing.assert_array_equal(objectives.terms("cross_entropy", SIGNALS, WEIGHT), [[3.0, 0.0, 1.0]])


def test_tokens_of_weight_zero_count_for_nothing_whatever_their_loss(added):
    @register_objective
    def squared(policy_loss_BL):
        return policy_loss_BL**2

    signals = {"policy_loss_BL": jnp.array([[3.0, jnp.inf, 2.0]])}
    np.testing.assert_array_equal(objectives.terms("squared", signals, WEIGHT), [[9.0, 0.0, 4.0]])


def test_gradients_flow_through_the_policy_loss(added):
    gradient = jax.grad(lambda loss: objectives.terms("cross_entropy", {"policy_loss_BL": loss}, WEIGHT).sum())
    np.testing.assert_array_equal(gradient(SIGNALS["policy_loss_BL"]), WEIGHT)


def test_a_bad_objective_is_refused(added):
    def cross_entropy(policy_loss_BL):
        return policy_loss_BL

    def typo(policy_loss_BL, weights_BL):
        return policy_loss_BL

    with pytest.raises(ValueError, match="objective 'cross_entropy' is built in"):
        register_objective(cross_entropy)
    with pytest.raises(ValueError, match="objective 'typo': 'weights_BL' is not .*did you mean weight_BL"):
        register_objective(typo)
