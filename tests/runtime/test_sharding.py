"""The mesh and the table of sharding rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, tiny
from jax.sharding import PartitionSpec

from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.optimizer import make_optimizer


def test_one_axis_gets_the_devices_that_the_others_leave():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (-1, 0, 1), (16, 1, 1)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="mesh .data=.*8 devices"):
        sharding.make_mesh(*sizes)


def test_optimizer_state_is_sharded_like_the_parameters():
    mesh = sharding.make_mesh(1, 4, 2)
    params = decoder.abstract_params(tiny(tied_embeddings=False))
    placed = sharding.param_shardings(params, mesh)
    assert placed["layers"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert placed["head"].spec == PartitionSpec("tensor", "fsdp")
    state = sharding.param_shardings(jax.eval_shape(make_optimizer(OptimizerConfig(), 1e-2).init, params), mesh)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.spec == PartitionSpec(None, "fsdp", "tensor", None)]
    assert len(moments) == 6  # q, k and v, in both moments


def test_an_array_without_a_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="no_such"):
        sharding.param_shardings({"no_such": jnp.zeros((2, 2))}, sharding.make_mesh(8, 1, 1))


def test_two_rules_for_one_array_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(sharding.RULES, r"\w+/q", PartitionSpec())
    with pytest.raises(ValueError, match="2 sharding rules match layers/attention/q"):
        sharding.param_shardings(decoder.abstract_params(TINY), sharding.make_mesh(8, 1, 1))


def test_two_equal_rules_for_one_array_are_refused_too(monkeypatch):
    monkeypatch.setitem(sharding.RULES, r"\w+/q", sharding.RULES[r"attention/[qkv]"])
    with pytest.raises(ValueError, match="2 sharding rules match layers/attention/q"):
        sharding.param_shardings(decoder.abstract_params(TINY), sharding.make_mesh(8, 1, 1))


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False}, {"family": "qwen2"}, {"family": "qwen3"}], ids=str)
def test_every_parameter_has_exactly_one_rule(changes):
    params = decoder.abstract_params(tiny(**changes))
    placed = sharding.param_shardings(params, sharding.make_mesh(8, 1, 1))
    assert jax.tree.structure(placed) == jax.tree.structure(params)


def test_a_rule_that_uses_a_mesh_axis_twice_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sharding.RULES, r"embedding", PartitionSpec("fsdp", "fsdp"))
    with pytest.raises(ValueError, match="of embedding uses one mesh axis for two"):
        sharding.param_shardings(decoder.abstract_params(TINY), sharding.make_mesh(8, 1, 1))


class Chip:
    """A TPU chip in one of two slices, with the attributes a mesh reads."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, number):
        self.id, self.process_index, self.slice_index = number, number // 4, number // 4
        self.coords = (number % 2, number // 2 % 2, 0)


def test_only_the_axis_data_crosses_slices():
    chips = [Chip(number) for number in range(8)]
    mesh = sharding.make_mesh(2, 2, 2, devices=chips)
    assert [{chip.slice_index for chip in part.ravel()} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="mesh axis data=1 must be a multiple of the 2 slices"):
        sharding.make_mesh(1, 4, 2, devices=chips)


def test_an_axis_that_does_not_divide_is_refused_by_name():
    params = decoder.abstract_params(TINY)
    with pytest.raises(
        UserError, match="attention/k has an axis of 2, which mesh axis tensor=8 does not divide; choose"
    ):
        sharding.param_shardings(params, sharding.make_mesh(1, 1, 8))


def test_activations_are_left_alone_without_a_mesh():
    x = jnp.ones((2, 3, 4))
    for decoding in (False, True):
        np.testing.assert_array_equal(sharding.shard_activations(x, decoding), x)


def test_activations_in_decoding_are_sharded_like_the_weights():
    mesh, x = sharding.make_mesh(2, 2, 2), jnp.ones((8, 1, 4))
    with jax.set_mesh(mesh):
        specs = [
            jax.jit(sharding.shard_activations, static_argnums=1)(x, decoding).sharding.spec
            for decoding in (False, True)
        ]
    assert specs == [PartitionSpec(("data", "fsdp")), PartitionSpec("data", None, "fsdp")]
