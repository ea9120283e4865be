"""Hugging Face's config.json to a ModelConfig and back.

This module handles what all families share; `families` adds the rest. Import refuses, by name, every key that asks for
something the decoder does not compute.
"""

import reprlib
from typing import Annotated, Any

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import FAMILIES, ConfigJson, Family, family_of
from rho1_jax.runtime.errors import UserError

Size = Annotated[int, Field(gt=0, lt=2**31)]  # JAX counts elements along an axis in int32
Positive = Annotated[pydantic.FiniteFloat, Field(gt=0)]
Period = Annotated[int, Field(gt=0, le=1024)]  # of a pattern over the layers


class LayerRopeJson(TypedDict, total=False):
    """Rotary positions of one kind of layer in config.json."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    rope_type: str
    type: str  # the name of `rope_type` in older files
    rope_theta: Positive | None
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size


class RopeJson(LayerRopeJson, total=False):
    """Rotary positions in config.json: those of all layers, or those of each kind of layer."""

    full_attention: LayerRopeJson
    sliding_attention: LayerRopeJson


class HfConfigJson(TypedDict, total=False):
    """The keys of config.json that all or several families read. Null counts as missing. Other keys are allowed."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    architectures: list[str] | None
    vocab_size: Size | None
    hidden_size: Size | None
    num_hidden_layers: Size | None
    num_attention_heads: Size | None
    num_key_value_heads: Size | None
    head_dim: Size | None
    intermediate_size: Size | None
    max_position_embeddings: Size | None
    rms_norm_eps: Positive | None
    tie_word_embeddings: bool
    rope_theta: Positive | None
    rope_parameters: RopeJson | None
    rope_scaling: RopeJson | None
    sliding_window: Size | None
    use_sliding_window: bool | None
    max_window_layers: Annotated[int, Field(ge=0)] | None
    layer_types: list[str] | None
    sliding_window_pattern: Period
    rope_local_base_freq: Positive
    query_pre_attn_scalar: Size
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
    use_bidirectional_attention: bool | None
    no_rope_layers: list[int] | None
    no_rope_layer_interval: Period
    text_config: "HfConfigJson"


# Models of text and images: architecture -> architecture of its text model, and the prefix of its tensors' names.
TEXT_MODELS = {"Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "language_model.")}
# Key of config.json -> our field.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ff_width",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
}
# Keys of config.json with the only value that the decoder computes, in every family.
CONSTANTS: ConfigJson = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
ROPE_FIELDS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_length",
}
SCALINGS = {"llama3": tuple(ROPE_FIELDS), "linear": ("factor",)}  # the keys of each rope_type
DEFAULT_THETA = 10_000.0  # Transformers' own, for a config.json without the key


def text_model(hf_config: HfConfigJson, path: str) -> tuple[HfConfigJson, str]:
    """The config.json of the text model, and the prefix of its tensors' names; any other model as it is.

    Raises:
      UserError: the config.json of a model of text and images lacks text_config, or has a soft cap that Transformers
        would not apply.
    """
    architecture = (hf_config.get("architectures") or [""])[0]
    if architecture not in TEXT_MODELS:
        return hf_config, ""
    if "text_config" not in hf_config:
        raise UserError(f"{path}: lacks text_config, which describes the text model of {architecture}")
    (text_architecture, prefix), text = TEXT_MODELS[architecture], hf_config["text_config"]
    cap = text.get("final_logit_softcapping")
    if cap is not None:
        raise UserError(
            f"{path}: text_config.final_logit_softcapping={cap}: {architecture} does not apply it; remove it"
        )
    return {**hf_config, **text, "architectures": [text_architecture]}, prefix


