"""Hugging Face folders, without Transformers: reading onto any mesh, errors, and no partial output."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, TINY, config_of, run_command, tiny, write_hf_folder
from safetensors.numpy import load_file, save_file

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.export_hf import export_hf, export_raw
from rho1_jax.import_hf import import_hf
from rho1_jax.models import decoder, hf_config
from rho1_jax.models.families import family_of
from rho1_jax.models.hf_config import HfConfigJson
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.schema import parse_json
from rho1_jax.runtime.sharding import path_name
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint

FAMILIES = {
    "llama": tiny(tied_embeddings=False, vocab_size=300),
    "mistral": tiny(family="mistral", sliding_window=8, head_width=16, vocab_size=300),
    "qwen2": tiny(family="qwen2", vocab_size=300),
    "qwen3": tiny(family="qwen3", vocab_size=300, rope_factor=8.0, rope_original_length=32),
    **{name: dataclasses.replace(MODELS[name], vocab_size=300) for name in ("gpt_neox", "granite", "phi3")},
}
RUN_SETTINGS = {"compute_dtype": "float32", "attention": "auto", "remat": "none", "unroll": 1, "loss_chunk": 64}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A Llama folder with the test tokenizer's vocabulary."""
    config = FAMILIES["llama"]
    path = tmp_path_factory.mktemp("hf") / "llama"
    return write_hf_folder(path, config, decoder.init_params(config, 3), tokenizer)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_has_one_tensor_name(config):
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(decoder.abstract_params(config))[0]]
    assert set(paths) <= family_of(config).tensors.keys()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_config_json_round_trip(config):
    described = json.dumps(hf_config.to_hf(config, "float32", None, 2))
    assert hf_config.from_hf(parse_json(described, HfConfigJson, "here"), "here", RUN_SETTINGS) == config


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_reading_onto_any_mesh(config, sizes, tokenizer, tmp_path):
    params = decoder.init_params(config, 1)
    path = write_hf_folder(tmp_path / "hf", config, params, tokenizer)
    mesh = sharding.make_mesh(*sizes)
    read = HuggingFaceFolder(path).load(config, mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, read, sharding.param_shardings(read, mesh)))


def test_each_device_reads_its_own_part_and_no_more(folder, monkeypatch):
    sizes = []
    read = HuggingFaceFolder.read
    monkeypatch.setattr(
        HuggingFaceFolder, "read", lambda self, *args: sizes.append(read(self, *args).size) or read(self, *args)
    )
    config = FAMILIES["llama"]
    HuggingFaceFolder(folder).load(config, sharding.make_mesh(1, 4, 2), "float32")
    assert sum(sizes) == decoder.param_count(config)
    assert max(sizes) <= config.vocab_size * config.width // 8


def test_reading_in_a_given_dtype(folder):
    mesh = sharding.make_mesh(8, 1, 1)
    opened = HuggingFaceFolder(folder)
    exact, rounded = (opened.load(FAMILIES["llama"], mesh, dtype) for dtype in (None, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("bfloat16"), b), exact, rounded)


def edit_tensors(path, edit):
    edited = load_file(path / "model.safetensors")
    edit(edited)
    save_file(edited, path / "model.safetensors")


