"""Hugging Face's config.json to a ModelConfig and back.

This module handles what all families share; `families` adds the rest. Import refuses, by name, every key that asks for
something the decoder does not compute.
"""

import math
import reprlib
from typing import Annotated, Any

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import FAMILIES, ConfigJson, Family, family_of
from rho1_jax.models.rope import rotated_width
from rho1_jax.runtime.errors import UserError

Size = Annotated[int, Field(gt=0, lt=2**31)]  # JAX counts elements along an axis in int32
Positive = Annotated[pydantic.FiniteFloat, Field(gt=0)]
Fraction = Annotated[pydantic.FiniteFloat, Field(gt=0, le=1)]
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
    partial_rotary_factor: Fraction | None
    short_factor: list[Positive]
    long_factor: list[Positive]
    attention_factor: Positive | None


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
    layer_norm_eps: Positive | None
    tie_word_embeddings: bool
    rope_theta: Positive | None
    rope_parameters: RopeJson | None
    rope_scaling: RopeJson | None
    rotary_emb_base: Positive | None
    rotary_pct: Fraction | None
    partial_rotary_factor: Fraction | None
    original_max_position_embeddings: Annotated[int, Field(gt=1, lt=2**31)]
    sliding_window: Size | None
    use_sliding_window: bool | None
    max_window_layers: Annotated[int, Field(ge=0)] | None
    layer_types: list[str] | None
    use_parallel_residual: bool
    embedding_multiplier: Positive
    attention_multiplier: Positive
    residual_multiplier: Positive
    logits_scaling: Positive
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
    "quantization_config": None,
}
ROPE_FIELDS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_length",
}
SCALINGS = {"llama3": tuple(ROPE_FIELDS), "linear": ("factor",)}  # the keys of each rope_type
LONG_ROPE = ("longrope", "su")  # rope_type, by its name of today and its first one
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
    hf_config = {**family.defaults, **_common_names(hf_config, family)}
    for key, value in {**CONSTANTS, **family.constants}.items():
        if hf_config.get(key, value) != value:
            raise UserError(f"{path}: {key}={reprlib.repr(hf_config[key])} is not supported, only {value!r}")
    missing = [key for key in [*FIELDS, *family.required] if hf_config.get(key) is None]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(family.renamed.get(key, key) for key in missing)}")
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
    _check_rope_keys(hf_config, path)
    return model


def _common_names(hf_config: ConfigJson, family: Family) -> dict[str, Any]:
    """The keys of config.json under the names that most families use. Null counts as missing."""
    own_names = {own: key for key, own in family.renamed.items()}
    return {
        own_names.get(key, key): value
        for key, value in hf_config.items()
        if key not in family.renamed and not (key in own_names and value is None)
    }


def _check_heads(model: ModelConfig, hf_config: ConfigJson, path: str) -> None:
    heads = f"num_attention_heads={model.heads}"
    if model.heads % model.kv_heads:
        raise UserError(f"{path}: num_key_value_heads={model.kv_heads} does not divide {heads}")
    if not hf_config.get("head_dim") and model.width % model.heads:
        raise UserError(f"{path}: {heads} does not divide hidden_size={model.width}, and head_dim is not given")
    rotated = rotated_width(model.head_width, model.rope_fraction)
    if rotated % 2 or not rotated:
        raise UserError(
            f"{path}: heads of width {model.head_width}, of which {rotated} rotate: rotary positions need an even "
            "width above 0"
        )
    if model.rope_scaling == "long":
        for key, factors in (("short_factor", model.rope_short_factors), ("long_factor", model.rope_long_factors)):
            if len(factors) != rotated // 2:
                raise UserError(f"{path}: {key} has {len(factors)} factors, but {rotated // 2} pairs of a head rotate")


def _check_rope_keys(hf_config: ConfigJson, path: str) -> None:
    """Raises UserError if rope_scaling contradicts rope_parameters, which `_rope` reads instead if there are both."""
    newer: ConfigJson = hf_config.get("rope_parameters") or {}
    older: ConfigJson = hf_config.get("rope_scaling") or {}
    if newer and older:
        newer = newer.get("full_attention", newer)
        differing = [key for key in older.keys() - {"type", "rope_type"} if newer.get(key, older[key]) != older[key]]
        if differing or _rope_type(newer) != _rope_type(older):
            raise UserError(f"{path}: rope_parameters and rope_scaling contradict each other; remove the wrong one")


