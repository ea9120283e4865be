"""The ends of the learning rate schedule, and what weight decay and clipping apply to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.training.optimizer import learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(
    learning_rate=0.1, warmup_fraction=10 / 110, final_learning_rate_fraction=0.2, weight_decay=0.5
)


def optimizer_of(config, steps=10):
    return make_optimizer(config, learning_rate_schedule(config, steps))


def test_schedule_warms_up_and_ends_at_the_fraction():
    schedule = learning_rate_schedule(CONFIG, 110)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.05)
    assert float(schedule(10)) == pytest.approx(0.1)
    assert float(schedule(60)) == pytest.approx((0.1 + 0.02) / 2)
    assert float(schedule(110)) == pytest.approx(0.02)


def test_linear_decay_is_a_line_from_the_peak_to_the_fraction():
    schedule = learning_rate_schedule(dataclasses.replace(CONFIG, decay="linear"), 110)
    np.testing.assert_allclose([float(schedule(step)) for step in (5, 10, 35, 110)], [0.05, 0.1, 0.08, 0.02], rtol=1e-6)


def test_a_run_without_warm_up_starts_at_the_peak():
    assert float(learning_rate_schedule(dataclasses.replace(CONFIG, warmup_fraction=0.0), 3)(0)) == pytest.approx(0.1)


def test_weight_decay_leaves_norms_alone():
    optimizer = optimizer_of(dataclasses.replace(CONFIG, warmup_fraction=0.0, final_learning_rate_fraction=1.0))
    params = {"norm": {"scale": jnp.ones(3)}, "layers": {"attention_norm": {"scale": jnp.ones(3)}}, "head": jnp.ones(3)}
    params["layers"]["attention"] = {"q_bias": jnp.ones(3)}
    params["layers"]["attention_norm"]["bias"] = jnp.ones(3)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["norm"]["scale"], 1)
    np.testing.assert_array_equal(new["layers"]["attention_norm"]["scale"], 1)
    np.testing.assert_array_equal(new["layers"]["attention_norm"]["bias"], 1)
    np.testing.assert_array_equal(new["layers"]["attention"]["q_bias"], 1)
    np.testing.assert_allclose(new["head"], 1 - 0.1 * 0.5)


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = optimizer_of(CONFIG)
    params = {"head": jnp.zeros(4)}
    state = optimizer.init(params)
    small, large = ({"head": jnp.full(4, size)} for size in (0.5, 50.0))
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool(jnp.allclose(a, b)),
            optimizer.update(small, state, params)[1],
            optimizer.update(large, state, params)[1],
        )
    )
