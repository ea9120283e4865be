"""GPT-NeoX, Granite and Phi-3: decoding on a mesh, fused tensors, rotary positions, and what is refused by name."""

import dataclasses
import json
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import MODELS, RUN_SETTINGS, tensors, tiny, write_hf_folder
from safetensors.numpy import load_file, save_file

from rho1_jax.configs import default
from rho1_jax.models import decoder, hf_config
from rho1_jax.models.families import family_of
from rho1_jax.models.generation import Generator
from rho1_jax.models.hf_config import HfConfigJson
from rho1_jax.models.hf_folder import HuggingFaceFolder
from rho1_jax.models.rope import Rope, rotate
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.schema import parse_json
from rho1_jax.training.config import model_config

SWITCHED = {name: dataclasses.replace(MODELS[name], vocab_size=300) for name in ("gpt_neox", "granite", "phi3")}
SWITCHED["phi3"] = dataclasses.replace(SWITCHED["phi3"], rope_original_length=32)
SWITCHED["gpt_neox, sequential"] = dataclasses.replace(
    SWITCHED["gpt_neox"], parallel_residual=False, rope_fraction=0.25, tied_embeddings=True
)
EVERY_MODEL = pytest.mark.parametrize("config", SWITCHED.values(), ids=SWITCHED)


def random_params(config, seed=1):
    """Parameters that differ from each other everywhere, biases and norms included."""
    params, rng = decoder.init_params(config, seed), np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)


