"""Opening models, and runs that take their model from the one they start from."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import config_of, run_command, tiny, write_hf_folder

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig
from rho1_jax.evaluate import evaluate_model
from rho1_jax.export_hf import export_hf, export_weights
from rho1_jax.generate import generate_text
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.score import score_data
from rho1_jax.train import train_model
from rho1_jax.training.description import read_description
from rho1_jax.training.pretrained import Pretrained
from rho1_jax.training.reference import open_reference
from rho1_jax.training.setup import open_run
from rho1_jax.verify import verify

MODELS = {
    "llama": tiny(vocab_size=304, tied_embeddings=False, rope_theta=500.0),
    "qwen3": tiny(family="qwen3", vocab_size=304, layers=3, head_width=16),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tokenizer, tmp_path_factory):
    """A Hugging Face folder whose vocabulary is padded beyond the tokenizer's."""
    model = MODELS[request.param]
    path = tmp_path_factory.mktemp("hf") / request.param
    return write_hf_folder(path, model, decoder.init_params(model, 3), tokenizer)


def config_from(path, data, **changes):
    """A config in which only the data and the first model are given."""
    config = default.get_config("slm")
    config.update({"steps": 2, "batch_size": 8, **changes})
    config.data.train, config.init.checkpoint = str(data), str(path)
    config.reference.checkpoint = str(path)
    return config


def shape_of(model):
    """The model without the settings of how it is computed."""
    return dataclasses.replace(model, loss_chunk=512, unroll=1)


def test_a_run_takes_its_whole_model_from_a_folder(folder, data, tmp_path):
    train_model(config_from(folder, data), tmp_path / "run")
    trained = Pretrained.open(tmp_path / "run", "--checkpoint")
    assert trained.model == shape_of(MODELS[folder.name])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert ModelConfig(**saved["model"]) == trained.model
    train_model(config_from(folder, data, steps=3), tmp_path / "run")  # resumes
    # A run that starts from this one, and so on.
    setup, _ = open_run(config_from(tmp_path / "run", data))
    assert setup.model == trained.model


def test_how_a_model_is_computed_stays_the_users(folder, data):
    config = config_from(folder, data)
    config.model.update(compute_dtype="bfloat16", remat="full", loss_chunk=32, unroll=2)
    setup, _ = open_run(config, given=["model.remat"])
    model = setup.model
    assert (model.compute_dtype, model.remat, model.loss_chunk, model.unroll) == ("bfloat16", "full", 32, 2)
    assert setup.initial.model == dataclasses.replace(model, context_length=64)


def test_a_key_that_contradicts_the_model_is_refused_by_name(folder, data):
    config = config_from(folder, data)
    layers = MODELS[folder.name].layers
    open_run(config)  # config.model.layers=6 is the default, so nobody gave it
    with pytest.raises(
        UserError, match=rf"config.model.layers=6 contradicts .*{folder}, which has layers={layers}; rem"
    ):
        open_run(config, given=["model.layers"])
    config.model.vocab_size = 512
    with pytest.raises(UserError, match=r"config.init.checkpoint=.* has a vocabulary of 304, but .* is 512"):
        open_run(config)
    config = config_from(folder, data)
    config.model.update(rope_theta=7.0, heads=2)
    with pytest.raises(
        UserError, match=r"heads=2, config.model.rope_theta=7.0 contradict .* heads=4, rope.*; remove them"
    ):
        open_run(config)


def test_a_key_that_agrees_with_the_model_may_be_given(folder, data):
    config = config_from(folder, data)
    config.model.update(dataclasses.asdict(MODELS[folder.name]))
    setup, _ = open_run(config, given=["model.layers", "model.width"])
    assert setup.model == MODELS[folder.name]


@pytest.mark.parametrize("given, length", [(None, 64), (32, 32), (0, 16)])
def test_the_context_length_is_the_models_unless_it_is_given(folder, data, given, length):
    config = config_from(folder, data)
    if given is not None:
        config.model.context_length = given
    setup, _ = open_run(config, given=[] if given is None else ["model.context_length"])
    assert setup.model.context_length == length


def test_a_context_shorter_than_the_rows_becomes_the_rows(tokenizer, data, tmp_path):
    model = tiny(vocab_size=304, context_length=8)
    folder = write_hf_folder(tmp_path / "short", model, decoder.init_params(model, 3), tokenizer)
    assert open_run(config_from(folder, data))[0].model.context_length == 16


