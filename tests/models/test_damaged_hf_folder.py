"""Hugging Face folders that are damaged, absurd or malicious: one line that names the file and the key."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny, write_hf_folder
from safetensors.numpy import load_file, save_file

from rho1_jax.evaluate import evaluate_model
from rho1_jax.generate import generate_text
from rho1_jax.import_hf import import_hf
from rho1_jax.models import decoder
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.pretrained import Pretrained

CONFIG = tiny(tied_embeddings=False, vocab_size=300)
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A Llama folder with the test tokenizer's vocabulary."""
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "llama", CONFIG, decoder.init_params(CONFIG, 3), tokenizer)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def edit_tensors(path, edit):
    edited = load_file(path / "model.safetensors")
    edit(edited)
    save_file(edited, path / "model.safetensors")


LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TOO_LARGE = r"{}: input should be less than 2147483648, not 3000000000"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": "x"}, "architectures: input should be a valid array, not 'x'"),
        ({"architectures": None}, "unknown architecture none"),
        ({"architectures": []}, "unknown architecture none"),
        ({"architectures": [3]}, r"architectures.0: input should be a valid string, not 3"),
        ({"hidden_size": "32"}, "hidden_size: input should be a valid integer, not '32'"),
        ({"hidden_size": [32]}, r"hidden_size: input should be a valid integer, not \[32\]"),
        ({"hidden_size": 0}, "hidden_size: input should be greater than 0, not 0"),
        ({"vocab_size": -300}, "vocab_size: input should be greater than 0, not -300"),
        ({"vocab_size": 3_000_000_000}, TOO_LARGE.format("vocab_size")),
        ({"num_hidden_layers": True}, "num_hidden_layers: input should be a valid integer, not True"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: input should be a valid integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: input should be greater than 0, not 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"head_dim": 0}, "head_dim: input should be greater than 0, not 0"),
        ({"head_dim": 7}, "heads of width 7, of which 7 rotate: rotary positions need an even width"),
        (
            {"head_dim": None, "num_attention_heads": 6},
            "num_attention_heads=6 does not divide hidden_size=32, and head",
        ),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: input should be greater than 0, not -1e-05"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: input should be a finite number, not nan"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps: input should be a valid number"),
        ({"rope_theta": -1}, "rope_theta: input should be greater than 0"),
        ({"rope_theta": float("inf")}, "rope_theta: input should be a finite number, not inf"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: input should be a valid boolean, not 'no'"),
        ({"rope_parameters": [1]}, r"rope_parameters: input should be an object, not \[1\]"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type: input should be a valid string, not 3"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta: input should be a valid number"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta: input should be a finite"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "positions that differ between layers are not"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": LLAMA_ROPE | {"factor": 0}}, "rope_scaling.factor: input should be greater than 0"),
        (
            {"rope_scaling": LLAMA_ROPE | {"high_freq_factor": 1.0}},
            "low_freq_factor=1.0 must be below high_freq_factor",
        ),
        ({"sliding_window": -8}, "sliding_window: input should be greater than 0, not -8"),
        ({"layer_types": "full_attention"}, "layer_types: input should be a valid array, not 'full_attention'"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["x"],
            },
            "layer_types must name full_attention or sliding_attention for each layer",
        ),
        (
            {"num_hidden_layers": 2**31 - 1},
            "num_hidden_layers is 2147483647 in config.json, but the files hold only 21",
        ),
        (
            {"hidden_size": 10**9, "intermediate_size": 2 * 10**9, "head_dim": 10**9},
            r"of the wrong shape: model.embed_tokens.weight \[300, 32\] instead of \[300, 1000000000\]",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_file_and_key(copy, changes, message, tmp_path):
    edited = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match=f"copy/?(config.json)?: .*{message}"):
        import_hf(copy, tmp_path / "out", dtype=None)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"input should be an object, not \[\]"),
        ('"config"', "input should be an object, not 'config'"),
        ("[" * 100_000, "not JSON: recursion limit exceeded"),
        ('{"a": ' * 100_000, "not JSON: recursion limit exceeded"),
        ("{", "not JSON: EOF"),
        ("", "not JSON: EOF"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_hold_something_else_are_named(copy, name, text, message):
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=f"copy/{name}: {message}"):
        HuggingFaceFolder(copy)


