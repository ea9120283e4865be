"""The selection against plain numpy and exact fractions."""

import functools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax import selection, sharding


def numpy_selection(score, eligible, ratio):
    """Eligible tokens by falling score, ties by index, the first ceil(ratio * eligible) of them."""
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
    selected = select(jnp.array(score.reshape(8, 15)), jnp.array(eligible.reshape(8, 15)), ratio)
    np.testing.assert_array_equal(np.ravel(selected), expected)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4, 1)


@pytest.mark.parametrize("select", BOTH)
@pytest.mark.parametrize("kind", ["normal", "all equal", "one eligible", "empty shards"])
def test_on_a_mesh_it_is_the_same(select, kind, mesh):
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
        selected = jax.jit(functools.partial(select, ratio=0.6))(*placed)
    np.testing.assert_array_equal(np.ravel(selected), numpy_selection(score.ravel(), eligible.ravel(), 0.6))


def moved(select, mesh):
    """The number of elements that each collective of the compiled selection hands to each device."""
    rows = sharding.batch_sharding(mesh)
    arguments = (jax.ShapeDtypeStruct((64, 1024), dtype, sharding=rows) for dtype in (jnp.float32, bool))
    with jax.set_mesh(mesh):
        hlo = jax.jit(functools.partial(select, ratio=0.6), out_shardings=rows).lower(*arguments).compile().as_text()
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", hlo
    )
    sizes = re.findall(r"\[([\d,]*)\]", " ".join(shape for shape, _ in found))
    return [math.prod(int(size) for size in text.split(",") if size) for text in sizes]


def test_bisection_moves_nothing_but_counts(mesh):
    assert set(moved(selection.select_by_bisection, mesh)) == {1}
    assert max(moved(selection.select_by_sort, mesh)) <= 64 * 1024


def test_many_tokens_are_selected_by_bisection(monkeypatch):
    called = []
    monkeypatch.setattr(selection, "select_by_bisection", lambda *arguments: called.append(arguments))
    few, many = (jnp.zeros((rows, selection.SORTED_TOKENS // 2)) for rows in (2, 3))
    selection.select(few, few == 0, 0.5, "global")
    assert not called
    selection.select(many, many == 0, 0.5, "global")
    assert called


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