def _rope(hf_config: ConfigJson, path: str, family: Family) -> dict[str, Any]:
    # Transformers 5 stores everything in rope_parameters; earlier versions store rope_theta beside rope_scaling.
    rope: ConfigJson = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = hf_config.get("rope_theta") or family.defaults.get("rope_theta")
    fraction = hf_config.get("partial_rotary_factor") or 1.0
    if "rope_fraction" in family.optional_keys:
        fraction = rope.get("partial_rotary_factor") or fraction
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    elif fraction != 1:
        raise UserError(f"{path}: partial_rotary_factor={fraction!r} is not supported, only 1.0")
    partial = {"rope_fraction": float(fraction)}
    if "rope_long_factors" in family.optional_keys and _rope_type(rope) in LONG_ROPE:
        return _layer_rope({**rope, "rope_type": "default"}, theta, path) | _long_rope(rope, hf_config, path) | partial
    if "rope_local_theta" not in family.optional_keys:
        return _layer_rope(rope, theta, path) | partial
    # Transformers 5 stores two dicts in rope_parameters; earlier versions store rope_local_base_freq beside rope_theta.
    local_rope, local_theta = rope.get("sliding_attention", {}), hf_config.get("rope_local_base_freq")
    local = _layer_rope(local_rope, local_theta, f"{path}: rope_parameters.sliding_attention")
    if "rope_factor" in local:
        raise UserError(f"{path}: rope_parameters.sliding_attention: rope scaling is not supported here")
    shared = {key: value for key, value in rope.items() if key not in ("full_attention", "sliding_attention")}
    fields = _layer_rope({**shared, **rope.get("full_attention", {})}, theta, path)
    return {**fields, "rope_local_theta": local["rope_theta"]}


def _rope_type(rope: ConfigJson) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _layer_rope(rope: ConfigJson, theta: float | None, path: str) -> dict[str, Any]:
    kind = _rope_type(rope)
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported")
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


def _long_rope(rope: ConfigJson, hf_config: ConfigJson, path: str) -> dict[str, Any]:
    missing = [key for key in ("short_factor", "long_factor") if key not in rope]
    if missing:
        raise UserError(f"{path}: its rope scaling lacks {', '.join(missing)}")
    original = hf_config["original_max_position_embeddings"]
    stretched = rope.get("factor") or hf_config["max_position_embeddings"] / original
    return {
        "rope_scaling": "long",
        "rope_short_factors": tuple(map(float, rope["short_factor"])),
        "rope_long_factors": tuple(map(float, rope["long_factor"])),
        "rope_original_length": original,
        "rope_attention_factor": float(rope.get("attention_factor") or _attention_factor(stretched, original)),
    }


def _attention_factor(stretched: float, original: int) -> float:
    """The default attention factor of long rotary positions, for a context `stretched` times the original one."""
    return math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0


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
    if model.rope_factor != 1 and model.rope_scaling in SCALINGS:
        scaling = {key: getattr(model, ROPE_FIELDS[key]) for key in SCALINGS[model.rope_scaling]}
        hf_config["rope_scaling"] = {"rope_type": model.rope_scaling, **scaling}
    if "rope_fraction" in family.optional_keys:
        hf_config["partial_rotary_factor"] = model.rope_fraction
    if model.rope_scaling == "long":
        hf_config["original_max_position_embeddings"] = model.rope_original_length
        # Transformers 4 allows Phi-3 only these three keys. Transformers 5 also reads an attention factor.
        long = {"short_factor": list(model.rope_short_factors), "long_factor": list(model.rope_long_factors)}
        hf_config["rope_scaling"] = {"type": LONG_ROPE[0], **long}
        default = _attention_factor(model.context_length / model.rope_original_length, model.rope_original_length)
        if model.rope_attention_factor != default:
            hf_config["rope_scaling"]["attention_factor"] = model.rope_attention_factor
    return {family.renamed.get(key, key): value for key, value in (hf_config | family.to_hf(model)).items()}
