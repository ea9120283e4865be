"""The step with a backward pass through few tokens."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import TINY, random_batch, selection_of

from rho1_jax.configs.default import BackwardConfig
from rho1_jax.models import decoder
from rho1_jax.models.few_tokens import Probe
from rho1_jax.models.forward import row_losses, rows_of
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step

GRAPHDEF = decoder.build(TINY)
SGD = optax.sgd(1.0)  # the change of a parameter is its gradient


def make_step(backward, microbatches=1):
    settings = {"steps": 10, "microbatches": microbatches, "document_mask": True, "seed": 0, "backward": backward}
    return jax.jit(make_train_step(GRAPHDEF, GRAPHDEF, SGD, rule=selection_of(), **settings))


def gradient(step, params, batch, number=0):
    """The gradient of a step, its metrics and weights."""
    state, metrics, weight_BL = step(TrainState(jnp.int32(number), params[0], SGD.init(params[0])), params[1], batch)
    return jax.tree.map(jnp.subtract, params[0], state.params), metrics, weight_BL


def relative_difference(tree, expected):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, tree, expected)) / optax.tree.norm(expected))


@pytest.fixture(scope="module")
def batch():
    return random_batch(8, 16)


def test_each_microbatch_has_a_backward_pass_through_few_tokens(params, batch):
    ours, metrics, weight_BL = gradient(make_step(BackwardConfig(0.4), microbatches=2), params, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient_of(backward, part, weight_bL):
        def loss(policy):
            probe = Probe.of(backward, jnp.zeros((TINY.layers, 2)), jax.random.key(0)) if backward else None
            return (weight_bL * row_losses(GRAPHDEF, policy, rows_of(part, True), probe=probe)[0]).sum()

        return jax.grad(loss)(params[0])

    def mean(backward):
        parts = [(jax.tree.map(lambda x, m=m: x[m::2], batch), weight_BL[m::2]) for m in range(2)]
        return jax.tree.map(lambda a, b: (a + b) / weight_BL.sum(), *(gradient_of(backward, *part) for part in parts))

    assert relative_difference(ours, mean(BackwardConfig(0.4))) < 1e-5
    assert relative_difference(ours, mean(None)) > 0.01
    assert 0 < metrics["backward_dropped"] < 0.6


def test_each_step_draws_other_tokens(params, batch):
    step = make_step(BackwardConfig(0.4, "drawn"))
    first, again, second = (gradient(step, params, batch, number)[0] for number in (0, 0, 1))
    assert relative_difference(again, first) == 0
    assert relative_difference(second, first) > 0.01