def from_hf(hf_config: ConfigJson, path: str, run_settings: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      hf_config: content of config.json, checked against `HfConfigJson`.
      path: its path, for errors.
      run_settings: the fields that belong to a run rather than to a model: compute_dtype and so on.

    Raises:
      UserError: the architecture is unknown, a size is missing, sizes do not fit together, or a key asks for something
        the decoder does not compute.
    """
    architecture = (hf_config.get("architectures") or ["none"])[0]
    families = {family.architecture: family for family in FAMILIES.values()}
    if architecture not in families:
        raise UserError(
            f"{path}: unknown architecture {reprlib.repr(architecture)[1:-1]}; use one of {', '.join(families)}"
        )
    family = families[architecture]
    hf_config = {**family.defaults, **hf_config}
    for key, value in {**CONSTANTS, **family.constants}.items():
        if hf_config.get(key, value) != value:
            raise UserError(f"{path}: {key}={reprlib.repr(hf_config[key])} is not supported, only {value!r}")
    missing = [key for key in [*FIELDS, *family.required] if hf_config.get(key) is None]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    fields = {
        **{field: hf_config[key] for key, field in FIELDS.items()},
        "kv_heads": hf_config.get("num_key_value_heads"),
        "head_width": hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"],
        "tied_embeddings": hf_config.get("tie_word_embeddings", False),
        **_rope(hf_config, path, family),
        **family.from_hf(hf_config, path),
    }
    model = ModelConfig(family=family.name, **fields, **run_settings)
    _check_heads(model, hf_config, path)
    return model


def _check_heads(model: ModelConfig, hf_config: ConfigJson, path: str) -> None:
    heads = f"num_attention_heads={model.heads}"
    if model.heads % model.kv_heads:
        raise UserError(f"{path}: num_key_value_heads={model.kv_heads} does not divide {heads}")
    if not hf_config.get("head_dim") and model.width % model.heads:
        raise UserError(f"{path}: {heads} does not divide hidden_size={model.width}, and head_dim is not given")
    if model.head_width % 2 or not model.head_width:
        raise UserError(f"{path}: heads of width {model.head_width}: rotary positions need an even width above 0")


def _rope(hf_config: ConfigJson, path: str, family: Family) -> dict[str, Any]:
    # Transformers 5 stores everything in rope_parameters; earlier versions store rope_theta beside rope_scaling.
    rope: ConfigJson = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if "rope_local_theta" not in family.optional_keys:
        return _layer_rope(rope, hf_config.get("rope_theta"), path)
    # Transformers 5 stores two dicts in rope_parameters; earlier versions store rope_local_base_freq beside rope_theta.
    local_rope, local_theta = rope.get("sliding_attention", {}), hf_config.get("rope_local_base_freq")
    local = _layer_rope(local_rope, local_theta, f"{path}: rope_parameters.sliding_attention")
    if "rope_factor" in local:
        raise UserError(f"{path}: rope_parameters.sliding_attention: rope scaling is not supported here")
    shared = {key: value for key, value in rope.items() if key not in ("full_attention", "sliding_attention")}
    fields = _layer_rope({**shared, **rope.get("full_attention", {})}, hf_config.get("rope_theta"), path)
    return {**fields, "rope_local_theta": local["rope_theta"]}


def _layer_rope(rope: ConfigJson, theta: float | None, path: str) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor={reprlib.repr(rope['partial_rotary_factor'])} is not supported")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rotary positions that differ between layers are not supported")
    fields: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta") or theta or DEFAULT_THETA)}
    if kind == "default":
        return fields
    if kind not in SCALINGS:
        names = ", ".join(map(repr, SCALINGS))
        raise UserError(f"{path}: rope_type {reprlib.repr(kind)} is not supported, only 'default', {names}")
    missing = [key for key in SCALINGS[kind] if key not in rope]
    if missing:
        raise UserError(f"{path}: its rope scaling lacks {', '.join(missing)}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(
            f"{path}: low_freq_factor={rope['low_freq_factor']} must be below "
            f"high_freq_factor={rope['high_freq_factor']}"
        )
    return fields | {"rope_scaling": kind} | {ROPE_FIELDS[key]: rope[key] for key in SCALINGS[kind]}


def to_hf(model: ModelConfig, dtype: str, bos_id: int | None, eos_id: int) -> dict[str, Any]:
    """The config.json of a model, with the keys that Transformers 4 and 5 and inference servers read.

    Raises:
      UserError: the family has no Hugging Face format for this model.
    """
    family = family_of(model)
    hf_config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name of `dtype` before Transformers 5
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        **family.constants,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_theta,
        **{key: getattr(model, field) for key, field in FIELDS.items()},
    }
    if model.rope_factor != 1:
        scaling = {key: getattr(model, ROPE_FIELDS[key]) for key in SCALINGS[model.rope_scaling]}
        hf_config["rope_scaling"] = {"rope_type": model.rope_scaling, **scaling}
    return hf_config | family.to_hf(model)