@pytest.mark.slow
@EVERY_MODEL
def test_decoding_on_a_mesh_equals_one_pass_over_the_whole_text(config, tokenizer):
    """The longest prompt may pass the original length of phi3's rotary positions, the others stay below it."""
    graphdef, params = decoder.build(config), random_params(config)
    prompts = ["Document 1: 3+4=", "D", "Document 12: 34+56=90; 12+34=46; 78+91=169; 1+2=3"]
    mesh = sharding.make_mesh(2, 2, 2)
    limits = [len(tokenizer.encode_prompt(prompt)) + 12 for prompt in prompts]
    assert sorted(limit > 32 for limit in limits) == [False, False, True]
    model = nnx.merge(graphdef, params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        generator = Generator(graphdef, placed, tokenizer, 8)
        continuations = list(generator.run(deque(enumerate(prompts)), max_new_tokens=12, stops=()))
    for continuation in continuations:
        ids = tokenizer.encode_prompt(prompts[continuation.number])
        text = ids + continuation.token_ids
        row = np.zeros((2, 1, limits[continuation.number]), np.int32)
        row[0, 0, : len(text)], row[1, 0, : len(text)] = text, 1
        hidden = model(jnp.array(row[0]), jnp.array(row[1]))[0, len(ids) - 1 : len(text) - 1]
        logprobs = jax.nn.log_softmax(hidden @ model.output_VD().T)
        assert len(continuation.token_ids) > 3
        np.testing.assert_array_equal(logprobs.argmax(axis=-1), continuation.token_ids)
        np.testing.assert_allclose(continuation.logprobs, logprobs.max(axis=-1), rtol=1e-4, atol=1e-4)


@EVERY_MODEL
def test_a_device_reads_only_its_own_part_of_a_fused_tensor(config, tokenizer, tmp_path, monkeypatch):
    sizes, read = [], HuggingFaceFolder.read
    path = write_hf_folder(tmp_path / "hf", config, random_params(config), tokenizer)
    monkeypatch.setattr(
        HuggingFaceFolder, "read", lambda self, *args: sizes.append(read(self, *args).size) or read(self, *args)
    )
    loaded = HuggingFaceFolder(path).load(config, sharding.make_mesh(1, 1, 2, jax.devices()[:2]), "float32")
    assert sum(sizes) == decoder.param_count(config)
    jax.tree.map(np.testing.assert_array_equal, loaded, random_params(config))


def test_fused_tensors_hold_their_parts_in_the_published_order():
    config = SWITCHED["gpt_neox"]
    params = random_params(config)
    stored, attention = tensors(params, "gpt_neox"), params["layers"]["attention"]
    fused = stored["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(4, 3, 8, 32)
    biases = stored["gpt_neox.layers.1.attention.query_key_value.bias"].reshape(4, 3, 8)
    for n, name in enumerate("qkv"):
        np.testing.assert_array_equal(fused[:, n], attention[name][1].transpose(1, 2, 0))
        np.testing.assert_array_equal(biases[:, n], attention[f"{name}_bias"][1])
    params = random_params(SWITCHED["phi3"])
    stored, layers = tensors(params, "phi3"), params["layers"]
    parts = [layers["attention"][name][1].reshape(32, -1).T for name in "qkv"]
    np.testing.assert_array_equal(stored["model.layers.1.self_attn.qkv_proj.weight"], np.concatenate(parts))
    parts = [layers["feed_forward"][name][1].T for name in ("gate", "up")]
    np.testing.assert_array_equal(stored["model.layers.1.mlp.gate_up_proj.weight"], np.concatenate(parts))


def test_a_fused_tensor_of_the_wrong_shape_is_named(tokenizer, tmp_path):
    config = SWITCHED["phi3"]
    folder = write_hf_folder(tmp_path / "hf", config, random_params(config), tokenizer)
    wrong = dataclasses.replace(config, kv_heads=1)
    message = r"model.layers.0.self_attn.qkv_proj.weight \[64, 32\] instead of \[48, 32\]"
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(folder).check(wrong)


def test_buffers_in_published_files_of_pythia_are_not_unexpected(tokenizer, tmp_path):
    config = SWITCHED["gpt_neox"]
    folder = write_hf_folder(tmp_path / "hf", config, random_params(config), tokenizer)
    stored = load_file(folder / "model.safetensors")
    for n in range(2):
        stored[f"gpt_neox.layers.{n}.attention.bias"] = np.ones((1, 1, 64, 64), bool)
        stored[f"gpt_neox.layers.{n}.attention.masked_bias"] = np.array(-1e9, np.float32)
        stored[f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(stored, folder / "model.safetensors")
    HuggingFaceFolder(folder).check(config)


def test_long_rotary_positions_depend_on_the_length_of_the_row():
    rope = Rope.of(SWITCHED["phi3"])
    short, long = rope.rotation(8, 32), rope.rotation(8, 33)
    np.testing.assert_allclose(short.frequencies, [1 / 1.0, 0.01 / 1.5])
    np.testing.assert_allclose(long.frequencies, [1 / 2.0, 0.01 / 30.0])
    mixed = rope.rotation(8, jnp.array([32, 33]))
    for row, rotation in enumerate((short, long)):
        np.testing.assert_allclose(mixed.frequencies[row, 0, 0], rotation.frequencies, rtol=1e-6)
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 1, 1, 8)), jnp.float32)
    rotated = rotate(x, jnp.zeros((1, 1), int), short)
    np.testing.assert_allclose(rotated[..., :4], 1.2 * x[..., :4], rtol=1e-6)
    np.testing.assert_array_equal(rotated[..., 4:], x[..., 4:])


LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 30.0]}
REFUSED = [
    ("gpt_neox", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported, only 'gelu'"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=False is not supported, only True"),
    ("gpt_neox", {"layer_norm_eps": None}, "lacks layer_norm_eps"),
    ("gpt_neox", {"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=32"),
    ("gpt_neox", {"rotary_pct": 0.4}, "heads of width 8, of which 3 rotate: rotary positions need an even width"),
    ("gpt_neox", {"rotary_pct": 1.5}, "rotary_pct: input should be less than or equal to 1, not 1.5"),
    ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual: input should be a valid boolean"),
    ("gpt_neox", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ("granite", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ("granite", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
    ("granite", {"logits_scaling": 0}, "logits_scaling: input should be greater than 0, not 0"),
    ("granite", {"residual_multiplier": "x"}, "residual_multiplier: input should be a valid number, not 'x'"),
    ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
    ("granite", {"rope_scaling": LONG}, "rope_type 'longrope' is not supported"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True is not supported, only False"),
    ("phi3", {"partial_rotary_factor": 0.1}, "heads of width 8, of which 0 rotate"),
    ("phi3", {"rope_scaling": {**LONG, "short_factor": [1.0]}}, "short_factor has 1 factors, but 2 pairs of a head"),
    (
        "phi3",
        {"rope_scaling": {**LONG, "long_factor": [1.0, 0]}},
        "rope_scaling.long_factor.1: input should be greater than 0",
    ),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0]}}, "its rope scaling lacks long_factor"),
    ("phi3", {"rope_scaling": {**LONG, "type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings: input should be greater than"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED, ids=str)
def test_what_the_decoder_does_not_compute_is_refused_by_name(name, changes, message):
    described = hf_config.to_hf(SWITCHED[name], "float32", None, 2) | changes
    with pytest.raises(UserError, match=f"here: {message}"):
        hf_config.from_hf(parse_json(json.dumps(described), HfConfigJson, "here"), "here", RUN_SETTINGS)


def test_the_names_of_older_and_newer_files_mean_the_same():
    neox, phi3 = (hf_config.to_hf(SWITCHED[name], "float32", None, 2) for name in ("gpt_neox", "phi3"))
    assert {"rotary_pct", "rotary_emb_base", "layer_norm_eps"} <= neox.keys()
    assert not {"partial_rotary_factor", "rope_theta", "rms_norm_eps"} & neox.keys()
    newer = neox | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}
    read = hf_config.from_hf(newer, "here", RUN_SETTINGS)
    assert (read.rope_theta, read.rope_fraction) == (500.0, 1.0)
    older = {key: value for key, value in neox.items() if key not in ("rotary_pct", "attention_bias", "head_dim")}
    assert hf_config.from_hf(older, "here", RUN_SETTINGS).rope_fraction == 0.25
    long = {**phi3["rope_scaling"], "type": "su"}
    assert hf_config.from_hf(phi3 | {"rope_scaling": long}, "here", RUN_SETTINGS) == SWITCHED["phi3"]


def test_the_attention_factor_follows_from_the_two_context_lengths():
    """Transformers 4 allows Phi-3's rope_scaling only three keys, so the factor is written only if it differs."""
    described = hf_config.to_hf(SWITCHED["phi3"], "float32", None, 2)
    assert described["rope_scaling"].pop("attention_factor") == 1.2
    read = hf_config.from_hf(described, "here", RUN_SETTINGS)
    assert read.rope_attention_factor == pytest.approx(np.sqrt(1 + np.log(64 / 32) / np.log(32)))
    assert hf_config.to_hf(read, "float32", None, 2)["rope_scaling"] == LONG


@pytest.mark.parametrize(
    "config, message",
    [
        (tiny(family="gpt_neox"), "config.model.kv_heads=2: GPT-NeoX needs kv_heads equal to heads=4"),
        (
            tiny(family="gpt_neox", kv_heads=4, head_width=16),
            "config.model.head_width=16: GPT-NeoX needs width / heads",
        ),
        (tiny(family="granite", sliding_window=4), "sliding_window: the family granite has none"),
        (tiny(family="phi3", rope_factor=8.0), "config.model.rope_factor=8: Phi-3 stretches rotary positions only"),
    ],
    ids=str,
)
def test_a_model_that_hugging_faces_format_cannot_express_is_not_exported(config, message):
    with pytest.raises(UserError, match=message):
        hf_config.to_hf(config, "float32", None, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"residual_scale": 0.5}, "config.model.residual_scale=0.5: the family llama does not use this key"),
        ({"rope_fraction": 0.5}, "config.model.rope_fraction=0.5: the family llama does not use this key"),
        ({"rope_scaling": "long"}, "config.model.rope_short_factors has 0 factors, but 16 pairs rotate"),
        ({"family": "phi3", "rope_fraction": 0.1}, "rope_fraction=0.1 of config.model.head_width=32 is 3"),
    ],
    ids=str,
)
def test_a_config_with_rotary_positions_or_multipliers_that_do_not_fit_is_refused(changes, message):
    config = default.get_config("clm")
    config.model.update(changes)
    with pytest.raises(UserError, match=message):
        family_of(model_config(config))


def test_a_saved_config_gives_lists_of_factors_back_as_tuples():
    saved = json.loads(json.dumps(vars(SWITCHED["phi3"])))
    assert type(SWITCHED["phi3"])(**saved) == SWITCHED["phi3"]
