"""The package's own families: what they refuse by name, and the numbers that config.json leaves to them."""

import dataclasses
import re

import pytest
from helpers import MODELS, RUN_SETTINGS, TINY, tiny

from rho1_jax.models import hf_config
from rho1_jax.models.families import FAMILIES, family_of
from rho1_jax.models.families.family import OPTIONAL_KEYS
from rho1_jax.models.rope import Rope
from rho1_jax.runtime.errors import UserError

LOCAL, GLOBAL = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED = [
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported, only 'gelu_pytorch_tanh'"),
    ("gemma2", {"sliding_window": None}, "lacks sliding_window"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ("gemma2", {"layer_types": [LOCAL, GLOBAL]}, "layer_types must name full_attention or sliding_attention for each"),
    ("gemma2", {"layer_types": [LOCAL, GLOBAL, "x"]}, "layer_types must name full_attention or sliding_attention"),
    ("gemma2", {"layer_types": [GLOBAL, LOCAL, GLOBAL]}, "layer_types is not supported: full_attention must be every"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported, only None"),
    ("gemma3", {"layer_types": [LOCAL, GLOBAL, GLOBAL, GLOBAL, LOCAL]}, "layer_types is not supported"),
    ("gemma3", {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}}, "scaling is not supported here"),
    ("gemma3", {"rope_parameters": {GLOBAL: {"rope_type": "yarn"}}}, "rope_type 'yarn' is not supported"),
    ("gemma3", {"rope_parameters": {LOCAL: {"partial_rotary_factor": 0.5}}}, "sliding_attention: partial_rotary_fac"),
    ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    (
        "gemma3",
        {"rope_parameters": {GLOBAL: LINEAR}, "rope_scaling": LINEAR | {"factor": 4.0}},
        "contradict each other",
    ),
    ("olmo2", {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": LINEAR}, "rope_parameters and rope_scaling con"),
    ("olmo2", {"rope_scaling": {"rope_type": "linear"}}, "its rope scaling lacks factor"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True is not supported, only False"),
    ("smollm3", {"layer_types": [LOCAL] * 5}, "layer_types is not supported, except for full_attention"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 5 layers"),
    ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1]}, "no_rope_layers is not supported: 0 must be at every n-th layer"),
]


@pytest.mark.parametrize("family, changes, message", REFUSED, ids=str)
def test_a_family_refuses_by_name_what_it_does_not_compute(family, changes, message):
    described = hf_config.to_hf(MODELS[family], "float32", None, 2)
    assert hf_config.from_hf(described, "here", RUN_SETTINGS) == MODELS[family]
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        hf_config.from_hf(described | changes, "here", RUN_SETTINGS)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_without_a_window_is_not_exported(family):
    with pytest.raises(UserError, match=f"config.model.sliding_window: the family {family} needs one"):
        hf_config.to_hf(dataclasses.replace(MODELS[family], sliding_window=None), "float32", None, 2)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_query_scale_that_gemmas_format_cannot_hold_is_not_exported(family):
    with pytest.raises(UserError, match=f"config.model.query_scale=0.3: .* {family} needs 1 / sqrt of a whole number"):
        hf_config.to_hf(dataclasses.replace(MODELS[family], query_scale=0.3), "float32", None, 2)


@pytest.mark.parametrize("family", ["olmo2", "smollm3"])
def test_a_window_is_not_exported_where_the_format_has_none(family):
    with pytest.raises(UserError, match=f"config.model.sliding_window: the family {family} has none"):
        hf_config.to_hf(dataclasses.replace(MODELS[family], sliding_window=4), "float32", None, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_the_sliding_window(family):
    model = dataclasses.replace(MODELS.get(family, tiny(family=family)), sliding_window=7)
    assert 7 in FAMILIES[family].structure(model).windows


OPTIONAL = {
    "global_every": 3,
    "rope_local_theta": 7.0,
    "no_rope_every": 3,
    "attention_soft_cap": 7.0,
    "logit_soft_cap": 7.0,
    "rope_short_factors": (7.0, 7.0),
    "rope_long_factors": (7.0, 7.0),
    "rope_attention_factor": 7.0,
    "rope_fraction": 0.25,
    "parallel_residual": False,
    "embedding_scale": 7.0,
    "residual_scale": 7.0,
    "query_scale": 0.5,
    "logit_divisor": 7.0,
}


@pytest.mark.parametrize("family", ["llama", *MODELS])
@pytest.mark.parametrize("key", OPTIONAL_KEYS)
def test_a_key_of_some_families_is_read_or_refused(family, key):
    model = MODELS.get(family, TINY)
    changed = dataclasses.replace(model, **{key: OPTIONAL[key]})
    if key in FAMILIES[family].optional_keys:
        before, after = (FAMILIES[family].structure(config) for config in (model, changed))
        assert (before, before.kinds(model)) != (after, after.kinds(changed))
        assert hf_config.to_hf(changed, "float32", None, 2) != hf_config.to_hf(model, "float32", None, 2)
    else:
        with pytest.raises(UserError, match=re.escape(f"{key}={OPTIONAL[key]}: the family {family} does not use")):
            family_of(changed)


def test_rotary_positions_that_are_described_twice():
    described = hf_config.to_hf(tiny(family="olmo2"), "float32", None, 2)
    for kind in ("type", "rope_type"):
        twice = {"rope_parameters": {"rope_theta": 9.0, **LINEAR}, "rope_scaling": {kind: "linear", "factor": 2.0}}
        model = hf_config.from_hf(described | twice, "here", RUN_SETTINGS)
        assert (model.rope_theta, model.rope_scaling, model.rope_factor) == (9.0, "linear", 2.0)


def test_the_families_own_patterns_and_numbers():
    """What Transformers 5 computes for a config.json without the keys."""
    gemma2, gemma3, smollm3 = (
        FAMILIES[name].structure(tiny(family=name, layers=36, sliding_window=9, rope_theta=1e6))
        for name in ("gemma2", "gemma3", "smollm3")
    )
    assert gemma2.windows == (9, None) and (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (50.0, 30.0)
    assert gemma3.windows == (9,) * 5 + (None,) and gemma3.ropes == (Rope(10_000.0),) * 5 + (Rope(1e6),)
    assert smollm3.ropes == (Rope(1e6),) * 3 + (None,)


@pytest.mark.parametrize(
    "family, key, value, field, expected",
    [
        ("gemma2", "sliding_window_pattern", 3, "global_every", 2),
        ("gemma3", "sliding_window_pattern", 3, "global_every", 3),
        ("gemma3", "rope_theta", None, "rope_theta", 1e6),
        ("smollm3", "rope_theta", None, "rope_theta", 2e6),
    ],
)
def test_a_key_that_transformers_does_not_read_or_that_is_null(family, key, value, field, expected):
    described = hf_config.to_hf(
        tiny(family=family, sliding_window=9 if "gemma" in family else None), "float32", None, 2
    )
    del described["rope_theta"]
    described.pop("layer_types")
    assert getattr(hf_config.from_hf(described | {key: value}, "here", RUN_SETTINGS), field) == expected


# The text_config of google/gemma-3-4b-it leaves the other sizes to Transformers.
GEMMA3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def test_the_text_config_of_gemma_3():
    described = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    text, prefix = hf_config.text_model({**described, "text_config": GEMMA3_4B}, "here")
    model = hf_config.from_hf(text, "here", RUN_SETTINGS)
    assert prefix == "language_model." and (model.family, model.layers, model.width) == ("gemma3", 34, 2560)
    assert (model.vocab_size, model.heads, model.kv_heads, model.head_width) == (262_208, 8, 4, 256)
    kinds = family_of(model).structure(model).kinds(model)
    assert kinds == [(1024, Rope(10_000.0))] * 5 + [(None, Rope(1e6, "linear", 8.0))]
    assert model.tied_embeddings and model.context_length == 131_072
    with pytest.raises(UserError, match="here: text_config.final_logit_softcapping=3.0: .* does not apply it"):
        hf_config.text_model({**described, "text_config": {"final_logit_softcapping": 3.0}}, "here")
    with pytest.raises(UserError, match="here: lacks text_config"):
        hf_config.text_model(described, "here")
