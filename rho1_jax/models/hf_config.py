"""Hugging Face's config.json to a model's config and back. What the decoder cannot compute is refused by name."""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.runtime.errors import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# config.json's key -> our field.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ff_width",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
}
# Keys under which a model of these architectures computes something else than the decoder does.
ALWAYS: dict[str, Any] = {
    "hidden_act": "silu",
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
# Rotary positions that are not scaled.
UNSCALED = {
    "rope_factor": 1.0,
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_length": 8192,
}
# Transformers' own, for a config.json without the key.
DEFAULT_THETA = 10_000.0
DEFAULT_MISTRAL_WINDOW = 4096


def from_hf(said: dict[str, Any], where: str, run_settings: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      said: its content.
      where: its path, for errors.
      run_settings: the fields that belong to a run rather than to a model: compute_dtype and so on.

    Raises:
      UserError: the architecture is unknown, a size is missing, or a key asks for what the decoder does not compute.
    """
    architecture = (said.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: unknown architecture {architecture}; known are {', '.join(ARCHITECTURES)}")
    for key, value in ALWAYS.items():
        if said.get(key, value) != value:
            raise UserError(f"{where}: {key}={said[key]!r} is not supported, only {value!r}")
    heads_key = [] if architecture == "LlamaForCausalLM" else ["num_key_value_heads"]
    missing = [key for key in [*FIELDS, *heads_key] if said.get(key) is None]
    if missing:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    fields = {ours: said[theirs] for theirs, ours in FIELDS.items()}
    return ModelConfig(
        family=ARCHITECTURES[architecture],
        kv_heads=said.get("num_key_value_heads") or said["num_attention_heads"],
        head_width=said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"],
        tied_embeddings=said.get("tie_word_embeddings", False),
        sliding_window=_sliding_window(said, architecture, where),
        **_rope(said, where),
        **fields,
        **run_settings,
    )


def _rope(said: dict[str, Any], where: str) -> dict[str, Any]:
    # Transformers 5 keeps all of it in rope_parameters; before, rope_theta stood beside rope_scaling.
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = UNSCALED | {"rope_theta": float(rope.get("rope_theta") or said.get("rope_theta") or DEFAULT_THETA)}
    if kind == "llama3":
        missing = [key for key in ROPE_FIELDS if key not in rope]
        if missing:
            raise UserError(f"{where}: its rope scaling lacks {', '.join(missing)}")
        fields |= {ours: rope[theirs] for theirs, ours in ROPE_FIELDS.items()}
    elif kind != "default":
        raise UserError(f"{where}: rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    return fields


def _sliding_window(said: dict[str, Any], architecture: str, where: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        return said.get("sliding_window", DEFAULT_MISTRAL_WINDOW)
    window = said.get("sliding_window") if said.get("use_sliding_window") else None
    if window is None:
        return None
    layers = said["num_hidden_layers"]
    first = said.get("max_window_layers", layers)
    kinds = said.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: a sliding window in some layers and not in others is not supported")
    return window if kinds[0] == "sliding_attention" else None


def to_hf(model: ModelConfig, dtype: str, bos_id: int | None, eos_id: int) -> dict[str, Any]:
    """The config.json of a model, in the keys that Transformers 4 and 5 and the servers read.

    Raises:
      UserError: no architecture of Hugging Face's computes what the model does.
    """
    if model.sliding_window is not None and model.family == "llama":
        raise UserError("config.model.sliding_window: Llama has none in Hugging Face's form; the family mistral has")
    architecture = {ours: theirs for theirs, ours in ARCHITECTURES.items()}[model.family]
    said: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model.family,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before Transformers 5
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_theta,
        **{theirs: getattr(model, ours) for theirs, ours in FIELDS.items()},
    }
    if model.rope_factor != 1:
        scaling = {theirs: getattr(model, ours) for theirs, ours in ROPE_FIELDS.items()}
        said["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if model.family != "llama":
        said["sliding_window"] = model.sliding_window
    if model.family.startswith("qwen"):
        windowed = model.sliding_window is not None
        said |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else model.layers}
    return said