def test_the_command_line_knows_which_keys_were_given(folder, data, tmp_path):
    """The default of a key is a contradiction only where the user gave it."""
    result = run_command(
        "rho1_jax.train",
        "--config=default:slm",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.train={data}",
        f"--config.init.checkpoint={folder}",
        "--config.model.layers=6",
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: config.model.layers=6 contradicts config.init.checkpoint=")
    assert not (tmp_path / "run").exists()


def test_scoring_needs_no_model_key_and_not_the_first_model(folder, data, tmp_path):
    shutil.copytree(data, tmp_path / "rows")
    config = config_from(folder, tmp_path / "rows")
    config.init.checkpoint, config.reference.scores = "runs/not_trained_yet", "scores"
    score_data(config, "float32")
    config.init.checkpoint = str(folder)
    train_model(config, tmp_path / "run")


def test_a_folder_opens_like_a_run(folder, tokenizer):
    opened = Pretrained.open(folder, "--checkpoint")
    model = MODELS[folder.name]
    assert opened.path == folder and opened.meta is None
    assert shape_of(opened.model) == shape_of(model)
    assert opened.config.model.layers == model.layers and opened.config.steps == default.RunConfig().steps
    assert opened.tokenizer().fingerprint == opened.tokenizer_fingerprint == tokenizer.fingerprint
    params = opened.load(sharding.mesh_of_run(**opened.config.mesh), "float32")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(decoder.init_params(model, 3)))


def test_a_moving_reference_of_another_size_is_refused(folder, data):
    config = config_of("slm", data, folder)
    config.model.update(dataclasses.asdict(MODELS[folder.name]) | {"layers": 4})
    config.reference.moves = "average"
    setup, opened = open_run(config)
    layers = MODELS[folder.name].layers
    with pytest.raises(UserError, match=f"is another model: config.model.layers={layers} there, 4 here"):
        open_reference(setup.config, setup.needs, setup.model, opened.stores, setup.mesh)


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    """The weights of the reference, exported without optimizer state."""
    output = tmp_path_factory.mktemp("weights") / "weights"
    export_weights(str(reference), output, None)
    return output


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_weights_alone_are_a_third_of_a_checkpoint_and_the_same_model(weights, reference):
    of_run, alone = Pretrained.open(reference, "--checkpoint"), Pretrained.open(weights, "--checkpoint")
    assert {item.name for item in alone.path.iterdir() if item.is_dir()} == {"params", "meta"}
    assert size(alone.path) < 0.4 * size(of_run.path)
    assert (alone.meta, alone.model) == (of_run.meta, of_run.model)
    assert read_description(alone.path).metrics == read_description(of_run.path).metrics != {}
    mesh = sharding.make_mesh(2, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, alone.load(mesh, "float32"), of_run.load(mesh, "float32"))
    assert not weights.with_name("weights.partial").exists()
    assert "arrays match their checksums" in verify(weights)[0]


def test_weights_alone_may_have_another_dtype(reference, tmp_path):
    export_weights(str(reference), tmp_path / "half", "bfloat16")
    half, mesh = Pretrained.open(tmp_path / "half", "--checkpoint"), sharding.make_mesh(2, 2, 2)
    assert {array.dtype for array in read_description(half.path).arrays.values()} == {"bfloat16"}
    of_run = Pretrained.open(reference, "--checkpoint").load(mesh, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, half.load(mesh, "bfloat16"), of_run)


def test_weights_alone_are_opened_wherever_a_model_is(weights, reference, data, tmp_path):
    config = config_from(weights, data)
    train_model(config, tmp_path / "run")  # the first weights and the reference
    expected = evaluate_model(reference, {"rows": 8})
    assert evaluate_model(weights, {"rows": 8}) == expected
    assert generate_text(weights, ["1+1="], max_new_tokens=4) == generate_text(reference, ["1+1="], max_new_tokens=4)
    for path, name in ((weights, "of_weights"), (reference, "of_run")):
        export_hf(str(path), tmp_path / name, None)
    assert (tmp_path / "of_weights/model.safetensors").read_bytes() == (
        tmp_path / "of_run/model.safetensors"
    ).read_bytes()


def test_a_run_is_not_resumed_from_weights_alone(weights, data):
    before = size(weights)
    message = (
        r"12 holds weights only, so no run can be resumed from it; start a new run from it, with config.init.check"
    )
    with pytest.raises(UserError, match=message):
        train_model(config_of("reference", data), weights)
    assert size(weights) == before


def test_damaged_weights_alone_are_noticed(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "copy")
    damage = max((tmp_path / "copy").rglob("params/**/*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(damage.read_bytes())
    content[len(content) // 2] ^= 255
    damage.write_bytes(content)
    damaged = Pretrained.open(tmp_path / "copy", "--checkpoint")
    with pytest.raises(UserError, match="12 is damaged"):
        damaged.load(sharding.make_mesh(8, 1, 1), "float32")


def test_two_kinds_of_export_exclude_each_other(reference, tmp_path):
    flags = [f"--checkpoint={reference}", f"--output={tmp_path / 'out'}"]
    result = run_command("rho1_jax.export_hf", *flags, "--weights_only", "--raw")
    assert result.returncode == 2 and "error: --raw, --weights_only and --verify exclude each other" in result.stderr
    result = run_command("rho1_jax.export_hf", *flags, "--weights_only")
    assert result.returncode == 0, result.stderr
    assert Pretrained.open(tmp_path / "out", "--checkpoint").meta.step == 12
