"""The cost read from a TPU program's text, against XLA's own count for programs without loops."""

import os

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny
from jax.experimental import topologies

from rho1_jax.data.packing import Batch
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_token_losses
from rho1_jax.runtime import sharding
from tools.hlo_cost import Program

pytestmark = pytest.mark.slow

CONFIG = dict(
    width=256,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=128,
    ff_width=512,
    vocab_size=1024,
    loss_chunk=512,
    attention="xla",
)


@pytest.fixture(scope="module")
def chips():
    variables = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    before = dict(os.environ)
    os.environ.update(variables)
    jax.config.update("jax_enable_compilation_cache", False)  # the cache cannot load programs for absent chips
    yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    jax.config.update("jax_enable_compilation_cache", True)
    os.environ.clear()
    os.environ.update(before)


def compiled(chips, sizes, rows=4, **changes):
    """Compile the gradient of the mean loss for `chips`."""
    mesh = sharding.make_mesh(*sizes, devices=chips)
    config = tiny(**CONFIG | changes)
    losses = make_token_losses(decoder.build(config), document_mask=True)
    abstract = decoder.abstract_params(config)
    params = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, sharding.param_shardings(abstract, mesh))
    row = jax.ShapeDtypeStruct((rows, 129), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(lambda p, b: losses(p, b)[0].mean())).lower(params, Batch(row, row)).compile()


def cost(program, rounds=1):
    return Program(program.as_text(), lambda _: rounds, [None]).cost()


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_loops_are_counted_once_per_iteration(chips, sizes):
    """XLA counts the loop over layers once, so its count is right only for unrolled layers. Ours is right for both."""
    unrolled = compiled(chips, sizes, unroll=3)
    counted = unrolled.cost_analysis()["flops"]
    assert cost(unrolled).flops == pytest.approx(counted, rel=0.1)
    assert cost(compiled(chips, sizes)).flops == pytest.approx(cost(unrolled).flops, rel=0.05)


def test_collectives_match_the_sharding(chips):
    weights = sum(x.size for x in jax.tree.leaves(decoder.abstract_params(tiny(**CONFIG))))
    # Replicated weights: all-reduce sums every gradient over four chips, and each chip receives 1.5 times its size. The
    # tied embedding has two gradients, one as input and one as output.
    replicated = cost(compiled(chips, (4, 1, 1)))
    assert replicated.collectives["all-reduce"][1] == pytest.approx(1.5 * 4 * (weights + 1024 * 256), rel=0.01)
    assert set(replicated.collectives) == {"all-reduce"}
    # Sharded weights: each chip gathers the missing three quarters, in the forward and in the backward pass.
    assert cost(compiled(chips, (1, 4, 1))).collective_bytes > 2 * 0.75 * 4 * 0.9 * weights
