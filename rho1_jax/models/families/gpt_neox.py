"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373).

LayerNorms and biases everywhere, a feed-forward without a gate, rotary positions in a part of each head, and attention
and feed-forward in parallel. One tensor stores queries, keys and values, head by head.
"""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.models.families.llama import refuse_window
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.errors import UserError

LAYER = "gpt_neox.layers.{n}."
QKV = LAYER + "attention.query_key_value."
TENSORS = {
    "embedding": Tensor("gpt_neox.embed_in.weight", "VD", "V D"),
    "layers/attention_norm/scale": Tensor(LAYER + "input_layernorm.weight", "D", "D"),
    "layers/attention_norm/bias": Tensor(LAYER + "input_layernorm.bias", "D", "D"),
    "layers/attention/q": Tensor(QKV + "weight", "DHC", "H|C D"),
    "layers/attention/k": Tensor(QKV + "weight", "DKC", "K|C D"),
    "layers/attention/v": Tensor(QKV + "weight", "DKC", "K|C D"),
    "layers/attention/q_bias": Tensor(QKV + "bias", "HC", "H|C"),
    "layers/attention/k_bias": Tensor(QKV + "bias", "KC", "K|C"),
    "layers/attention/v_bias": Tensor(QKV + "bias", "KC", "K|C"),
    "layers/attention/o": Tensor(LAYER + "attention.dense.weight", "HCD", "D HC"),
    "layers/attention/o_bias": Tensor(LAYER + "attention.dense.bias", "D", "D"),
    "layers/feed_forward_norm/scale": Tensor(LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/feed_forward_norm/bias": Tensor(LAYER + "post_attention_layernorm.bias", "D", "D"),
    "layers/feed_forward/up": Tensor(LAYER + "mlp.dense_h_to_4h.weight", "DF", "F D"),
    "layers/feed_forward/up_bias": Tensor(LAYER + "mlp.dense_h_to_4h.bias", "F", "F"),
    "layers/feed_forward/down": Tensor(LAYER + "mlp.dense_4h_to_h.weight", "FD", "D F"),
    "layers/feed_forward/down_bias": Tensor(LAYER + "mlp.dense_4h_to_h.bias", "D", "D"),
    "norm/scale": Tensor("gpt_neox.final_layer_norm.weight", "D", "D"),
    "norm/bias": Tensor("gpt_neox.final_layer_norm.bias", "D", "D"),
    "head": Tensor("embed_out.weight", "VD", "V D"),
}


def _structure(model: ModelConfig) -> Structure:
    return Structure(
        norm="layer",
        parallel_residual=model.parallel_residual,
        gated=False,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        windows=(model.sliding_window,),
    )


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    if hf_config["hidden_size"] % hf_config["num_attention_heads"]:
        raise UserError(
            f"{path}: num_attention_heads={hf_config['num_attention_heads']} does not divide "
            f"hidden_size={hf_config['hidden_size']}"
        )
    return {
        "kv_heads": hf_config["num_attention_heads"],
        "head_width": hf_config["hidden_size"] // hf_config["num_attention_heads"],
        "parallel_residual": hf_config.get("use_parallel_residual", True),
    }


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    refuse_window(model)
    if model.kv_heads != model.heads:
        raise UserError(f"config.model.kv_heads={model.kv_heads}: GPT-NeoX needs kv_heads equal to heads={model.heads}")
    if model.width != model.heads * model.head_width:
        raise UserError(f"config.model.head_width={model.head_width}: GPT-NeoX needs width / heads")
    return {"use_parallel_residual": model.parallel_residual}


FAMILY = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    tensors=TENSORS,
    structure=_structure,
    from_hf=_from_hf,
    to_hf=_to_hf,
    constants={"hidden_act": "gelu", "attention_bias": True},
    required=(),
    defaults={"partial_rotary_factor": 0.25},
    renamed={
        "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    },
    optional_keys=("parallel_residual", "rope_fraction"),
)
