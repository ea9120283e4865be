"""Selective Language Modeling: score every token and keep the best.

Rho-1 (arXiv 2404.07965), section 2.2 and equation 4. Everything here is a pure function of arrays.

Shapes: B batch rows, L sequence.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax.configs.default import SelectionConfig
from rho1_jax.method.signals import Signals
from rho1_jax.method.token_scores import NO_SCORE, SCORES, evaluate

# Selection ratios are exact multiples of 1 / RATIO_UNITS, so that ceil(ratio * eligible) is integer arithmetic.
RATIO_UNITS = 10_000

# Up to this many tokens are sorted; more are counted (`python -m tools.benchmark --what=selection` times both).
SORTED_TOKENS = 2**12

SCOPES = ("global", "microbatch", "sequence")
RULES = ("ratio", "threshold", "soft", "weight")
SCHEDULES = ("constant", "linear", "cosine", "stepwise")

Count = TypeVar("Count", int, jax.Array)


class Term(NamedTuple):
    """A score, and the share of the eligible tokens it keeps, in RATIO_UNITS; None: the share of the rule."""

    score: str
    units: int | None


class Selection(SelectionConfig):
    """A selection rule: the `selection` section of a config, and what it computes.

    `score` is a name in SCORES, or "none" for all eligible tokens, which is causal language modeling (CLM). Several
    scores combine with "&" (tokens that every score keeps) or "|" (tokens that any score keeps), each with its own
    ratio after a colon: "reference_loss:0.7 & reference_entropy:0.7" (Table 4).

    `rule` says what a score does. "ratio" keeps the highest scores, "threshold" those of at least `threshold`. "soft"
    weights each token by sigmoid((score - threshold) / temperature), "weight" by the score itself where it is positive.
    """

    def check(self) -> None:
        """Raises ValueError, naming the field, if a value is not allowed."""
        for name, values in (("rule", RULES), ("schedule", SCHEDULES), ("scope", SCOPES)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        for name in ("ratio", "first_ratio"):
            try:
                ratio_units(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if self.stairs < 2:
            raise ValueError(f"stairs={self.stairs} must be at least 2")
        if not 0 <= self.dense_fraction < 1:
            raise ValueError(f"dense_fraction={self.dense_fraction} must be in [0, 1)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if len(self.terms) > 1 and self.rule != "ratio":
            raise ValueError(f"score={self.score!r} needs rule='ratio', not {self.rule!r}")

    @property
    def terms(self) -> list[Term]:
        """The scores the rule combines; empty for "none". Raises ValueError for an unknown score."""
        if self.score == NO_SCORE:
            return []
        if "&" in self.score and "|" in self.score:
            raise ValueError(f"score={self.score!r} has both & and |")
        terms = []
        for part in re.split(r"[&|]", self.score):
            name, colon, ratio = (text.strip() for text in part.partition(":"))
            if name not in SCORES:
                known = ", ".join([NO_SCORE, *SCORES])
                raise ValueError(f"score={self.score!r}: {name!r} is not one of {known}")
            try:
                terms.append(Term(name, ratio_units(float(ratio)) if colon else None))
            except ValueError as error:
                raise ValueError(f"score={self.score!r}: {error}") from None
        return terms

    @property
    def needs(self) -> set[str]:
        """The signals that its scores are computed from."""
        return {name for term in self.terms for name in SCORES.needs(term.score)}

    @property
    def ranks(self) -> bool:
        """True if tokens compete: the weight of each depends on the scores of the others."""
        return self.rule == "ratio" and self.score != NO_SCORE

    def units(self, steps: int) -> np.ndarray:
        """The ratio at each step of the run, int32 [steps] in RATIO_UNITS."""
        first = round(self.dense_fraction * steps)
        progress = np.clip((np.arange(steps) - first) / max(1, steps - 1 - first), 0, 1)
        share = {
            "constant": np.ones(steps),
            "linear": progress,
            "cosine": (1 - np.cos(np.pi * progress)) / 2,
            "stepwise": np.minimum(np.floor(progress * self.stairs), self.stairs - 1) / (self.stairs - 1),
        }[self.schedule]
        first_units, last_units = ratio_units(self.first_ratio), ratio_units(self.ratio)
        return np.rint(first_units + share * (last_units - first_units)).astype(np.int32)

    def weights(self, signals: Signals, eligible_BL: jax.Array, step: jax.Array, steps: int) -> jax.Array:
        """The weight of each token's loss.

        Args:
          signals: at least those that `needs` names.
          eligible_BL: [B, L] bool.
          step: updates done so far, out of `steps`.

        Returns:
          float32 [B, L]: 0 for a token that is not trained on; under "ratio" and "threshold", 1 for all others.
        """
        eligible_weight_BL = eligible_BL.astype(jnp.float32)
        if self.score == NO_SCORE:
            return eligible_weight_BL
        scores = [evaluate(term.score, signals) for term in self.terms]
        if self.rule == "ratio":
            table = self.units(steps)
            scheduled = int(table[0]) if (table == table[0]).all() else jnp.asarray(table)[step]
            masks = [
                select(score_BL, eligible_BL, scheduled if term.units is None else term.units, self.scope)
                for term, score_BL in zip(self.terms, scores)
            ]
            together = jnp.logical_or if "|" in self.score else jnp.logical_and
            weight_BL = functools.reduce(together, masks).astype(jnp.float32)
        else:
            weight_BL = {
                "threshold": lambda score_BL: (score_BL >= self.threshold).astype(jnp.float32),
                "soft": lambda score_BL: jax.nn.sigmoid((score_BL - self.threshold) / self.temperature),
                "weight": lambda score_BL: jnp.maximum(score_BL, 0),
            }[self.rule](scores[0])
            weight_BL = jnp.where(eligible_BL, weight_BL, 0)
        dense_steps = round(self.dense_fraction * steps)
        return jnp.where(step < dense_steps, eligible_weight_BL, weight_BL) if dense_steps else weight_BL


def eligible_targets(segment_ids_BM: jax.Array, responses_BM: jax.Array | None = None) -> jax.Array:
    """The targets that may be selected or counted.

    Args:
      segment_ids_BM: [B, L + 1] document numbers within each row; 0 is padding.
      responses_BM: in fine-tuning, [B, L + 1] bool: the token is part of a response.

    Returns:
      [B, L] bool: the target is not padding, belongs to the same document as its input and, in fine-tuning, is part of
      a response.
    """
    inputs_BL, targets_BL = segment_ids_BM[:, :-1], segment_ids_BM[:, 1:]
    eligible_BL = (targets_BL != 0) & (targets_BL == inputs_BL)
    return eligible_BL if responses_BM is None else eligible_BL & responses_BM[:, 1:]


def ratio_units(ratio: float) -> int:
    """The ratio as an integer count of 1 / RATIO_UNITS. Raises ValueError unless 0 < ratio <= 1."""
    units = round(ratio * RATIO_UNITS)
    if not 0 < units <= RATIO_UNITS:
        raise ValueError(f"a selection ratio must be in [{1 / RATIO_UNITS}, 1], not {ratio}")
    return units


def selected_count(eligible_count: Count, units: Any) -> Count:
    """ceil(ratio * eligible), exactly and without overflow: at least 1 when anything is eligible."""
    whole, rest = eligible_count // RATIO_UNITS, eligible_count % RATIO_UNITS
    return whole * units + -(-rest * units // RATIO_UNITS)


def total(mask: jax.Array) -> jax.Array:
    """The sum of a mask. Without the barrier, the TPU compiler fuses the mask with its sum and fails on some shapes."""
    return jax.lax.optimization_barrier(mask).sum()


def _keys(score: jax.Array, eligible: jax.Array) -> jax.Array:
    """Scores as integers in the same order: -0.0 equals 0.0, and ineligible tokens come after minus infinity."""
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    lowest = jnp.iinfo(jnp.int32).min
    bits = jnp.where(bits == lowest, 0, bits)
    # Among negative floats, a larger magnitude is a smaller number.
    return jnp.where(eligible, jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits), lowest)


def select_by_sort(score: jax.Array, eligible: jax.Array, units: Any) -> jax.Array:
    """The selection [B, L] among all tokens by `jax.lax.top_k`, which gathers all scores on every device."""
    _, order = jax.lax.top_k(_keys(score, eligible).ravel(), score.size)
    kept = jnp.arange(score.size) < selected_count(total(eligible), units)
    return jnp.zeros(score.size, bool).at[order].set(kept).reshape(score.shape)


def select_by_bisection(score: jax.Array, eligible: jax.Array, units: Any) -> jax.Array:
    """The same selection without a sort or a gather: it counts tokens 64 times, and only the counts cross the mesh.

    There are two binary searches over bits, highest bit first. The first finds the largest threshold that at least k
    tokens reach. The second finds the flat index below which tokens that score exactly the threshold complete the k.
    """
    k = selected_count(total(eligible), units)
    key = jax.lax.bitcast_convert_type(_keys(score, eligible), jnp.uint32) ^ jnp.uint32(1 << 31)

    def largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The largest 32-bit number for which `holds` is true; it must be true up to a number and false above."""

        def refine(n, largest_so_far):
            candidate = largest_so_far | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
            return jnp.where(holds(candidate), candidate, largest_so_far)

        return jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))

    threshold = largest(lambda candidate: (eligible & (key >= candidate)).sum() >= k)
    above, equal = eligible & (key > threshold), eligible & (key == threshold)
    missing = k - total(above)
    index = jax.lax.iota(jnp.uint32, score.size).reshape(score.shape)
    last = largest(lambda candidate: (equal & (index < candidate)).sum() <= missing)
    return above | (equal & (index < last))


def select(score_BL: jax.Array, eligible_BL: jax.Array, units: Any, scope: str) -> jax.Array:
    """The top `ratio` of the eligible tokens by score (equation 4).

    Exactly k = ceil(ratio * eligible) tokens are selected: higher score first, ties to the lower flat index, as
    `jax.lax.top_k` orders them. Up to SORTED_TOKENS tokens are sorted; above that, counting selects the same tokens.

    Args:
      score_BL: [B, L] scores; higher is kept first.
      eligible_BL: [B, L] bool.
      units: share of the eligible tokens to keep, in RATIO_UNITS; an int or an integer array.
      scope: "sequence" ranks each row on its own; any other scope ranks all rows together.

    Returns:
      [B, L] bool.
    """
    if scope == "sequence":
        return jax.vmap(functools.partial(select_by_sort, units=units))(score_BL, eligible_BL)
    among_all = select_by_sort if score_BL.size <= SORTED_TOKENS else select_by_bisection
    return among_all(score_BL, eligible_BL, units)
