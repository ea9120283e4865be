"""Granite 3 (github.com/ibm-granite/granite-3.0-language-models): Llama with four multipliers."""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family
from rho1_jax.models.families.llama import TENSORS, kv_heads_from_hf, refuse_window
from rho1_jax.models.structure import Structure

# Key of config.json -> our field. Transformers' default for all of them is 1.
MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "query_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}


def _structure(model: ModelConfig) -> Structure:
    multipliers = {field: getattr(model, field) for field in MULTIPLIERS.values()}
    return Structure(windows=(model.sliding_window,), **multipliers)


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    return {
        **kv_heads_from_hf(hf_config, path),
        **{field: float(hf_config.get(key, 1.0)) for key, field in MULTIPLIERS.items()},
    }


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    refuse_window(model)
    multipliers = {key: getattr(model, field) for key, field in MULTIPLIERS.items()}
    if model.query_scale is None:
        multipliers["attention_multiplier"] = model.head_width**-0.5
    return multipliers


FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    model_type="granite",
    tensors=TENSORS,
    structure=_structure,
    from_hf=_from_hf,
    to_hf=_to_hf,
    required=(),
    optional_keys=tuple(MULTIPLIERS.values()),
)
