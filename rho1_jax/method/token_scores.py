"""Scores: what tokens are ranked by. Higher is kept first.

Rho-1 (arXiv 2404.07965), equation 3 and section 3.4. Register a score of your own the same way, in your config file.

Shapes: B batch rows, L sequence.
"""

import jax
import jax.numpy as jnp

from rho1_jax.method.signals import Registry, Signals

NO_SCORE = "none"  # every eligible token is trained on

SCORES = Registry("score")
register = SCORES.register


@register
def excess(policy_loss_BL, reference_loss_BL):
    """What the reference predicts better than the policy (equation 3)."""
    return policy_loss_BL - reference_loss_BL


@register
def reference_loss(reference_loss_BL):
    """What the reference finds likely (section 3.4)."""
    return -reference_loss_BL


@register
def reference_entropy(reference_entropy_BL):
    """Where the reference is sure of the next token (section 3.4)."""
    return -reference_entropy_BL


@register
def policy_loss(policy_loss_BL):
    """What the policy finds hard."""
    return policy_loss_BL


@register
def policy_entropy(policy_entropy_BL):
    """Where the policy is unsure."""
    return policy_entropy_BL


@register
def random(random_BL):
    """The control arm: as many tokens as SLM, chosen at random."""
    return random_BL


@register
def external(external_BL):
    """Numbers that come with the data."""
    return external_BL


def evaluate(name: str, signals: Signals) -> jax.Array:
    """A score, float32 [B, L]. No gradient passes through it."""
    return jax.lax.stop_gradient(SCORES.evaluate(name, signals)).astype(jnp.float32)
