"""What older versions wrote opens and means the same; what newer versions wrote is refused by name."""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from helpers import config_of, options
from safetensors.numpy import load_file
from sentencepiece import sentencepiece_model_pb2

from rho1_jax.configs import default
from rho1_jax.data.loader import open_mixture
from rho1_jax.data.preparation import prepare
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import ScoreStore
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.evaluate import evaluate_model
from rho1_jax.export_hf import export_hf
from rho1_jax.runtime import formats
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import path_name
from rho1_jax.score import score_data
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint
from rho1_jax.training.config import as_saved, complete
from rho1_jax.training.pretrained import Pretrained, open_pretrained

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """What 0.1.0 wrote: a data set with scores, a reference, a run stopped at step 4 of 8, and what followed from it.

    On one device, as it was written.
    """
    with tarfile.open(FIXTURES / "v0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of_old_run(stage="slm"):
    config = default.get_config(stage)
    config.update(steps=8, batch_size=8, log_every=1)
    config.model.update(width=8, layers=2, heads=2, kv_heads=1, head_width=4, ff_width=12)
    config.data.train = "rows"
    config.optimizer.update(learning_rate=1e-2, warmup_fraction=0.25)
    config.eval.update(every=4, data="held_out=rows", rows=16)
    config.checkpoint.update(every=4, keep=1)
    config.reference.scores = "stored"
    return config


def test_a_run_of_0_1_resumes_to_the_parameters_it_would_have_reached(old):
    params = jax.device_get(train_model(config_of_old_run(), old / "run"))
    expected = np.load("resumed_params.npz")
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert leaves.keys() == set(expected)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert checkpoint.load_meta(checkpoint.find(old / "run", "run")).format_version == formats.FORMAT_VERSION


def test_a_run_of_0_1_evaluates_and_exports_as_it_did(old):
    expected = json.loads((old / "expected.json").read_text())["evaluate"]
    metrics = evaluate_model("run", {})
    assert metrics == pytest.approx(expected, rel=1e-5)
    export_hf("run", old / "exported_now", None)
    ours, theirs = load_file("exported_now/model.safetensors"), load_file("exported/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])


def test_scores_of_0_1_are_read_and_computed_again_alike(old):
    store = Store("rows")
    stored = ScoreStore(store, "stored", True, None)
    config = config_of_old_run()
    config.reference.update(checkpoint="reference", scores="again")
    score_data(config, "float16", entropies=True)
    again = ScoreStore(store, "again", True, stored.manifest["reference"])
    assert formats.KEY not in stored.manifest and again.manifest[formats.KEY] == formats.FORMAT_VERSION
    for signal in ("losses", "entropies"):
        before, after = stored.column(signal), again.column(signal)
        for row in range(0, 184, 8):
            np.testing.assert_allclose(before[row], after[row], rtol=2e-3)
    config.reference.scores = "stored"
    score_data(config, "float16", entropies=True)  # already there


def test_data_of_0_1_is_prepared_data(old):
    store = Store("rows")
    assert formats.KEY not in store.manifest and store.seq_len == 16 and len(store.rows("train")) == 184
    assert store.tokenizer().fingerprint == Tokenizer("tokenizer.model").fingerprint == store.tokenizer_fingerprint


def test_models_and_data_of_0_1_go_with_new_data_of_the_same_tokenizer(old):
    """The tokenizer of the new data is saved again, so its fingerprint is not the one recorded in 0.1."""
    model = sentencepiece_model_pb2.ModelProto.FromString((old / "tokenizer.model").read_bytes())
    model.trainer_spec.input.append("elsewhere.txt")
    (old / "again.model").write_bytes(model.SerializeToString())
    (old / "text.jsonl").write_text("".join(json.dumps({"text": f"{n}+{n}={2 * n}"}) + "\n" for n in range(90)))
    prepare([old / "text.jsonl"], Tokenizer("again.model"), old / "new", options(), workers=1)
    stores, _ = open_mixture("rows,new")
    assert stores[0].tokenizer_fingerprint != stores[1].tokenizer_fingerprint
    config = config_of_old_run()
    for path in ("reference", "run"):
        trained = Pretrained.open(path, "--checkpoint")
        config.model = trained.config.model
        for store in stores:
            assert open_pretrained(path, "config.reference.checkpoint", config, store).model == trained.model
    model.pieces[-1].piece = "another"
    (old / "another.model").write_bytes(model.SerializeToString())
    prepare([old / "text.jsonl"], Tokenizer("another.model"), old / "another", options(), workers=1)
    with pytest.raises(UserError, match="config.reference.checkpoint=.* has another tokenizer"):
        open_pretrained("reference", "config.reference.checkpoint", config, Store("another"))
    with pytest.raises(UserError, match="another was prepared with a different tokenizer"):
        open_mixture("rows,another")


def edit_meta(workdir, change):
    """Changes the description of a run's newest checkpoint on disk."""
    (path,) = (checkpoint.find(workdir, "run") / "meta").glob("metadata")
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_a_checkpoint_without_the_newest_keys_opens_with_their_defaults(old):
    def forget(stored):
        del stored["config"]["model"]["unroll"], stored["config"]["eval"]["task_items"]
        del stored["config"]["selection"]["stairs"]

    edit_meta("run", forget)
    trained = Pretrained.open("run", "--checkpoint")
    assert (trained.model.unroll, trained.config.eval.task_items, trained.config.selection.stairs) == (1, 0, 4)
    assert trained.config.objective == "cross_entropy"
    train_model(config_of_old_run(), old / "run")


@pytest.mark.parametrize("key", ["model.vision_tower", "selection.magic", "curriculum"])
def test_a_checkpoint_with_an_unknown_key_is_refused_by_name(old, key):
    def add(stored):
        *sections, name = key.split(".")
        section = stored["config"]
        for part in sections:
            section = section[part]
        section[name] = 1

    edit_meta("run", add)
    message = f"checkpoints/4: this version of rho1_jax does not know config.{key}"
    with pytest.raises(UserError, match=message):
        Pretrained.open("run", "--checkpoint")
    with pytest.raises(UserError, match=message):
        train_model(config_of_old_run(), old / "run")


def newer(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {formats.KEY: formats.FORMAT_VERSION + 1}))


def test_what_a_newer_version_wrote_is_refused_by_name(old):
    message = f"a newer version of rho1_jax wrote this .format {formats.FORMAT_VERSION + 1}"
    edit_meta("run", lambda stored: stored.update(format_version=formats.FORMAT_VERSION + 1))
    with pytest.raises(UserError, match=f"checkpoints/4: {message}"):
        Pretrained.open("run", "--checkpoint")
    newer(old / "rows" / "scores" / "stored" / "manifest.json")
    with pytest.raises(UserError, match=f"scores/stored: {message}"):
        ScoreStore(Store("rows"), "stored", True, None)
    newer(old / "rows" / "manifest.json")
    with pytest.raises(UserError, match=f"rows: {message}"):
        Store("rows")


def test_an_evaluation_that_an_older_version_began_resumes(old):
    evaluate_model("run", {}, old / "results")
    path = old / "results" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["eval"]["task_items"]
    path.write_text(json.dumps(settings))
    evaluate_model("run", {}, old / "results")


def test_a_completed_config_is_a_config_of_this_version(data):
    saved = as_saved(config_of("slm", data))
    assert complete(saved, "here") == saved
    assert complete({}, "here") == as_saved(default.get_config())
