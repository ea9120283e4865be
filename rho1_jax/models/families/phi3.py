"""Phi-3 (arXiv 2404.14219) and Phi-4-mini (arXiv 2503.01743): Llama with fused tensors.

Rotary positions may use the scaling "long" (rho1_jax/models/rope.py), and may cover only a part of each head.
"""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.models.families.llama import LAYER, TENSORS, kv_heads_from_hf
from rho1_jax.runtime.errors import UserError

QKV, GATE_UP = LAYER + "self_attn.qkv_proj.weight", LAYER + "mlp.gate_up_proj.weight"


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    return {
        **kv_heads_from_hf(hf_config, path),
        "sliding_window": hf_config.get("sliding_window"),
    }


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    if model.rope_factor != 1:
        raise UserError(
            f"config.model.rope_factor={model.rope_factor:g}: Phi-3 stretches rotary positions only with "
            "config.model.rope_scaling='long'; leave rope_factor at 1"
        )
    return {"sliding_window": model.sliding_window}


FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    tensors={
        **TENSORS,
        "layers/attention/q": Tensor(QKV, "DHC", "|HC D"),
        "layers/attention/k": Tensor(QKV, "DKC", "|KC D"),
        "layers/attention/v": Tensor(QKV, "DKC", "|KC D"),
        "layers/feed_forward/gate": Tensor(GATE_UP, "DF", "|F D"),
        "layers/feed_forward/up": Tensor(GATE_UP, "DF", "|F D"),
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    constants={"hidden_act": "silu", "lm_head_bias": False},
    required=(),
    defaults={"original_max_position_embeddings": 4096},
    optional_keys=("rope_fraction", "rope_short_factors", "rope_long_factors", "rope_attention_factor"),
)
