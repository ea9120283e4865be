"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window in every layer."""

from rho1_jax.models.families.family import Family
from rho1_jax.models.families.llama import TENSORS

DEFAULT_WINDOW = 4096  # Transformers' own, for a config.json without the key

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    tensors=TENSORS,
    from_hf=lambda hf_config, path: {"sliding_window": hf_config.get("sliding_window", DEFAULT_WINDOW)},
    to_hf=lambda model: {"sliding_window": model.sliding_window},
)
