"""Gemma 2 (arXiv 2408.00118): norms on both sides, GELU, soft caps, and a sliding window in every other layer."""

import math
from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor, every_nth, period_of
from rho1_jax.models.families.llama import LAYER, TENSORS
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.errors import UserError

GLOBAL_EVERY = 2
ATTENTION_SOFT_CAP, LOGIT_SOFT_CAP = 50.0, 30.0
GEMMA_TENSORS = {
    **TENSORS,
    "layers/attention_post_norm/scale": Tensor(LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/feed_forward_norm/scale": Tensor(LAYER + "pre_feedforward_layernorm.weight", "D", "D"),
    "layers/feed_forward_post_norm/scale": Tensor(LAYER + "post_feedforward_layernorm.weight", "D", "D"),
}


def _structure(model: ModelConfig) -> Structure:
    caps = (model.attention_soft_cap, ATTENTION_SOFT_CAP), (model.logit_soft_cap, LOGIT_SOFT_CAP)
    attention_soft_cap, logit_soft_cap = ((default if cap is None else cap) or None for cap, default in caps)
    return Structure(
        norm_placement="both",
        norm_offset=1.0,
        activation="gelu_tanh",
        windows=every_nth(model.global_every or GLOBAL_EVERY, model.layers, model.sliding_window, None),
        embedding_scale=model.width**0.5,
        query_scale=model.query_scale,
        attention_soft_cap=attention_soft_cap,
        logit_soft_cap=logit_soft_cap,
    )


def windows_from_hf(hf_config: ConfigJson, path: str, every: int) -> dict[str, Any]:
    """The sliding window, and the period of the layers without it.

    Args:
      hf_config: content of config.json.
      path: its path, for errors.
      every: the period if config.json has no layer_types.

    Raises:
      UserError: the layers without a window are not every n-th layer for some n, or attention is not causal.
    """
    if hf_config.get("use_bidirectional_attention"):
        raise UserError(f"{path}: use_bidirectional_attention=True is not supported, only causal attention")
    period: int | None = every
    kinds = hf_config.get("layer_types")
    if kinds is not None:
        period = period_of([kind == "full_attention" for kind in kinds], every)
        if len(kinds) != hf_config["num_hidden_layers"] or set(kinds) - {"full_attention", "sliding_attention"}:
            raise UserError(f"{path}: layer_types must name full_attention or sliding_attention for each layer")
        if period is None:
            raise UserError(
                f"{path}: layer_types is not supported: full_attention must be every n-th layer, for a single n"
            )
    return {"sliding_window": hf_config["sliding_window"], "global_every": period}


def windows_to_hf(model: ModelConfig, default: int) -> dict[str, Any]:
    """The keys that `windows_from_hf` reads."""
    every = model.global_every or default
    if model.sliding_window is None:
        raise UserError(f"config.model.sliding_window: the family {model.family} needs one in Hugging Face's format")
    return {
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(model.layers)],
    }


def query_scalar(model: ModelConfig) -> int:
    """`query_pre_attn_scalar`: attention logits are divided by its square root. Raises UserError if it is not whole."""
    scalar = model.head_width if model.query_scale is None else round(model.query_scale**-2)
    if model.query_scale is not None and not (scalar and math.isclose(scalar**-0.5, model.query_scale)):
        raise UserError(
            f"config.model.query_scale={model.query_scale}: in Hugging Face's format, the family {model.family} needs "
            "1 / sqrt of a whole number"
        )
    return scalar


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    return {
        **windows_from_hf(hf_config, path, GLOBAL_EVERY),
        "query_scale": hf_config["query_pre_attn_scalar"] ** -0.5,
        "attention_soft_cap": hf_config["attn_logit_softcapping"] or 0.0,
        "logit_soft_cap": hf_config["final_logit_softcapping"] or 0.0,
    }


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    structure = _structure(model)
    return {
        **windows_to_hf(model, GLOBAL_EVERY),
        "query_pre_attn_scalar": query_scalar(model),
        "attn_logit_softcapping": structure.attention_soft_cap,
        "final_logit_softcapping": structure.logit_soft_cap,
    }


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    tensors=GEMMA_TENSORS,
    structure=_structure,
    from_hf=_from_hf,
    to_hf=_to_hf,
    constants={"hidden_activation": "gelu_pytorch_tanh"},
    required=("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window"),
    defaults={
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "attn_logit_softcapping": ATTENTION_SOFT_CAP,
        "final_logit_softcapping": LOGIT_SOFT_CAP,
    },
    optional_keys=("global_every", "query_scale", "attention_soft_cap", "logit_soft_cap"),
)
