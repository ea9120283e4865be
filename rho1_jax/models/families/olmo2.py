"""OLMo 2 (arXiv 2501.00656): Llama with norms on outputs only; norms on queries and keys over all heads together."""

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import Family, Tensor
from rho1_jax.models.families.gemma2 import GEMMA_TENSORS
from rho1_jax.models.families.llama import FAMILY as LLAMA
from rho1_jax.models.families.llama import LAYER
from rho1_jax.models.structure import Structure

ABSENT = ("layers/attention_norm/scale", "layers/feed_forward_norm/scale")


def _structure(model: ModelConfig) -> Structure:
    return Structure(norm_placement="post", qk_norm=True, qk_norm_over="projection", windows=(model.sliding_window,))


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    tensors={
        **{path: tensor for path, tensor in GEMMA_TENSORS.items() if path not in ABSENT},
        # X: all heads together, H times C or K times C.
        "layers/attention/q_norm/scale": Tensor(LAYER + "self_attn.q_norm.weight", "X", "X"),
        "layers/attention/k_norm/scale": Tensor(LAYER + "self_attn.k_norm.weight", "X", "X"),
    },
    structure=_structure,
    from_hf=LLAMA.from_hf,
    to_hf=LLAMA.to_hf,
    required=(),
)
