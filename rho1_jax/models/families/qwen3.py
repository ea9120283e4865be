"""Qwen3 (arXiv 2505.09388): Llama with norms on queries and keys."""

from rho1_jax.models.families.family import Family, Tensor
from rho1_jax.models.families.llama import LAYER, TENSORS
from rho1_jax.models.families.qwen2 import window_from_hf, window_to_hf
from rho1_jax.models.structure import Structure

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    tensors={
        **TENSORS,
        "layers/attention/q_norm/scale": Tensor(LAYER + "self_attn.q_norm.weight", "C", "C"),
        "layers/attention/k_norm/scale": Tensor(LAYER + "self_attn.k_norm.weight", "C", "C"),
    },
    structure=lambda model: Structure(qk_norm=True, windows=(model.sliding_window,)),
    from_hf=window_from_hf,
    to_hf=window_to_hf,
)
