"""Selective Language Modeling: score every token, keep the best ones.

Rho-1 (arXiv 2404.07965), section 2.2 and equation 4. Everything here is a pure function of arrays.

Shapes: B batch rows, L sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# Selection ratios are exact multiples of 1 / RATIO_UNITS, so that ceil(ratio * eligible) is integer arithmetic.
RATIO_UNITS = 10_000

SCOPES = ("global", "microbatch", "sequence")


Count = TypeVar("Count", int, jax.Array)


class Signals(NamedTuple):
    """What a score may be made from: arrays [B, L], losses in nats. Those that the score does not need are None."""

    policy_loss_BL: Any
    reference_loss_BL: Any
    random_BL: Any


class Score(NamedTuple):
    """A named way to rank tokens: a function of the signals, and which of the signals it needs."""

    function: Callable[[Signals], jax.Array] | None
    needs_reference: bool = False
    needs_random: bool = False


def excess_loss(signals: Signals) -> jax.Array:
    """Policy loss minus reference loss [B, L], in nats (equation 3)."""
    return signals.policy_loss_BL - signals.reference_loss_BL


def random_score(signals: Signals) -> jax.Array:
    """Uniform noise [B, L]: the control arm, which trains on as many tokens as SLM does."""
    return signals.random_BL


# Higher is kept first. "none" selects every eligible token: causal language modeling (CLM).
SCORES = {
    "none": Score(None),
    "random": Score(random_score, needs_random=True),
    "excess": Score(excess_loss, needs_reference=True),
}


def eligible_targets(segment_ids_BM: jax.Array, responses_BM: jax.Array | None = None) -> jax.Array:
    """Which targets may be selected or counted.

    Args:
      segment_ids_BM: [B, L + 1] document numbers within each row; 0 is padding.
      responses_BM: [B, L + 1] bool, in fine-tuning: the token is part of a response.

    Returns:
      [B, L] bool: the target is no padding, lies in the same document as its input and, in fine-tuning, is part of a
      response.
    """
    inputs_BL, targets_BL = segment_ids_BM[:, :-1], segment_ids_BM[:, 1:]
    eligible_BL = (targets_BL != 0) & (targets_BL == inputs_BL)
    return eligible_BL if responses_BM is None else eligible_BL & responses_BM[:, 1:]


def ratio_units(ratio: float) -> int:
    """The ratio as an integer count of 1 / RATIO_UNITS. Raises ValueError unless 0 < ratio <= 1."""
    units = round(ratio * RATIO_UNITS)
    if not 0 < units <= RATIO_UNITS:
        raise ValueError(f"a selection ratio lies in [{1 / RATIO_UNITS}, 1], not {ratio}")
    return units


def selected_count(eligible_count: Count, ratio: float) -> Count:
    """ceil(ratio * eligible), exactly and without overflow: at least 1 when anything is eligible."""
    units = ratio_units(ratio)
    whole, rest = eligible_count // RATIO_UNITS, eligible_count % RATIO_UNITS
    return whole * units + -(-rest * units // RATIO_UNITS)


def _select_flat(score_T: jax.Array, eligible_T: jax.Array, ratio: float) -> jax.Array:
    # An eligible score of -inf must still come before every ineligible token.
    lowest = jnp.finfo(score_T.dtype).min
    ranked_T = jnp.where(eligible_T, jnp.where(score_T < lowest, lowest, score_T), -jnp.inf)
    _, order_K = jax.lax.top_k(ranked_T, selected_count(score_T.size, ratio))
    kept_K = jnp.arange(order_K.size) < selected_count(eligible_T.sum(), ratio)
    return jnp.zeros_like(eligible_T).at[order_K].set(kept_K)


def select(score_BL: jax.Array, eligible_BL: jax.Array, ratio: float, scope: str) -> jax.Array:
    """The top `ratio` of the eligible tokens by score (equation 4).

    Exactly k = ceil(ratio * eligible) tokens are selected: higher score first, ties to the lower flat index, as
    `jax.lax.top_k` orders them.

    Args:
      score_BL: [B, L] scores, higher is kept first. No gradient passes through them.
      eligible_BL: [B, L] bool.
      ratio: share of the eligible tokens to keep, in (0, 1].
      scope: "sequence" ranks each row by itself; otherwise all rows are ranked together.

    Returns:
      [B, L] bool.
    """
    score_BL = jax.lax.stop_gradient(score_BL)
    if scope == "sequence":
        return jax.vmap(lambda score_L, eligible_L: _select_flat(score_L, eligible_L, ratio))(score_BL, eligible_BL)
    return _select_flat(score_BL.ravel(), eligible_BL.ravel(), ratio).reshape(score_BL.shape)
