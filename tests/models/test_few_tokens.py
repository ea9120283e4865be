"""Backward passes through few tokens, against the rule written plainly."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, random_batch, tiny

from rho1_jax.configs.default import BackwardConfig
from rho1_jax.models import decoder, few_tokens
from rho1_jax.models.few_tokens import ROWS, FewTokens, Probe, kept_tokens
from rho1_jax.models.forward import row_losses, rows_of
from rho1_jax.runtime.sharding import make_mesh

B, L = 8, 16


def drawn_scales(energy, k, uniform):
    """Multipliers of the cotangents of T tokens under priority sampling, in NumPy: 0 for those left out."""
    norm = np.sqrt(energy)
    priority, scale = norm / uniform, np.zeros_like(norm)
    order = np.argsort(-priority, kind="stable")
    for t in order[:k]:
        scale[t] = max(norm[t], priority[order[k]]) / norm[t]
    return scale


def gate(y, backward, groups, mark):
    """Returns y. In the backward pass, zeroes the cotangents of the tokens that the rule leaves out."""

    @jax.custom_vjp
    def identity(y, mark):
        return y

    def back(marks, bar):
        energy_GT = (bar**2).sum(axis=tuple(range(2, bar.ndim))).reshape(groups, -1)
        if backward.choice == "selected":
            energy_GT = jnp.where(marks.reshape(groups, -1) > 0, energy_GT, 0)
        rank_GT = jnp.argsort(jnp.argsort(-energy_GT))
        is_kept = (rank_GT < kept_tokens(backward.tokens, energy_GT.shape[1])) & (energy_GT > 0)
        return bar * is_kept.reshape(B, L, *[1] * (bar.ndim - 2)), None

    identity.defvjp(lambda y, mark: (y, mark), back)
    return identity(y, mark)


def expected_gradient(monkeypatch, config, params, rows, weight, backward, groups=1):
    """The gradient of the weighted loss, with whole products whose cotangents pass through `gate`."""

    class Gated(FewTokens):
        def __call__(self, functions, params, x, specs):
            for function in functions:
                x = function(params, x)
            return gate(x, backward, groups, weight)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "FewTokens", Gated)
        return gradient(config, params, rows, weight, backward)


def gradient(config, params, rows, weight, backward, key=0):
    graphdef = decoder.build(config)

    def loss(params):
        probe = Probe.of(backward, jnp.zeros((config.layers, 2)), jax.random.key(key)) if backward else None
        return (row_losses(graphdef, params, rows, False, probe)[0] * weight).sum()

    return jax.jit(jax.grad(loss))(params)


def inputs(config, seed=0, dtype=jnp.float64):
    batch = random_batch(B, L, seed)
    rows = rows_of(jax.tree.map(jnp.asarray, batch), document_mask=True)
    weight = jnp.asarray(np.random.default_rng(seed).random((B, L)) < 0.5) & rows.eligible
    params = jax.tree.map(lambda x: 2 * x.astype(dtype), decoder.init_params(config, seed))
    return params, rows, weight.astype(dtype)


def relative_error(tree, expected):
    error = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)))
    return math.sqrt(error / sum(float(jnp.sum(b**2)) for b in jax.tree.leaves(expected)))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("layers, remat", [(1, "none"), (12, "none"), (12, "dots"), (12, "full")])
@pytest.mark.parametrize("choice", ["largest", "selected"])
def test_the_gradient_is_that_of_the_rule(float64, monkeypatch, choice, layers, remat):
    config = tiny(layers=layers, compute_dtype="float64", remat=remat)
    params, rows, weight = inputs(config)
    backward = BackwardConfig(0.2, choice)
    ours = gradient(config, params, rows, weight, backward)
    assert relative_error(ours, expected_gradient(monkeypatch, config, params, rows, weight, backward)) < 1e-10
    assert relative_error(ours, gradient(config, params, rows, weight, None)) > 0.01


@pytest.mark.parametrize("choice", ["largest", "drawn"])
def test_all_tokens_give_the_exact_gradient(float64, choice):
    config = tiny(layers=3, compute_dtype="float64")
    params, rows, weight = inputs(config)
    exact = gradient(config, params, rows, weight, None)
    assert relative_error(gradient(config, params, rows, weight, BackwardConfig(1.0, choice)), exact) < 1e-10


def test_as_many_tokens_as_have_a_cotangent_give_the_exact_gradient(float64):
    # In one layer, and attention within documents of one token, only the selected tokens have cotangents.
    config = tiny(layers=1, compute_dtype="float64")
    params, rows, weight = inputs(config)
    rows = rows._replace(segment_ids=jnp.broadcast_to(1 + jnp.arange(L), (B, L)))
    exact = gradient(config, params, rows, weight, None)
    share = float(weight.sum()) / weight.size
    assert 0.2 < share < 0.6
    for choice in ("largest", "drawn", "selected"):
        assert relative_error(gradient(config, params, rows, weight, BackwardConfig(share, choice)), exact) < 1e-10
    fewer = BackwardConfig(share - 1 / weight.size, "largest")
    assert relative_error(gradient(config, params, rows, weight, fewer), exact) > 1e-4


def test_the_mean_of_400_draws_is_the_exact_gradient():
    config = tiny(layers=2)
    params, rows, weight = inputs(config, dtype=jnp.float32)
    exact, graphdef = gradient(config, params, rows, weight, None), decoder.build(config)

    @jax.jit
    def drawn(key):
        def loss(params):
            probe = Probe.of(BackwardConfig(0.5, "drawn"), jnp.zeros((config.layers, 2)), key)
            return (row_losses(graphdef, params, rows, False, probe)[0] * weight).sum()

        return jax.grad(loss)(params)

    # The projection on the exact gradient has a mean and a standard error that a test can hold it to.
    norm = math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(exact)))
    draws = [drawn(jax.random.key(n)) for n in range(400)]
    along = [sum(float(jnp.sum(a * b)) for a, b in zip(*map(jax.tree.leaves, (draw, exact)))) / norm for draw in draws]
    assert abs(np.mean(along) - norm) < 4 * np.std(along) / math.sqrt(len(along))
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *draws)
    single = np.mean([relative_error(draw, exact) ** 2 for draw in draws])
    assert relative_error(mean, exact) ** 2 < 2 * single / len(draws)


def test_drawn_tokens_have_the_weights_of_priority_sampling():
    energy, key = np.random.default_rng(0).random((B, L)).astype(np.float32) ** 4, jax.random.key(3)
    index, place, scale, energies = few_tokens.choose(jnp.asarray(energy), None, BackwardConfig(0.3, "drawn"), key)
    uniform = np.asarray(few_tokens._uniform(jax.random.key_data(key), energy.size))
    expected = drawn_scales(energy.ravel(), kept_tokens(0.3, energy.size), uniform)
    ours = np.zeros(energy.size)
    ours[np.asarray(index)] = np.asarray(scale)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    kept = np.asarray(place).ravel() < len(index)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(index))
    np.testing.assert_allclose(energies, [energy.ravel()[~kept].sum(), energy.sum()], rtol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_each_device_chooses_among_its_own_tokens(float64, monkeypatch, axes):
    config = tiny(compute_dtype="float64")
    params, rows, weight = inputs(config)
    backward, groups = BackwardConfig(0.4, "largest"), axes["data"] * axes["fsdp"]
    expected = expected_gradient(monkeypatch, config, params, rows, weight, backward, groups)
    with jax.set_mesh(make_mesh(**axes)):
        ours = gradient(config, params, rows, weight, backward)
    assert relative_error(jax.device_get(ours), jax.device_get(expected)) < 1e-5  # norms and losses are in float32


@pytest.mark.parametrize("remat, recomputed", [("none", 0), ("full", 2)])
def test_products_of_the_backward_pass_have_k_rows(remat, recomputed):
    config = tiny(layers=1, ff_width=40, remat=remat)
    params, rows, weight = inputs(config, dtype=jnp.float32)
    graphdef, k = decoder.build(config), kept_tokens(0.3, B * L)

    def loss(params, backward):
        probe = Probe.of(backward, jnp.zeros((1, 2)), jax.random.key(0)) if backward else None
        return (row_losses(graphdef, params, rows, False, probe)[0] * weight).sum()

    def products(backward):
        text = jax.jit(jax.grad(functools.partial(loss, backward=backward))).lower(params).as_text()
        lines = [line for line in text.splitlines() if "dot_general" in line and "40x" in line + "x"]
        return [line for line in lines if "x40x" in line or "<40x" in line]

    exact, few = products(None), products(BackwardConfig(0.3))
    # Three products forward, six backward; recomputed are what the activation applies to and its factor.
    assert sum(f"{B * L}x" in line for line in exact) == 9 + recomputed
    assert sum(f"{B * L}x" in line for line in few) == 3
    assert sum(f"{k}x" in line or f"x{k}" in line for line in few) >= 6 + recomputed


def test_a_probe_reports_what_was_left_out():
    config = tiny(layers=3)
    params, rows, weight = inputs(config, dtype=jnp.float32)
    graphdef = decoder.build(config)

    def report(tokens):
        backward = BackwardConfig(tokens)

        def loss(energy):
            probe = Probe.of(backward, energy, jax.random.key(0))
            return (row_losses(graphdef, params, rows, False, probe)[0] * weight).sum()

        dropped, total = jax.jit(jax.grad(loss))(jnp.zeros((config.layers, 2))).T
        return np.asarray(dropped / total)

    assert (np.abs(report(1.0)) < 1e-5).all()
    some, more = report(0.5), report(0.2)
    assert (some > 0).any() and (more > some).all() and (more < 0.8).all()


def test_unselected_tokens_count_as_left_out():
    energy, mark = jnp.arange(1.0, 11).reshape(1, 10), (jnp.arange(10.0) < 4).reshape(1, 10)
    *_, energies = few_tokens.choose(energy, mark, BackwardConfig(0.8, "selected"), jax.random.key(0))
    np.testing.assert_array_equal(energies, [45, 55])


@pytest.mark.parametrize("choice", ["largest", "drawn", "selected"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_not_left_out(choice, value):
    """A step is skipped for it. `-np.nan` has the sign bit, as inf * 0 has on x86."""
    bar = jnp.ones((1, 10, 3)).at[0, 7].set(value)
    probe = Probe(BackwardConfig(0.2, choice), jnp.zeros(2), jax.random.key(0))

    def product(kernel):
        few = FewTokens(probe, jnp.zeros((1, 10)))
        return few([lambda kernel, x: x @ kernel], kernel, jnp.ones((1, 10, 2)), (ROWS, ROWS)), few.mark

    (kernel_bar,) = jax.vjp(product, jnp.ones((2, 3)))[1]((bar, jnp.ones((1, 10))))
    assert not jnp.isfinite(kernel_bar).any()


def test_the_number_of_tokens():
    assert [kept_tokens(share, 128) for share in (1.0, 0.5, 0.3, 1e-9)] == [128, 64, 39, 1]
    assert kept_tokens(0.1, 30) == 3  # not 4, as 0.1 * 30 gives in floating point


@pytest.mark.slow
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_family(float64, monkeypatch, config):
    config = dataclasses.replace(config, compute_dtype="float64")
    params, rows, weight = inputs(config)
    backward = BackwardConfig(0.3)
    expected = expected_gradient(monkeypatch, config, params, rows, weight, backward)
    ours = gradient(config, params, rows, weight, backward)
    assert relative_error(ours, expected) < 1e-5  # norms are in float32
