"""Trains on a GPU as on a CPU."""

import numpy as np
import pytest
from helpers import options, run_command

from rho1_jax.data.preparation import prepare
from rho1_jax.runtime.metrics import read_metrics

pytestmark = pytest.mark.gpu

MODEL = {"width": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 64, "ff_width": 96}


@pytest.fixture(scope="module")
def rows(corpus, tokenizer, tmp_path_factory):
    """Rows of 128 tokens, which cuDNN can compute."""
    output = tmp_path_factory.mktemp("data") / "rows"
    prepare([corpus], tokenizer, output, options(seq_len=128), workers=1)
    return output


def train(monkeypatch, platform, stage, workdir, **changes):
    """Trains 12 steps on this platform, and returns the losses of the logged steps."""
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setenv("XLA_FLAGS", "")  # one CPU device
    changes |= {"steps": 12, "batch_size": 8, "log_every": 2, "model.compute_dtype": "bfloat16"}
    changes |= {f"model.{name}": size for name, size in MODEL.items()}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    result = run_command("rho1_jax.train", f"--config=configs/default.py:{stage}", f"--workdir={workdir}", *flags)
    assert result.returncode == 0, result.stderr
    return np.array([line["loss"] for line in read_metrics(workdir)])


def test_losses_on_gpu_equal_those_on_cpu(monkeypatch, rows, tmp_path):
    """In bfloat16, where rounding differs. Losses in float32 differ from these by 0.06 %."""
    data, moves = {"data.train": rows}, {"optimizer.learning_rate": 3e-3}
    train(monkeypatch, "cpu", "reference", tmp_path / "reference", **data, **moves)
    policy = data | moves | {"reference.checkpoint": tmp_path / "reference"}
    on_cpu = train(monkeypatch, "cpu", "slm", tmp_path / "cpu", **policy, **{"model.attention": "xla"})
    on_gpu = train(monkeypatch, "cuda", "slm", tmp_path / "gpu", **policy, **{"model.attention": "cudnn"})
    assert len(on_cpu) == 6 and on_cpu[-1] < on_cpu[0]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=5e-3)
