"""What training costs, by arithmetic: floating-point operations (FLOPs), and what known chips can do in a second."""

import dataclasses
from typing import NamedTuple

from rho1_jax.model import ModelConfig, param_count


class Chip(NamedTuple):
    """A maker's figures, per chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second into the chip over all its links to others.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# By `jax.Device.device_kind`. TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm; GPUs: NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Operations of one token's forward pass, two a weight, and attention over the keys it sees on average."""

    layers: float
    head: float

    @classmethod
    def of(cls, model: ModelConfig, seq_len: int) -> "ForwardFlops":
        """Of a token in rows of `seq_len`, each one document: shorter ones have less attention."""
        embedding = model.vocab_size * model.width
        weights = param_count(model) - embedding * (1 if model.tied_embeddings else 2)
        attention = 4 * model.layers * model.heads * model.head_width * seen_keys(seq_len, model.sliding_window)
        return cls(2 * weights + attention, 2 * embedding)

    @property
    def total(self) -> float:
        """Layers and output head."""
        return self.layers + self.head


def seen_keys(seq_len: int, sliding_window: int | None) -> float:
    """How many keys a query of a row sees on average."""
    window = min(sliding_window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def training_flops(
    policy: ForwardFlops, reference: ForwardFlops | None, tokens: float, selected: float
) -> dict[str, float]:
    """Model FLOPs of training: what the method needs. What is computed twice to save memory does not count.

    Args:
      policy: of the model in training.
      reference: of the frozen model, whether it runs in the step or ran before; None where there is none.
      tokens: that went through the models.
      selected: of these, those that were trained on. The head's backward pass is for them alone.
    """
    return {
        "policy_forward": tokens * policy.total,
        "policy_backward": 2 * (tokens * policy.layers + selected * policy.head),
        "reference_forward": tokens * reference.total if reference else 0.0,
    }
