"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values."""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.models.families.llama import LAYER, TENSORS
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.errors import UserError


def window_from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    """The sliding window of all layers. Raises UserError if only some layers have one."""
    window = hf_config.get("sliding_window") if hf_config.get("use_sliding_window") else None
    if window is None:
        return {"sliding_window": None}
    layers, first = hf_config["num_hidden_layers"], hf_config.get("max_window_layers")
    windowed = 0 if first is None else max(0, layers - first)  # the layers from `first` on have the window
    kinds = hf_config.get("layer_types")
    if kinds:
        windowed = kinds.count("sliding_attention")
        if len(kinds) != layers or windowed + kinds.count("full_attention") != layers:
            raise UserError(f"{path}: layer_types must name full_attention or sliding_attention for each layer")
    if 0 < windowed < layers:
        raise UserError(f"{path}: a sliding window in some layers and not in others is not supported")
    return {"sliding_window": window if windowed else None}


def window_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The keys that give all layers the sliding window, or none of them."""
    windowed = model.sliding_window is not None
    return {
        "sliding_window": model.sliding_window,
        "use_sliding_window": windowed,
        "max_window_layers": 0 if windowed else model.layers,
    }


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    tensors={
        **TENSORS,
        "layers/attention/q_bias": Tensor(LAYER + "self_attn.q_proj.bias", "HC", "HC"),
        "layers/attention/k_bias": Tensor(LAYER + "self_attn.k_proj.bias", "KC", "KC"),
        "layers/attention/v_bias": Tensor(LAYER + "self_attn.v_proj.bias", "KC", "KC"),
    },
    structure=lambda model: Structure(qkv_bias=True, windows=(model.sliding_window,)),
    from_hf=window_from_hf,
    to_hf=window_to_hf,
)
