"""The estimated cost of a recipe, against a calculation by hand."""

import pytest
from helpers import run_command, tiny, write_hf_folder

from rho1_jax.models.decoder import init_params, param_count


def test_the_model_is_that_of_the_first_checkpoint(tokenizer, tmp_path):
    model = tiny(family="qwen2", vocab_size=304)
    folder = write_hf_folder(tmp_path / "model", model, init_params(model, 0), tokenizer)
    command = ["tools.recipe_cost", "--config=default:clm", f"--config.init.checkpoint={folder}"]
    done = run_command(*command)
    assert done.returncode == 0 and done.stdout.startswith(f"{param_count(model):,} parameters"), done.stderr
    done = run_command(*command[:2], "--config.init.checkpoint=nowhere", "--config.model.layers=7")
    assert done.returncode == 2 and "config.init.checkpoint=nowhere is neither a run" in done.stderr
    done = run_command(*command, "--config.model.layers=7")
    assert done.returncode == 2
    assert f"config.model.layers=7 contradicts config.init.checkpoint={folder}, which has layers=2" in done.stderr


def test_the_command_prints_the_cost_of_a_recipe():
    done = run_command("tools.recipe_cost", "--config=configs/tinyllama_math.py:slm")
    assert done.returncode == 0, done.stderr
    first, flops, *_ = done.stdout.splitlines()
    assert first.startswith("1,100,048,384 parameters, 14,999,879,680 tokens in 14,305 steps of 1,048,576")
    # The policy's forward and backward passes, with 60 % of tokens in the head's backward, and the reference's forward.
    head, rest = 2 * 32_000 * 2048, 2 * (1_100_048_384 - 2 * 32_000 * 2048) + 4 * 22 * 2048 * 1024.5
    expected = 14_305 * 2**20 * (4 * rest + (2 + 2 * 0.6) * head)
    assert float(flops.split()[0]) == pytest.approx(expected, rel=0.01)
