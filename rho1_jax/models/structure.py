"""What a decoder computes besides its sizes: the switches that distinguish one model family from another."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.rope import Rope

NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post", "both")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class LayerKind(NamedTuple):
    """What may differ between the layers of a model.

    Attributes:
      window: sliding window: how many keys a query sees, itself included, or None for all of them.
      rope: rotary positions, or None for none.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True)
class Structure:
    """The switches of a decoder. The defaults describe Llama.

    Attributes:
      norm: "rms" for an RMSNorm, or "layer" for a LayerNorm with biases.
      norm_placement: where attention and feed-forward have a norm: "pre" on their input, "post" on their output, before
        it is added to the hidden states, or "both".
      norm_offset: norms multiply by norm_offset + scale, where scale is the stored parameter. 1 for Gemma.
      parallel_residual: attention and feed-forward both read the layer's input, instead of one after the other.
      gated: the feed-forward multiplies a second projection with the activated gate. Otherwise it has no gate, and
        activates its only inner projection.
      activation: of the feed-forward: "silu", "gelu", or "gelu_tanh", the tanh approximation of GELU.
      qkv_bias: biases on the query, key and value projections.
      output_bias: a bias on the output projection of attention.
      feed_forward_bias: biases on the projections of the feed-forward.
      qk_norm: an RMSNorm on queries and keys, before the rotary positions.
      qk_norm_over: what each of these norms covers: a "head", or the whole "projection", which is all heads together.
      windows: sliding windows by layer, repeated over the layers: how many keys a query sees, itself included, or None
        for all of them. (4096, None) alternates between local and global attention.
      ropes: rotary positions by layer, repeated over the layers; an entry of None is a layer without them. None instead
        of the tuple means those that the model's keys describe, in every layer.
      embedding_scale: factor on the input embeddings.
      residual_scale: factor on the outputs of attention and feed-forward before they are added to the hidden states.
      query_scale: factor on the queries; None means 1 / sqrt(head width).
      attention_soft_cap: soft cap on the attention logits; None means no cap.
      logit_divisor: divides the output logits, before their soft cap.
      logit_soft_cap: soft cap on the output logits; None means no cap.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_offset: float = 0.0
    parallel_residual: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    windows: tuple[int | None, ...] = (None,)
    ropes: tuple[Rope | None, ...] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_divisor: float = 1.0
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name, value, values in (
            ("norm", self.norm, NORMS),
            ("norm_placement", self.norm_placement, NORM_PLACEMENTS),
            ("activation", self.activation, ACTIVATIONS),
            ("qk_norm_over", self.qk_norm_over, ("head", "projection")),
        ):
            if value not in values:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(values)}")

    def kind(self, model: ModelConfig, layer: int) -> LayerKind:
        """What is particular to a layer of the model, counted from 0."""
        ropes = self.ropes or (Rope.of(model),)
        return LayerKind(self.windows[layer % len(self.windows)], ropes[layer % len(ropes)])

    def kinds(self, model: ModelConfig) -> list[LayerKind]:
        """The kinds of the first layers, which repeat over the model's layers."""
        period = math.lcm(len(self.windows), len(self.ropes or (None,)))
        return [self.kind(model, layer) for layer in range(period)]


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Squeezes logits smoothly into (-cap, cap) with cap * tanh(logits / cap); None leaves them alone."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