def edit_config(path, **changes):
    edited = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(edited))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update(extra=np.zeros(3)), "unexpected: extra"),
        (lambda t: t.update({NORM: np.zeros(7, np.float32)}), rf"of the wrong shape: {NORM} \[7\] instead of \[32\]"),
        (lambda t: t.update({NORM: np.zeros(32, np.int8)}), rf"not F32, BF16, F16: {NORM} \(I8\)"),
    ],
)
def test_tensors_that_do_not_match_are_named_and_nothing_is_written(copy, edit, message, tmp_path):
    edit_tensors(copy, edit)
    with pytest.raises(UserError, match=message):
        import_hf(copy, tmp_path / "out", dtype=None)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture GPT2LMHeadModel; use one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "its rope scaling lacks low_freq_factor, high"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "a sliding window in some layers and not in others",
        ),
    ],
)
def test_a_config_that_the_decoder_cannot_compute_is_refused(copy, changes, message):
    edit_config(copy, **changes)
    described = json.loads((copy / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        hf_config.from_hf(described, str(copy / "config.json"), RUN_SETTINGS)


def test_buffers_in_older_files_and_a_tied_head_are_not_unexpected(copy):
    edit_tensors(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    HuggingFaceFolder(copy).check(FAMILIES["llama"])
    tied = dataclasses.replace(FAMILIES["llama"], tied_embeddings=True)
    with pytest.raises(UserError, match=r"unexpected: lm_head.weight"):
        HuggingFaceFolder(copy).check(tied)
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    HuggingFaceFolder(copy).check(tied)


def test_a_file_that_is_missing_or_cut_short_is_named(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: cannot read it"):
        HuggingFaceFolder(copy)
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors: cannot read it"):
        HuggingFaceFolder(copy)
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor .*pickled weights are not supported"):
        HuggingFaceFolder(copy)


@pytest.mark.slow
def test_the_commands_import_and_export_and_report_errors_in_one_line(folder, tmp_path):
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    done = run_command("tools.import_hf", f"--hf={folder}", f"--output={imported}", "--dtype=bfloat16")
    assert done.returncode == 0 and "parameters" in done.stdout and "peak memory" in done.stdout
    done = run_command("tools.export_hf", f"--checkpoint={imported}", f"--output={exported}")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(path / "model.safetensors") for path in (folder, exported))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(jnp.bfloat16))
    assert Tokenizer(exported).fingerprint == Tokenizer(folder).fingerprint
    again = run_command("tools.import_hf", f"--hf={folder}", f"--output={imported}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "exists; choose another --output" in again.stderr
    missing = run_command("tools.import_hf", f"--hf={tmp_path}", f"--output={tmp_path / 'no'}")
    assert missing.returncode == 2 and "config.json: no such file" in missing.stderr
    assert not (tmp_path / "no").exists()


def test_values_too_large_for_the_dtype_are_refused_and_nothing_is_written(copy, tmp_path):
    edit_tensors(copy, lambda t: t.update({NORM: np.full(32, 1e6, np.float32)}))
    import_hf(copy, tmp_path / "imported", dtype=None)
    with pytest.raises(UserError, match="layers/attention_norm/scale has values too large for float16"):
        export_hf(str(tmp_path / "imported"), tmp_path / "exported", dtype="float16")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("export", [export_hf, export_raw])
def test_exporting_a_folder_says_that_it_already_is_one(folder, tmp_path, export):
    with pytest.raises(UserError, match=f"--checkpoint={folder} already is a Hugging Face folder; there is nothing to"):
        export(str(folder), tmp_path / "exported", None)
    assert not list(tmp_path.iterdir())


def test_a_model_that_its_family_cannot_express_is_not_exported():
    with pytest.raises(UserError, match="sliding_window: the family llama has none"):
        hf_config.to_hf(tiny(sliding_window=4), "float32", None, 2)


@pytest.mark.slow
def test_training_from_a_folder_equals_training_from_its_imported_checkpoint(folder, data, corpus, tmp_path):
    """Policy and reference. The data was prepared with the folder's tokenizer."""
    import_hf(folder, tmp_path / "imported", dtype=None)
    final = {}
    for name, path in (("folder", folder), ("checkpoint", tmp_path / "imported")):
        config = config_of("slm", data, path)
        config.init.checkpoint = str(path)
        config.model.tied_embeddings = False
        config.model.context_length = TINY.context_length
        config.steps = 2
        final[name] = jax.device_get(train_model(config, tmp_path / name))
    jax.tree.map(np.testing.assert_array_equal, final["folder"], final["checkpoint"])
    metas = [checkpoint.load_meta(checkpoint.find(tmp_path / name, "run")) for name in final]
    assert metas[0].reference["fingerprint"] == metas[1].reference["fingerprint"]
    assert metas[0].reference["path"] == str(folder)


def test_a_folder_with_another_tokenizer_is_refused(copy, data, tmp_path):
    (copy / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    config = config_of("slm", data, copy)
    with pytest.raises(UserError, match=r"copy has another tokenizer \(.*prepare the data with .*copy"):
        train_model(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