SHARD = "model-00001-of-00001.safetensors"
INSIDE = "input should be the name of a .safetensors file in the same folder, not"


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "weight_map: field required"),
        ({"weight_map": [SHARD]}, "weight_map: input should be an object"),
        ({"weight_map": {NORM: 3}}, f"weight_map.{NORM}: input should be a valid string, not 3"),
        ({"weight_map": {NORM: f"../copy/{SHARD}"}}, f"weight_map.{NORM}: {INSIDE}"),
        ({"weight_map": {NORM: "/etc/passwd"}}, f"weight_map.{NORM}: {INSIDE} '/etc/passwd'"),
        ({"weight_map": {NORM: ".."}}, f"weight_map.{NORM}: {INSIDE} '..'"),
        ({"weight_map": {NORM: "a\0.safetensors"}}, f"weight_map.{NORM}: {INSIDE}"),
        ({"weight_map": {NORM: "x" * 5000 + ".safetensors"}}, "cannot read it"),
        ({"weight_map": {"model.none.weight": SHARD}}, f"model.none.weight is not in {SHARD}"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(copy, index, message):
    (copy / "model.safetensors").rename(copy / SHARD)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(copy)


def test_files_that_are_links_are_read(copy, tmp_path):
    """Hugging Face's cache is a folder of links to files elsewhere."""
    (copy / "model.safetensors").rename(tmp_path / "blob")
    (copy / SHARD).symlink_to(tmp_path / "blob")
    weight_map = dict.fromkeys(load_file(tmp_path / "blob"), SHARD)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    HuggingFaceFolder(copy).check(CONFIG)


@pytest.mark.parametrize("size", [0, 7, 2**40, 2**63])
def test_a_header_of_the_wrong_size_is_refused(copy, size):
    weights = copy / "model.safetensors"
    weights.write_bytes(size.to_bytes(8, "little") + weights.read_bytes()[8:])
    with pytest.raises(UserError, match="model.safetensors: cannot read it"):
        HuggingFaceFolder(copy)


def test_a_tied_model_stored_as_its_head_is_read(tokenizer, tmp_path):
    """As `safetensors.torch.save_model` stores it. Of two names for one matrix, it keeps the first of the alphabet."""
    config = dataclasses.replace(CONFIG, tied_embeddings=True)
    params = decoder.init_params(config, 1)
    path = write_hf_folder(tmp_path / "hf", config, params, tokenizer)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    read = HuggingFaceFolder(path).load(config, sharding.make_mesh(2, 2, 2), "float32")
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    "head", [np.zeros(300, np.float32), np.zeros((300, 32), np.int8), np.zeros((3, 32), np.float32)]
)
def test_a_tied_head_that_cannot_equal_the_embedding_is_unexpected(copy, head):
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": head}))
    with pytest.raises(UserError, match="unexpected: lm_head.weight"):
        HuggingFaceFolder(copy).check(dataclasses.replace(CONFIG, tied_embeddings=True))


def test_a_vocabulary_below_the_tokenizers_is_refused_wherever_the_two_meet(copy, reference, tmp_path, monkeypatch):
    message = "the tokenizer has 300 token ids, but the model's vocabulary has only 200"
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(described | {"vocab_size": 200}))
    edit_tensors(copy, lambda t: t.update({name: t[name][:200] for name in rows}))
    with pytest.raises(UserError, match=f"copy.*: {message}"):
        import_hf(copy, tmp_path / "out", dtype=None)
    assert not (tmp_path / "out").exists()
    run = Pretrained.open(reference, "--checkpoint")
    small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=200))
    monkeypatch.setattr(Pretrained, "open", lambda path, key: small)
    for command in (
        lambda: generate_text(reference, ["1+1="]),
        lambda: evaluate_model(reference, {"questions": "x=y"}),
    ):
        with pytest.raises(UserError, match=f"tokenizer: {message}"):
            command()
