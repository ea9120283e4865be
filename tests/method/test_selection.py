"""The selection compared with plain NumPy and exact fractions."""

import functools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import selection_of

from rho1_jax.method import selection
from rho1_jax.method.signals import COMPUTED_SIGNALS
from rho1_jax.runtime import sharding


def numpy_selection(score, eligible, ratio):
    """The first ceil(ratio * eligible) eligible tokens by descending score, ties by index."""
    order = [i for i in np.argsort(-score, kind="stable") if eligible[i]]
    chosen = np.zeros(score.shape, bool)
    chosen[order[: math.ceil(Fraction(str(ratio)) * int(eligible.sum()))]] = True
    return chosen


BOTH = [selection.select_by_sort, selection.select_by_bisection]
SCORES = {
    "normal": lambda rng: rng.normal(size=120).astype(np.float32),
    "distinct": lambda rng: rng.permutation(120).astype(np.float32),
    "ties": lambda rng: rng.integers(0, 4, 120).astype(np.float32),
    "all equal": lambda rng: np.zeros(120, np.float32),
    "denormal": lambda rng: (rng.integers(-3, 4, 120) * np.float32(1e-45)).astype(np.float32),
    "signed zeros": lambda rng: np.where(rng.random(120) < 0.5, np.float32(0.0), np.float32(-0.0)),
    "infinite": lambda rng: rng.choice(np.array([-np.inf, np.inf, -3e38, 0.0, 1e-45], np.float32), 120),
}


