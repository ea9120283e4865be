"""Hugging Face's config.json to a ModelConfig and back.

This module handles what all families share; `families` adds the rest. Import refuses, by name, every key that asks for
something the decoder does not compute.
"""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import FAMILIES, ConfigJson, family_of
from rho1_jax.runtime.errors import UserError

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
DEFAULT_THETA = 10_000.0  # Transformers' own, for a config.json without the key


def from_hf(hf_config: ConfigJson, path: str, run_settings: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      hf_config: content of config.json.
      path: its path, for errors.
      run_settings: the fields that belong to a run rather than to a model: compute_dtype and so on.

    Raises:
      UserError: the architecture is unknown, a size is missing, or a key asks for what the decoder does not compute.
    """
    architecture = (hf_config.get("architectures") or ["none"])[0]
    families = {family.architecture: family for family in FAMILIES.values()}
    if architecture not in families:
        raise UserError(f"{path}: unknown architecture {architecture}; known are {', '.join(families)}")
    family = families[architecture]
    for key, value in {**CONSTANTS, **family.constants}.items():
        if hf_config.get(key, value) != value:
            raise UserError(f"{path}: {key}={hf_config[key]!r} is not supported, only {value!r}")
    missing = [key for key in [*FIELDS, *family.required] if hf_config.get(key) is None]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    fields = {
        **{field: hf_config[key] for key, field in FIELDS.items()},
        "kv_heads": hf_config.get("num_key_value_heads"),
        "head_width": hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"],
        "tied_embeddings": hf_config.get("tie_word_embeddings", False),
        **_rope(hf_config, path),
        **family.from_hf(hf_config, path),
    }
    return ModelConfig(family=family.name, **fields, **run_settings)


def _rope(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    # Transformers 5 stores everything in rope_parameters; earlier versions store rope_theta beside rope_scaling.
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {
        "rope_theta": float(rope.get("rope_theta") or hf_config.get("rope_theta") or DEFAULT_THETA)
    }
    if kind == "llama3":
        missing = [key for key in ROPE_FIELDS if key not in rope]
        if missing:
            raise UserError(f"{path}: its rope scaling lacks {', '.join(missing)}")
        fields |= {field: rope[key] for key, field in ROPE_FIELDS.items()}
    elif kind != "default":
        raise UserError(f"{path}: rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    return fields


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
        scaling = {key: getattr(model, field) for key, field in ROPE_FIELDS.items()}
        hf_config["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return hf_config | family.to_hf(model)
