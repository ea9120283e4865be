"""The arithmetic of a run's cost against what XLA counts."""

import jax
import jax.numpy as jnp
import pytest
from conftest import random_batch, run_command, tiny

from rho1_jax import model
from rho1_jax.train_step import make_token_losses
from tools.recipe_cost import forward_flops


@pytest.mark.parametrize("tied", [True, False])
def test_forward_flops_are_those_of_the_compiled_program(tied):
    # One layer, since XLA counts a scanned one once; wide enough for norms and softmax not to matter.
    length = 128
    config = tiny(
        width=256, layers=1, heads=4, head_width=64, ff_width=1024, vocab_size=512, tied_embeddings=tied, loss_chunk=128
    )
    params = model.init_params(config, 0)
    losses = make_token_losses(model.build(config), document_mask=True)
    compiled = jax.jit(losses).lower(params, jax.tree.map(jnp.asarray, random_batch(1, length))).compile()
    # XLA computes the masked half of the attention too.
    masked_half = 4 * config.heads * config.head_width * length / 2
    counted = compiled.cost_analysis()["flops"] / length - masked_half
    assert forward_flops(config, length) == pytest.approx(counted, rel=0.03)


def test_the_command_tells_what_a_recipe_takes():
    done = run_command("tools.recipe_cost", "--config=configs/tinyllama_math.py:slm")
    assert done.returncode == 0, done.stderr
    first, flops, *_ = done.stdout.splitlines()
    assert first.startswith("1,100,048,384 parameters, 14,999,879,680 tokens in 14,305 steps of 1,048,576")
    # Policy forward, backward and again, and the reference: five forward passes.
    expected = 5 * 14_305 * 2**20 * (2 * (1_100_048_384 - 32_000 * 2048) + 4 * 22 * 2048 * 1024)
    assert float(flops.split()[0]) == pytest.approx(expected, rel=0.01)