@pytest.mark.parametrize("ratio", [0.0001, 0.25, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("select", BOTH)
def test_selects_exactly_the_top_k_in_order(select, kind, ratio):
    rng = np.random.default_rng(1)
    score, eligible = SCORES[kind](rng), rng.random(120) < 0.7
    expected = numpy_selection(score, eligible, ratio)
    selected = select(jnp.array(score.reshape(8, 15)), jnp.array(eligible.reshape(8, 15)), selection.ratio_units(ratio))
    np.testing.assert_array_equal(np.ravel(selected), expected)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4, 1)


@pytest.mark.parametrize("select", BOTH)
@pytest.mark.parametrize("kind", ["normal", "all equal", "one eligible", "empty shards"])
def test_a_mesh_selects_the_same_tokens(select, kind, mesh):
    rng = np.random.default_rng(3)
    score = np.zeros((16, 40), np.float32) if kind == "all equal" else rng.normal(size=(16, 40)).astype(np.float32)
    eligible = rng.random((16, 40)) < 0.8
    if kind == "one eligible":
        eligible[:] = False
        eligible[9, 7] = True
    if kind == "empty shards":  # two rows lie on each device
        eligible[2:4], eligible[10:] = False, False
    placed = jax.device_put((score, eligible), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        selected = jax.jit(functools.partial(select, units=6000))(*placed)
    np.testing.assert_array_equal(np.ravel(selected), numpy_selection(score.ravel(), eligible.ravel(), 0.6))


def moved(select, mesh):
    """The number of elements each device receives in each collective of the compiled selection."""
    rows = sharding.batch_sharding(mesh)
    arguments = (jax.ShapeDtypeStruct((64, 1024), dtype, sharding=rows) for dtype in (jnp.float32, bool))
    with jax.set_mesh(mesh):
        hlo = jax.jit(functools.partial(select, units=6000), out_shardings=rows).lower(*arguments).compile().as_text()
    collectives = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", hlo
    )
    sizes = re.findall(r"\[([\d,]*)\]", " ".join(shape for shape, _ in collectives))
    return [math.prod(int(size) for size in text.split(",") if size) for text in sizes]


def test_bisection_communicates_only_counts(mesh):
    assert set(moved(selection.select_by_bisection, mesh)) == {1}
    assert max(moved(selection.select_by_sort, mesh)) <= 64 * 1024


def test_many_tokens_are_selected_by_bisection(monkeypatch):
    called = []
    monkeypatch.setattr(selection, "select_by_bisection", lambda *arguments: called.append(arguments))
    few, many = (jnp.zeros((rows, selection.SORTED_TOKENS // 2)) for rows in (2, 3))
    selection.select(few, few == 0, 5000, "global")
    assert not called
    selection.select(many, many == 0, 5000, "global")
    assert called


@pytest.mark.parametrize("ratio", ["0.6", "0.7", "0.1", "0.3333", "0.0001", "1.0"])
def test_count_is_the_exact_ceiling(ratio):
    for eligible in [0, 1, 2, 3, 5, 10, 4095, 9_999, 10_000, 10_001, 1_048_576, 30_000_001, 2**31 - 1]:
        expected = math.ceil(Fraction(ratio) * eligible)
        assert selection.selected_count(eligible, selection.ratio_units(float(ratio))) == expected
        traced = jax.jit(lambda count: selection.selected_count(count, selection.ratio_units(float(ratio))))(
            jnp.int32(eligible)
        )
        assert int(traced) == expected


def test_at_least_one_token_is_selected_if_one_is_eligible():
    eligible = np.zeros((2, 8), bool)
    assert not selection.select(np.zeros((2, 8), np.float32), eligible, 1, "global").any()
    eligible[1, 3] = True
    selected = selection.select(np.full((2, 8), -np.inf, np.float32), eligible, 1, "global")
    np.testing.assert_array_equal(selected, eligible)


def test_order_is_that_of_lax_top_k():
    score = jnp.array([[1.0, 2.0, 2.0, 0.0], [2.0, 1.0, 2.0, 1.0]])
    _, order = jax.lax.top_k(score.ravel(), 3)
    selected = selection.select(score, jnp.ones_like(score, bool), 3750, "global")
    assert sorted(order.tolist()) == np.flatnonzero(selected).tolist() == [1, 2, 4]


def test_scope_sequence_ranks_each_row_by_itself():
    rng = np.random.default_rng(2)
    score, eligible = rng.normal(size=(6, 10)).astype(np.float32), rng.random((6, 10)) < 0.8
    selected = selection.select(score, eligible, 5000, "sequence")
    for row in range(6):
        np.testing.assert_array_equal(selected[row], numpy_selection(score[row], eligible[row], 0.5))


def test_eligible_targets_belong_to_the_document_of_their_input():
    segment_ids = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 4, 4, 4]])
    expected = [[True, False, True, True, False, False], [False, False, True, False, True, True]]
    np.testing.assert_array_equal(selection.eligible_targets(segment_ids), expected)


def weights(signals, eligible, step=0, steps=10, **changes):
    return np.asarray(selection_of(**changes).weights(signals, jnp.asarray(eligible), jnp.int32(step), steps))


@pytest.fixture(scope="module")
def drawn():
    """Signals of 8 x 40 tokens, and which of them are eligible."""
    rng = np.random.default_rng(5)
    names = (*COMPUTED_SIGNALS, "external_BL")
    signals = {name: jnp.asarray(rng.normal(size=(8, 40)), jnp.float32) for name in names}
    return signals, rng.random((8, 40)) < 0.8


def kept_by(score, eligible, ratio):
    return numpy_selection(np.asarray(score).ravel(), eligible.ravel(), ratio).reshape(eligible.shape)


@pytest.mark.parametrize("sign", ["&", "|"])
def test_two_scores_together_each_with_its_ratio(drawn, sign):
    signals, eligible = drawn
    first = kept_by(-signals["reference_loss_BL"], eligible, 0.7)
    second = kept_by(-signals["reference_entropy_BL"], eligible, 0.4)
    kept = weights(signals, eligible, score=f"reference_loss:0.7 {sign} reference_entropy:0.4")
    np.testing.assert_array_equal(kept, first & second if sign == "&" else first | second)
    both, either = (first & second).sum(), (first | second).sum()
    assert both + either == first.sum() + second.sum() and kept.sum() == (both if sign == "&" else either)


def test_a_score_without_a_ratio_uses_that_of_the_run(drawn):
    signals, eligible = drawn
    kept = weights(signals, eligible, score="excess & external:0.5", ratio=0.3)
    excess = signals["policy_loss_BL"] - signals["reference_loss_BL"]
    expected = kept_by(excess, eligible, 0.3) & kept_by(signals["external_BL"], eligible, 0.5)
    np.testing.assert_array_equal(kept, expected)


def test_threshold_keeps_scores_at_or_above_it(drawn):
    signals, eligible = drawn
    signals = signals | {"external_BL": jnp.round(signals["external_BL"])}
    kept = weights(signals, eligible, score="external", rule="threshold", threshold=1.0)
    np.testing.assert_array_equal(kept, eligible & (np.asarray(signals["external_BL"]) >= 1.0))


def test_soft_weights_are_a_sigmoid_of_the_score(drawn):
    signals, eligible = drawn
    kept = weights(signals, eligible, score="external", rule="soft", threshold=0.5, temperature=2.0)
    expected = 1 / (1 + np.exp(-(np.asarray(signals["external_BL"], np.float64) - 0.5) / 2.0))
    np.testing.assert_allclose(kept, np.where(eligible, expected, 0), rtol=1e-6)


def test_soft_weights_become_the_threshold_as_the_temperature_falls(drawn):
    signals, eligible = drawn
    soft = weights(signals, eligible, score="excess", rule="soft", threshold=0.1, temperature=1e-6)
    hard = weights(signals, eligible, score="excess", rule="threshold", threshold=0.1)
    np.testing.assert_allclose(soft, hard, atol=1e-6)


def test_weights_from_a_column(drawn):
    signals, eligible = drawn
    kept = weights(signals, eligible, score="external", rule="weight")
    np.testing.assert_array_equal(kept, np.where(eligible, np.maximum(signals["external_BL"], 0), 0))


STEPS = 11


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [6000] * 11),
        ({"schedule": "linear"}, [10_000, 9600, 9200, 8800, 8400, 8000, 7600, 7200, 6800, 6400, 6000]),
        ({"schedule": "linear", "first_ratio": 0.2}, [2000 + 400 * step for step in range(11)]),
        ({"schedule": "cosine"}, [10_000, 9902, 9618, 9176, 8618, 8000, 7382, 6824, 6382, 6098, 6000]),
        ({"schedule": "stepwise", "stairs": 2}, [10_000] * 5 + [6000] * 6),
        ({"schedule": "stepwise", "stairs": 5}, [10_000] * 2 + [9000] * 2 + [8000] * 2 + [7000] * 2 + [6000] * 3),
        # Two dense steps come before the schedule, which then has nine.
        (
            {"schedule": "linear", "dense_fraction": 0.2},
            [10_000] * 3 + [9500, 9000, 8500, 8000, 7500, 7000, 6500, 6000],
        ),
    ],
)
def test_schedules_of_the_ratio(drawn, changes, expected):
    rule = selection_of(**changes)
    assert rule.units(STEPS).tolist() == expected
    signals, eligible = drawn
    for step in (0, 3, STEPS - 1):
        kept = np.asarray(rule.weights(signals, jnp.asarray(eligible), jnp.int32(step), STEPS))
        assert kept.sum() == math.ceil(Fraction(expected[step], 10_000) * int(eligible.sum()))


