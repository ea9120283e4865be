"""The estimated cost of a recipe, against a calculation by hand."""

import pytest
from helpers import run_command


def test_the_command_prints_the_cost_of_a_recipe():
    done = run_command("tools.recipe_cost", "--config=configs/tinyllama_math.py:slm")
    assert done.returncode == 0, done.stderr
    first, flops, *_ = done.stdout.splitlines()
    assert first.startswith("1,100,048,384 parameters, 14,999,879,680 tokens in 14,305 steps of 1,048,576")
    # The policy's forward and backward passes, with 60 % of tokens in the head's backward, and the reference's forward.
    head, rest = 2 * 32_000 * 2048, 2 * (1_100_048_384 - 2 * 32_000 * 2048) + 4 * 22 * 2048 * 1024.5
    expected = 14_305 * 2**20 * (4 * rest + (2 + 2 * 0.6) * head)
    assert float(flops.split()[0]) == pytest.approx(expected, rel=0.01)
