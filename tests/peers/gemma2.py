"""Gemma 2 (arXiv 2408.00118) as a family outside the package, in the form of docs/guides/add_family.md."""

from rho1_jax.models.families import Family, Tensor, register_family
from rho1_jax.models.families.llama import LAYER, TENSORS
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.errors import UserError

ATTENTION_SOFT_CAP, LOGIT_SOFT_CAP = 50.0, 30.0


def structure(model):
    return Structure(
        norm_placement="both",
        norm_offset=1.0,
        activation="gelu_tanh",
        windows=(model.sliding_window, None),
        embedding_scale=model.width**0.5,
        query_scale=(model.width / model.heads) ** -0.5,
        attention_soft_cap=ATTENTION_SOFT_CAP,
        logit_soft_cap=LOGIT_SOFT_CAP,
    )


def from_hf(hf_config, path):
    query_scalar = hf_config["hidden_size"] // hf_config["num_attention_heads"]
    if hf_config["query_pre_attn_scalar"] != query_scalar:
        raise UserError(f"{path}: query_pre_attn_scalar is not hidden_size / num_attention_heads = {query_scalar}")
    return {
        "sliding_window": hf_config["sliding_window"],
        "tied_embeddings": hf_config.get("tie_word_embeddings", True),
    }


def to_hf(model):
    return {"sliding_window": model.sliding_window, "query_pre_attn_scalar": model.width // model.heads}


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    structure=structure,
    constants={
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": ATTENTION_SOFT_CAP,
        "final_logit_softcapping": LOGIT_SOFT_CAP,
    },
    required=("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window"),
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={
        **TENSORS,
        "layers/attention_post_norm/scale": Tensor(LAYER + "post_attention_layernorm.weight", "D", "D"),
        "layers/feed_forward_norm/scale": Tensor(LAYER + "pre_feedforward_layernorm.weight", "D", "D"),
        "layers/feed_forward_post_norm/scale": Tensor(LAYER + "post_feedforward_layernorm.weight", "D", "D"),
    },
)
register_family(FAMILY)
