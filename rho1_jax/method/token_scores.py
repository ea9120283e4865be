"""What tokens are ranked by: each score a function of signals, registered by its name. Higher is kept first.

Rho-1 (arXiv 2404.07965), equation 3 and section 3.4. A score of one's own is registered in the same way, from outside.

Shapes: B batch rows, L sequence.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NO_SCORE = "none"  # every eligible token is trained on


class Signals(NamedTuple):
    """What a score may be made from: float32 [B, L], in nats but for the last two. None where no score needs it."""

    policy_loss_BL: Any = None
    policy_entropy_BL: Any = None
    reference_loss_BL: Any = None
    reference_entropy_BL: Any = None
    random_BL: Any = None  # uniform noise, drawn anew each step
    external_BL: Any = None  # numbers that the user brings with the data


REFERENCE_SIGNALS = {"reference_loss_BL", "reference_entropy_BL"}

# Functions of signals [B, L], each named as a parameter, to a score [B, L]. Higher is kept first.
SCORES: dict[str, Callable[..., jax.Array]] = {}


def register(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a function a score under its own name. Its parameters say which signals it needs.

    Raises:
      ValueError: a parameter is no signal, or the name is that of a score of this module.
    """
    name = function.__name__
    if name == NO_SCORE or getattr(SCORES.get(name), "__module__", None) == __name__:
        raise ValueError(f"there is a score {name!r} already: give the function another name")
    for parameter in inspect.signature(function).parameters:
        if parameter not in Signals._fields:
            raise ValueError(f"score {name!r}: {parameter!r} is none of the signals {', '.join(Signals._fields)}")
    SCORES[name] = function
    return function


@register
def excess(policy_loss_BL, reference_loss_BL):
    """What the reference knows better (equation 3)."""
    return policy_loss_BL - reference_loss_BL


@register
def reference_loss(reference_loss_BL):
    """What the reference finds likely (section 3.4)."""
    return -reference_loss_BL


@register
def reference_entropy(reference_entropy_BL):
    """Where the reference is sure of what comes (section 3.4)."""
    return -reference_entropy_BL


@register
def policy_loss(policy_loss_BL):
    """What the model in training finds hard."""
    return policy_loss_BL


@register
def policy_entropy(policy_entropy_BL):
    """Where the model in training is in doubt."""
    return policy_entropy_BL


@register
def random(random_BL):
    """The control arm, which trains on as many tokens as SLM does."""
    return random_BL


@register
def external(external_BL):
    """What the user says."""
    return external_BL


def signals_of(name: str) -> tuple[str, ...]:
    """The signals that a score needs."""
    return tuple(inspect.signature(SCORES[name]).parameters)


def evaluate(name: str, signals: Signals) -> jax.Array:
    """A score, float32 [B, L]. No gradient passes through it."""
    score_BL = SCORES[name](**{signal: getattr(signals, signal) for signal in signals_of(name)})
    return jax.lax.stop_gradient(score_BL).astype(jnp.float32)
