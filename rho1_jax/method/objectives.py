"""Objectives: what a step minimizes, given the weight that selection gives each token.

An objective maps signals and `weight_BL` to terms [B, L]. The loss of a step is the sum of the terms over the sum of
the weights, both taken over the whole step, so microbatches and devices do not change it. Gradients flow through
`policy_loss_BL`, and through no other signal. Terms of tokens with weight zero are dropped.

Register an objective of your own in your config file, and name it in `config.objective`.

Shapes: B batch rows, L sequence.
"""

import jax
import jax.numpy as jnp

from rho1_jax.method.signals import WEIGHT, Registry, Signals

OBJECTIVES = Registry("objective", extra=(WEIGHT,))
register_objective = OBJECTIVES.register


@register_objective
def cross_entropy(policy_loss_BL, weight_BL):
    """The mean loss of the selected tokens (Rho-1, equation 4); weighted, where the rule gives weights."""
    return weight_BL * policy_loss_BL


def terms(name: str, signals: Signals, weight_BL: jax.Array) -> jax.Array:
    """The terms [B, L] whose sum, divided by the step's sum of weights, is the loss."""
    return jnp.where(weight_BL > 0, OBJECTIVES.evaluate(name, {**signals, WEIGHT: weight_BL}), 0)