@pytest.mark.parametrize("rule", ["ratio", "threshold", "soft", "weight"])
def test_dense_steps_train_on_everything(drawn, rule):
    signals, eligible = drawn
    changes = {"score": "external", "rule": rule, "threshold": 3.0, "dense_fraction": 0.3}
    np.testing.assert_array_equal(weights(signals, eligible, step=2, **changes), eligible)
    assert (weights(signals, eligible, step=3, **changes) != eligible).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": "exces"}, "score='exces': 'exces' is not one of none, excess, reference_loss"),
        ({"score": "excess &"}, "'' is not one of"),
        ({"score": "excess & random | external"}, "both & and |"),
        ({"score": "excess:1.5"}, "score='excess:1.5': a selection ratio"),
        ({"score": "excess & random", "rule": "soft"}, "needs rule='ratio', not 'soft'"),
        ({"rule": "top"}, "rule='top' is not one of ratio, threshold, soft, weight"),
        ({"schedule": "square"}, "schedule='square' is not one of constant"),
        ({"first_ratio": 0.0}, "first_ratio: a selection ratio"),
        ({"stairs": 1}, "stairs=1"),
        ({"dense_fraction": 1.0}, "dense_fraction=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        selection_of(**changes).check()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, 0.00001])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        selection.ratio_units(ratio)
