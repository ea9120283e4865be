"""The text model of Gemma 3 (arXiv 2503.19786): Gemma 2 with norms on queries and keys, without soft caps.

Five layers with a sliding window and a rotary base of their own precede each layer without a window. Rope scaling
applies only to the layers without a window.
"""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, Tensor, every_nth
from rho1_jax.models.families.gemma2 import GEMMA_TENSORS, query_scalar, windows_from_hf, windows_to_hf
from rho1_jax.models.families.llama import LAYER
from rho1_jax.models.rope import Rope
from rho1_jax.models.structure import Structure

GLOBAL_EVERY = 6
LOCAL_THETA = 10_000.0


def _structure(model: ModelConfig) -> Structure:
    every = model.global_every or GLOBAL_EVERY
    return Structure(
        norm_placement="both",
        norm_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        windows=every_nth(every, model.layers, model.sliding_window, None),
        ropes=every_nth(every, model.layers, Rope(model.rope_local_theta or LOCAL_THETA), Rope.of(model)),
        embedding_scale=model.width**0.5,
        query_scale=model.query_scale,
        logit_soft_cap=model.logit_soft_cap or None,
    )


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    return {
        **windows_from_hf(hf_config, path, hf_config.get("sliding_window_pattern", GLOBAL_EVERY)),
        "query_scale": hf_config["query_pre_attn_scalar"] ** -0.5,
        "logit_soft_cap": hf_config["final_logit_softcapping"],
    }


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **windows_to_hf(model, GLOBAL_EVERY),
        "sliding_window_pattern": model.global_every or GLOBAL_EVERY,
        "rope_local_base_freq": model.rope_local_theta or LOCAL_THETA,
        "query_pre_attn_scalar": query_scalar(model),
        "final_logit_softcapping": model.logit_soft_cap or None,
    }


FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    tensors={
        **GEMMA_TENSORS,
        "layers/attention/q_norm/scale": Tensor(LAYER + "self_attn.q_norm.weight", "C", "C"),
        "layers/attention/k_norm/scale": Tensor(LAYER + "self_attn.k_norm.weight", "C", "C"),
    },
    structure=_structure,
    from_hf=_from_hf,
    to_hf=_to_hf,
    constants={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
    required=("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window"),
    # The text_config of the published 4B model leaves most sizes to Transformers.
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": LOCAL_THETA,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
    },
    optional_keys=("global_every", "rope_local_theta", "query_scale", "logit_soft_cap"),
)
