"""What the processes of a run compare."""

import pytest

from rho1_jax.training import agreement


@pytest.fixture
def model(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("config.json", "model.safetensors", ".cache/download.metadata"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_model_that_another_machine_downloaded_at_another_time_is_the_same(model):
    before = agreement._content(str(model), "config.init.checkpoint")
    (model / ".cache" / "download.metadata").write_text("another time")
    assert agreement._content(str(model), "config.init.checkpoint") == before
    (model / "model.safetensors").write_text("other weights")
    assert agreement._content(str(model), "config.init.checkpoint") != before
