"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and the tensor table that other families extend."""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.runtime.errors import UserError

LAYER = "model.layers.{n}."
# Torch stores a matrix as outputs by inputs, we store it as inputs by outputs.
TENSORS = {
    "embedding": Tensor("model.embed_tokens.weight", "VD", "V D"),
    "layers/attention_norm/scale": Tensor(LAYER + "input_layernorm.weight", "D", "D"),
    "layers/attention/q": Tensor(LAYER + "self_attn.q_proj.weight", "DHC", "HC D"),
    "layers/attention/k": Tensor(LAYER + "self_attn.k_proj.weight", "DKC", "KC D"),
    "layers/attention/v": Tensor(LAYER + "self_attn.v_proj.weight", "DKC", "KC D"),
    "layers/attention/o": Tensor(LAYER + "self_attn.o_proj.weight", "HCD", "D HC"),
    "layers/feed_forward_norm/scale": Tensor(LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/feed_forward/gate": Tensor(LAYER + "mlp.gate_proj.weight", "DF", "F D"),
    "layers/feed_forward/up": Tensor(LAYER + "mlp.up_proj.weight", "DF", "F D"),
    "layers/feed_forward/down": Tensor(LAYER + "mlp.down_proj.weight", "FD", "D F"),
    "norm/scale": Tensor("model.norm.weight", "D", "D"),
    "head": Tensor("lm_head.weight", "VD", "V D"),
}


def refuse_window(model: ModelConfig) -> None:
    """Raises UserError if the model has a sliding window."""
    if model.sliding_window is not None:
        raise UserError(
            f"config.model.sliding_window: the family {model.family} has none in Hugging Face's format; "
            "use one that has, such as mistral"
        )


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    refuse_window(model)
    return {}


def kv_heads_from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    """The key/value heads: as many as query heads if config.json does not say, as in Transformers."""
    return {"kv_heads": hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]}


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    tensors=TENSORS,
    from_hf=kv_heads_from_hf,
    to_hf=_to_hf,
    required=(),
)
