"""The gradients that `tools.gradient_noise` compares, and its statistics."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config_of, run_command

from rho1_jax.runtime.errors import UserError
from rho1_jax.train import train_model
from tools.gradient_noise import Moments, parse_shares, recommended


def test_moments_are_unbiased():
    rng = np.random.default_rng(0)
    mean, count, estimates = rng.normal(size=5), 4, []
    for _ in range(2000):
        moments = Moments.zero({"x": jnp.zeros(5)})
        for vector in mean + 2 * rng.normal(size=(count, 5)):
            moments = moments.add({"x": jnp.asarray(vector, jnp.float32)})
        estimates.append((moments.energy_of_mean, moments.mean_energy))
    deviation = np.std(estimates, axis=0) / len(estimates) ** 0.5
    expected = [(mean**2).sum(), (mean**2).sum() + 5 * 4]
    assert (np.abs(np.mean(estimates, axis=0) - expected) < 4 * deviation).all()


def test_the_smallest_safe_share_is_recommended():
    errors = {("largest", 0.2): 0.03, ("largest", 0.4): 0.019, ("largest", 0.6): 0.001, ("drawn", 0.6): 0.1}
    rows = [{"choice": choice, "tokens": tokens, "error": error} for (choice, tokens), error in errors.items()]
    figures = {"noise": 0.2, "rows": rows}
    assert recommended(figures, "largest") == 0.4
    assert recommended(figures, "drawn") == 1.0


@pytest.mark.slow
def test_a_run_is_measured(data, reference, tmp_path):
    train_model(config_of("slm", data, reference), tmp_path / "run")
    flags = [f"--run={tmp_path / 'run'}", "--batches=3", "--share=0.7,1.0", f"--output={tmp_path / 'out'}"]
    done = run_command("tools.gradient_noise", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "gradient_noise.json").read_text())
    assert figures["batches"] == 3 and 0 < figures["noise"] < 1.5
    error = {(row["choice"], row["tokens"]): row["error"] for row in figures["rows"]}
    assert len(error) == 6
    for choice in ("largest", "drawn", "selected"):
        assert error[choice, 1.0] < 1e-9 < error[choice, 0.7]
    assert error["largest", 0.7] < error["selected", 0.7] and error["largest", 0.7] < error["drawn", 0.7]
    assert (tmp_path / "out" / "gradient_noise.png").read_bytes().startswith(b"\x89PNG")
    assert "config.backward.tokens=0.7, choice largest" in done.stdout


@pytest.mark.parametrize("shares", ["0.5,x", "0", "1.5", "nan"])
def test_a_share_that_is_none_is_refused(shares):
    with pytest.raises(UserError, match=f"--share={shares}: shares are numbers above 0 and at most 1"):
        parse_shares(shares.split(","))
