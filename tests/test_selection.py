"""The selection against plain numpy and exact fractions."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax import selection


def numpy_selection(score, eligible, ratio):
    """Eligible tokens by falling score, ties by index, the first ceil(ratio * eligible) of them."""
    order = [i for i in np.argsort(-score, kind="stable") if eligible[i]]
    chosen = np.zeros(score.shape, bool)
    chosen[order[: math.ceil(Fraction(str(ratio)) * int(eligible.sum()))]] = True
    return chosen


SCORES = {
    "distinct": lambda rng: rng.permutation(120).astype(np.float32),
    "ties": lambda rng: rng.integers(0, 4, 120).astype(np.float32),
    "all equal": lambda rng: np.zeros(120, np.float32),
    "infinite": lambda rng: rng.choice(np.array([-np.inf, np.inf, -3e38, 0.0, 1e-45], np.float32), 120),
}


@pytest.mark.parametrize("ratio", [0.0001, 0.25, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("kind", SCORES)
def test_selects_exactly_the_top_k_in_order(kind, ratio):
    rng = np.random.default_rng(1)
    score, eligible = SCORES[kind](rng), rng.random(120) < 0.7
    # Scores below the lowest finite number count as that number.
    ranked = np.maximum(score, np.finfo(np.float32).min)
    expected = numpy_selection(ranked, eligible, ratio)
    selected = selection.select(score.reshape(8, 15), eligible.reshape(8, 15), ratio, "global")
    np.testing.assert_array_equal(np.ravel(selected), expected)


@pytest.mark.parametrize("ratio", ["0.6", "0.7", "0.1", "0.3333", "0.0001", "1.0"])
def test_count_is_the_exact_ceiling(ratio):
    for eligible in [0, 1, 2, 3, 5, 10, 4095, 9_999, 10_000, 10_001, 1_048_576, 30_000_001, 2**31 - 1]:
        expected = math.ceil(Fraction(ratio) * eligible)
        assert selection.selected_count(eligible, float(ratio)) == expected
        traced = jax.jit(lambda count: selection.selected_count(count, float(ratio)))(jnp.int32(eligible))
        assert int(traced) == expected


def test_at_least_one_is_selected_when_one_is_eligible():
    eligible = np.zeros((2, 8), bool)
    assert not selection.select(np.zeros((2, 8), np.float32), eligible, 0.0001, "global").any()
    eligible[1, 3] = True
    selected = selection.select(np.full((2, 8), -np.inf, np.float32), eligible, 0.0001, "global")
    np.testing.assert_array_equal(selected, eligible)


def test_order_is_that_of_lax_top_k():
    score = jnp.array([[1.0, 2.0, 2.0, 0.0], [2.0, 1.0, 2.0, 1.0]])
    _, order = jax.lax.top_k(score.ravel(), 3)
    selected = selection.select(score, jnp.ones_like(score, bool), 3 / 8, "global")
    assert sorted(order.tolist()) == np.flatnonzero(selected).tolist() == [1, 2, 4]


def test_scope_sequence_ranks_each_row_by_itself():
    rng = np.random.default_rng(2)
    score, eligible = rng.normal(size=(6, 10)).astype(np.float32), rng.random((6, 10)) < 0.8
    selected = selection.select(score, eligible, 0.5, "sequence")
    for row in range(6):
        np.testing.assert_array_equal(selected[row], numpy_selection(score[row], eligible[row], 0.5))


def test_eligible_targets_lie_in_their_inputs_document():
    segment_ids = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 4, 4, 4]])
    expected = [[True, False, True, True, False, False], [False, False, True, False, True, True]]
    np.testing.assert_array_equal(selection.eligible_targets(segment_ids), expected)


def test_signs_higher_is_kept_first():
    signals = selection.Signals(jnp.array([[3.0, 1.0]]), jnp.array([[1.0, 4.0]]), jnp.array([[0.2, 0.7]]))
    np.testing.assert_array_equal(selection.SCORES["excess"].function(signals), [[2.0, -3.0]])
    np.testing.assert_array_equal(selection.SCORES["random"].function(signals), signals.random_BL)
    assert selection.SCORES["none"].function is None


def test_scores_pass_no_gradient():
    def picked(score):
        return jnp.where(selection.select(score, jnp.ones((2, 4), bool), 0.5, "global"), score * 2, 0).sum()

    score = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(jax.grad(picked)(score), [[0, 0, 0, 0], [2, 2, 2, 2]])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, 0.00001])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        selection.ratio_units(ratio)
