"""Selective Language Modeling: score every token, keep the best ones.

Rho-1 (arXiv 2404.07965), section 2.2 and equation 4. Everything here is a pure function of arrays.

Shapes: B batch rows, L sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# Selection ratios are exact multiples of 1 / RATIO_UNITS, so that ceil(ratio * eligible) is integer arithmetic.
RATIO_UNITS = 10_000

# Up to so many tokens are sorted; above, they are counted (`python -m tools.benchmark --what=selection` measures both).
SORTED_TOKENS = 2**12

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


def count(mask: jax.Array) -> jax.Array:
    """How many are true. The barrier keeps the TPU compiler from fusing mask and sum, which fails in some shapes."""
    return jax.lax.optimization_barrier(mask).sum()


def _keys(score: jax.Array, eligible: jax.Array) -> jax.Array:
    """Scores as integers of the same order: -0.0 equals 0.0, and what is not eligible comes after minus infinity."""
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    lowest = jnp.iinfo(jnp.int32).min
    bits = jnp.where(bits == lowest, 0, bits)
    # Below zero, the magnitude's bits grow as the float falls.
    return jnp.where(eligible, jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits), lowest)


def select_by_sort(score: jax.Array, eligible: jax.Array, ratio: float) -> jax.Array:
    """The selection [B, L] among all tokens by `jax.lax.top_k`, for which every device gets all scores."""
    _, order_K = jax.lax.top_k(_keys(score, eligible).ravel(), selected_count(score.size, ratio))
    kept_K = jnp.arange(order_K.size) < selected_count(count(eligible), ratio)
    return jnp.zeros(score.size, bool).at[order_K].set(kept_K).reshape(score.shape)


def select_by_bisection(score: jax.Array, eligible: jax.Array, ratio: float) -> jax.Array:
    """The same selection without sort or gather: 64 times, tokens are counted, and only counts cross the mesh.

    From the highest bit to the lowest, the largest threshold is built that k tokens still reach; then, among tokens of
    exactly that score, the flat index below which as many lie as are still missing.
    """
    k = selected_count(count(eligible), ratio)
    key = jax.lax.bitcast_convert_type(_keys(score, eligible), jnp.uint32) ^ jnp.uint32(1 << 31)

    def largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The largest 32-bit number for which `holds`, which is true up to some number and false after it."""

        def refine(n, found):
            candidate = found | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
            return jnp.where(holds(candidate), candidate, found)

        return jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))

    threshold = largest(lambda candidate: (eligible & (key >= candidate)).sum() >= k)
    above, equal = eligible & (key > threshold), eligible & (key == threshold)
    missing = k - count(above)
    index = jax.lax.iota(jnp.uint32, score.size).reshape(score.shape)
    last = largest(lambda candidate: (equal & (index < candidate)).sum() <= missing)
    return above | (equal & (index < last))


def select(score_BL: jax.Array, eligible_BL: jax.Array, ratio: float, scope: str) -> jax.Array:
    """The top `ratio` of the eligible tokens by score (equation 4).

    Exactly k = ceil(ratio * eligible) tokens are selected: higher score first, ties to the lower flat index, as
    `jax.lax.top_k` orders them. Up to SORTED_TOKENS tokens are sorted; more are selected by counting, the same ones.

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
        return jax.vmap(functools.partial(select_by_sort, ratio=ratio))(score_BL, eligible_BL)
    among_all = select_by_sort if score_BL.size <= SORTED_TOKENS else select_by_bisection
    return among_all(score_BL, eligible_BL, ratio)
