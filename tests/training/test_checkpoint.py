"""The contents of a checkpoint, and the fingerprint of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, tiny

from rho1_jax.configs import default
from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training import checkpoint, checksums
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import as_saved
from rho1_jax.training.optimizer import make_optimizer
from rho1_jax.training.state import TrainState

ADAMW = make_optimizer(OptimizerConfig(), 1e-2)


def meta(step):
    return Meta(
        step, 100 * step, 60 * step, as_saved(default.get_config()), [{"fingerprint": "f", "weight": 1.0}], "t", None
    )


@pytest.fixture
def saved(params, tmp_path):
    """Three steps saved, two kept."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        scaled = jax.tree.map(lambda x, step=step: x * step, params[0])
        checkpoints.save(TrainState(jnp.int32(step), scaled, ADAMW.init(scaled)), meta(step), {})
    checkpoints.close()
    return tmp_path


def test_a_checkpoint_restores_on_any_mesh(saved, params):
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = decoder.abstract_params(TINY), jax.eval_shape(ADAMW.init, params[0])
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), *shapes)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.param_shardings(shapes, mesh),
    )
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.latest_meta() == meta(3)
    step, restored, opt_state, reference = checkpoints.restore(3, abstract)
    checkpoints.close()
    assert int(step) == 3 and reference is None
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 3 * np.asarray(b)), restored, params[0])
    assert restored["layers"]["attention"]["q"].sharding == abstract.params["layers"]["attention"]["q"].sharding
    assert jax.tree.structure(opt_state) == jax.tree.structure(shapes.opt_state)


def test_only_parameters_optimizer_state_and_description_are_stored(saved):
    steps = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert steps == ["2", "3"]
    items = {path.name for path in (saved / "checkpoints" / "3").iterdir() if path.is_dir()}
    assert items == {"params", "opt_state", "meta"}


def test_a_run_directory_means_its_newest_checkpoint(saved):
    assert checkpoint.find(saved, "--checkpoint") == (saved / "checkpoints" / "3").absolute()
    assert checkpoint.find(saved / "checkpoints" / "2", "--checkpoint").name == "2"
    assert checkpoint.load_meta(checkpoint.find(saved, "--checkpoint")) == meta(3)
    with pytest.raises(UserError, match="--checkpoint=.*nothing: no checkpoint here"):
        checkpoint.find(saved / "nothing", "--checkpoint")


def test_parameters_load_in_the_requested_dtype(saved, params):
    mesh = sharding.make_mesh(8, 1, 1)
    loaded = checkpoint.load_params(checkpoint.find(saved, "x"), TINY, mesh, "bfloat16")
    np.testing.assert_array_equal(loaded["embedding"], (3 * params[0]["embedding"]).astype(jnp.bfloat16))


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(UserError, match="does not fit the model"):
        checkpoint.load_params(checkpoint.find(saved, "x"), tiny(width=64), sharding.make_mesh(8, 1, 1), "float32")


def test_fingerprint_is_the_same_on_every_mesh_and_changes_with_every_part(params):
    original = checksums.fingerprint(params[0])
    mesh = sharding.make_mesh(1, 4, 2)
    assert checksums.fingerprint(jax.device_put(params[0], sharding.param_shardings(params[0], mesh))) == original
    embedding = params[0]["embedding"]
    others = [
        embedding.at[5, 7].set(jnp.nextafter(embedding[5, 7], jnp.inf)),  # one bit
        embedding[::-1],  # the order
        embedding.astype(jnp.bfloat16),
    ]
    fingerprints = {checksums.fingerprint(params[0] | {"embedding": other}) for other in others}
    assert len(fingerprints | {original}) == 4
