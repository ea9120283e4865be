"""The contents of a checkpoint, where it can be restored, and what is refused."""

import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, config_of, tiny
from safetensors.numpy import load_file, save_file

from rho1_jax.configs import default
from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.export_hf import export_hf, export_raw
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint, checksums
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import as_saved
from rho1_jax.training.optimizer import make_optimizer
from rho1_jax.training.state import TrainState

ADAMW = make_optimizer(OptimizerConfig(), 1e-2)


def meta(step):
    config = default.get_config()
    config.model.update(vars(TINY))
    return Meta(step, 100 * step, 60 * step, as_saved(config), [{"fingerprint": "f", "weight": 1.0}], "t", None)


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
    step, restored, opt_state, reference = checkpoints.restore(3, abstract)
    checkpoints.close()
    assert int(step) == 3 and reference is None
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 3 * np.asarray(b)), restored, params[0])
    assert restored["layers"]["attention"]["q"].sharding == abstract.params["layers"]["attention"]["q"].sharding
    assert jax.tree.structure(opt_state) == jax.tree.structure(shapes.opt_state)


def test_nothing_is_written_before_the_first_save(tmp_path):
    # Of several processes, the one that fails before it closes alone: it must not wait for the others.
    Checkpoints(tmp_path, keep=2).close()
    assert not list(tmp_path.iterdir())


def test_only_parameters_optimizer_state_and_description_are_stored(saved):
    steps = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert steps == ["2", "3"]
    items = {path.name for path in (saved / "checkpoints" / "3").iterdir() if path.is_dir()}
    assert items == {"params", "opt_state", "meta"}


def test_a_run_directory_means_its_newest_checkpoint(saved):
    assert checkpoint.find(saved, "--checkpoint") == (saved / "checkpoints" / "3").absolute()
    assert checkpoint.find(saved / "checkpoints" / "2", "--checkpoint").name == "2"
    assert checkpoint.load_meta(checkpoint.find(saved, "--checkpoint")) == meta(3)
    with pytest.raises(UserError, match="--checkpoint=.*nothing is neither a run"):
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


# Sizes of data, fsdp and tensor.
MESHES = [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 2, 2), (2, 2, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)]


def placed(state, sizes):
    """The state on a mesh over as many of the devices as the sizes need."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    return jax.tree.map(jax.device_put, state, sharding.param_shardings(state, mesh))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(state, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), state, expected)


@pytest.fixture(scope="module")
def written_on_eight_devices(params, tmp_path_factory):
    """A state and the run that saved it."""
    rng = np.random.default_rng(0)
    opt_state = jax.tree.map(lambda x: np.asarray(x + rng.integers(9, size=x.shape), x.dtype), ADAMW.init(params[0]))
    state = TrainState(jnp.int32(5), params[0], opt_state, params[1])
    workdir = tmp_path_factory.mktemp("runs") / "eight"
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(placed(state, (2, 2, 2)), meta(5), {})
    checkpoints.close()
    return workdir, state


@pytest.mark.parametrize("sizes", MESHES)
def test_a_checkpoint_of_eight_devices_restores_on_fewer_and_on_other_splits(written_on_eight_devices, sizes):
    workdir, state = written_on_eight_devices
    like = placed(state, sizes)
    restored, restored_meta = Checkpoints(workdir, keep=1).newest(abstract(like), lambda meta: None)
    assert restored_meta == meta(5)
    assert_same_bits(restored, state)
    jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail(), restored, like)


def test_a_wrong_array_is_noticed_on_every_split(written_on_eight_devices, params, tmp_path):
    """The optimizer state of another step, which Orbax restores without complaint."""
    workdir, state = written_on_eight_devices
    shutil.copytree(workdir, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "other", keep=1)
    checkpoints.save(state._replace(opt_state=ADAMW.init(params[0])), meta(5), {})
    checkpoints.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5" / "opt_state")
    shutil.copytree(tmp_path / "other/checkpoints/5/opt_state", tmp_path / "run/checkpoints/5/opt_state")
    for sizes in MESHES:
        with pytest.raises(
            checkpoint.DamagedCheckpoint, match="5 is damaged: opt_state/1/0/count does not match its ch"
        ):
            Checkpoints(tmp_path / "run", keep=1).restore(5, abstract(placed(state, sizes)))


def test_an_optimizer_state_restores_from_and_to_host_memory(written_on_eight_devices, tmp_path):
    _, state = written_on_eight_devices
    on_devices = placed(state, (1, 4, 2))
    shardings = sharding.on_host(jax.tree.map(lambda x: x.sharding, on_devices.opt_state))
    on_host = on_devices._replace(opt_state=jax.tree.map(jax.device_put, on_devices.opt_state, shardings))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(on_host, meta(5), {})
    checkpoints.close()
    for like in (on_host, on_devices):
        restored = Checkpoints(tmp_path, keep=1).restore(5, abstract(like))
        assert_same_bits(restored, state)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), restored, like)
    assert on_host.opt_state[1][0].mu["embedding"].sharding.memory_kind == sharding.HOST_MEMORY


def test_a_changed_dtype_is_cast_after_the_arrays_are_verified(written_on_eight_devices):
    workdir, state = written_on_eight_devices
    changed = make_optimizer(OptimizerConfig(first_moment_dtype="bfloat16"), 1e-2).init(state.params)
    restored = Checkpoints(workdir, keep=1).restore(5, abstract(state._replace(opt_state=changed)))
    first_moment = restored.opt_state[1][0].mu["embedding"]
    assert first_moment.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first_moment, state.opt_state[1][0].mu["embedding"].astype(jnp.bfloat16))


def test_a_swapped_item_is_noticed_in_any_dtype(saved):
    directory = checkpoint.find(saved, "x")
    shutil.rmtree(directory / "params")
    shutil.copytree(directory.parent / "2" / "params", directory / "params")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="3 is damaged: params/embedding does not match its checksum; use another"):
            checkpoint.load_params(directory, TINY, sharding.make_mesh(2, 2, 2), dtype)


def test_a_checkpoint_with_nan_is_refused_by_name(params, tmp_path):
    weights = params[0] | {"norm": {"scale": params[0]["norm"]["scale"].at[3].set(jnp.nan)}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(TrainState(jnp.int32(1), weights, None), meta(1), {})
    checkpoints.close()
    for read in (
        lambda: checkpoint.load_params(checkpoint.at(tmp_path, 1), TINY, sharding.make_mesh(2, 2, 2), "float32"),
        lambda: list(checkpoint.iterate_params(checkpoint.at(tmp_path, 1))),
    ):
        with pytest.raises(
            UserError, match="checkpoints/1: NaN or infinity in norm/scale; use a model with finite weig"
        ):
            read()


@pytest.fixture(scope="module")
def not_finite(reference, tmp_path_factory):
    """The reference as a Hugging Face folder, with one infinity."""
    folder = tmp_path_factory.mktemp("folders") / "folder"
    export_hf(str(reference), folder, None)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("stage", "key"), [("slm", "reference"), ("clm", "init")])
def test_a_model_with_infinity_is_refused_before_training(data, not_finite, tmp_path, stage, key):
    config = config_of(stage, data)
    config[key].checkpoint = str(not_finite)
    with pytest.raises(UserError, match="folder: NaN or infinity in norm/scale"):
        train_model(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disk_without_space_is_reported_and_the_last_checkpoint_stays(saved, params, capfd):
    """A limit on the size of files stands in for a full disk."""
    checkpoints = Checkpoints(saved, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = TrainState(jnp.int32(4), params[0], ADAMW.init(params[0]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(
            UserError, match="cannot write a checkpoint to .*checkpoints: File too large; the last compl"
        ):
            checkpoints.save(state, meta(4), {})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == "" and checkpoint.steps(saved) == [2, 3]
    again = Checkpoints(saved, keep=1)
    assert again.newest(abstract(state), lambda meta: None)[1] == meta(3)
    again.save(state, meta(4), {})
    again.close()
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["4"]


def test_a_folder_that_cannot_be_created_is_reported(params, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot write a checkpoint to .*: Not a directory; none is complete"):
        Checkpoints(tmp_path, keep=1).save(TrainState(jnp.int32(4), params[0], None), meta(4), {})


def test_raw_export_has_the_arrays_under_their_own_names(saved, params, tmp_path):
    assert export_raw(str(saved), tmp_path / "raw", None) == decoder.param_count(TINY)
    arrays = load_file(tmp_path / "raw" / "model.safetensors")
    expected = checksums.named_leaves(params[0])
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, 3 * expected[name])
    with pytest.raises(UserError, match="raw exists; choose another --output"):
        export_raw(str(saved), tmp_path / "raw", None)
