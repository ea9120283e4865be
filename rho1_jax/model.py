"""A decoder as Llama, Mistral and Qwen have it: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Shapes: B batch rows, L sequence, S cached positions, D model width, H query heads, K key/value heads, C head width,
F feed-forward width, V vocabulary, N layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.attention import attention
from rho1_jax.sharding import shard_activations

Params = dict  # nested: parameter name -> array; layers are stacked along a leading axis N


class Family(NamedTuple):
    """In what the families differ, beside sizes."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family(qkv_bias=True), "qwen3": Family(qk_norm=True)}


# What the backward pass finds of each layer's forward pass, beside the layer's input: all of it, the products of
# weights, or nothing. The rest is computed again.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Field for field the `model` section of a config."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    context_length: int
    rope_theta: float
    rope_factor: float
    rope_low_frequency_factor: float
    rope_high_frequency_factor: float
    rope_original_length: int
    norm_eps: float
    tied_embeddings: bool
    sliding_window: int | None
    compute_dtype: str
    attention: str
    remat: str
    unroll: int
    loss_chunk: int


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for generation."""

    k_NBSKC: jax.Array
    v_NBSKC: jax.Array
    segment_ids_BS: jax.Array  # 0 where nothing is stored
    length: jax.Array  # how many of the S positions are filled


class RMSNorm(nnx.Module):
    """Scales each vector along the last axis to a root mean square of one (arXiv 1910.07467), in float32."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """The vectors [..., size], normalized, in their dtype."""
        x = hidden.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(hidden.dtype)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position, [C / 2], of rotary positions (arXiv 2104.09864).

    With a factor above 1 as Llama 3.1 has them: waves that go round less than `rope_low_frequency_factor` times in the
    original length are stretched by the factor, those that go round more than `rope_high_frequency_factor` times are
    left alone, and between the two it is a straight line.
    """
    half = config.head_width // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    turns = config.rope_original_length * frequencies / (2 * np.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def rotate(x_BLHC: jax.Array, positions_BL: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Turns each pair by position times frequency: first half of the head against the second, as Llama has it."""
    angles_BL1c = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    sin, cos = jnp.sin(angles_BL1c), jnp.cos(angles_BL1c)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


def _project(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last `contracted` axes of x [B, L, ...] with the first ones of a kernel.

    As one product of two matrices: XLA on CPU runs the gradient of a batched one at half the speed.
    """
    inner, outer = kernel.shape[:contracted], kernel.shape[contracted:]
    size = math.prod(inner)
    flat_TX = x.reshape(-1, size) @ kernel.astype(x.dtype).reshape(size, -1)
    return flat_TX.reshape(*x.shape[:2], *outer)


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_width
        self.config = config
        self.q = _weight(rngs, (D, H, C), D**-0.5)
        self.k = _weight(rngs, (D, K, C), D**-0.5)
        self.v = _weight(rngs, (D, K, C), D**-0.5)
        self.o = _weight(rngs, (H, C, D), (2 * config.layers * H * C) ** -0.5)
        if FAMILIES[config.family].qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((H, C)))
            self.k_bias = nnx.Param(jnp.zeros((K, C)))
            self.v_bias = nnx.Param(jnp.zeros((K, C)))
        if FAMILIES[config.family].qk_norm:
            self.q_norm = RMSNorm(C, config.norm_eps)
            self.k_norm = RMSNorm(C, config.norm_eps)

    def __call__(self, hidden_BLD, positions_BL, segments, cached_kv, start):
        """Attends to this call's keys or, with a cache, to the cache with this call's keys written at `start`."""
        q_BLHC, k_BLKC, v_BLKC = (_project(hidden_BLD, kernel[...]) for kernel in (self.q, self.k, self.v))
        if FAMILIES[self.config.family].qkv_bias:
            q_BLHC += self.q_bias[...].astype(q_BLHC.dtype)
            k_BLKC += self.k_bias[...].astype(k_BLKC.dtype)
            v_BLKC += self.v_bias[...].astype(v_BLKC.dtype)
        if FAMILIES[self.config.family].qk_norm:
            q_BLHC, k_BLKC = self.q_norm(q_BLHC), self.k_norm(k_BLKC)
        frequencies = rotary_frequencies(self.config)
        q_BLHC, k_BLKC = rotate(q_BLHC, positions_BL, frequencies), rotate(k_BLKC, positions_BL, frequencies)
        kv = k_BLKC, v_BLKC
        if cached_kv is not None:
            kv = cached_kv = tuple(
                jax.lax.dynamic_update_slice_in_dim(cached_BSKC, new_BLKC, start, axis=1)
                for cached_BSKC, new_BLKC in zip(cached_kv, kv)
            )
        mixed_BLHC = attention(
            q_BLHC,
            *kv,
            *segments,
            first_query=start,
            sliding_window=self.config.sliding_window,
            kernel=self.config.attention,
        )
        return _project(mixed_BLHC, self.o[...], contracted=2), cached_kv


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.width, config.ff_width
        self.gate = _weight(rngs, (D, F), D**-0.5)
        self.up = _weight(rngs, (D, F), D**-0.5)
        self.down = _weight(rngs, (F, D), (2 * config.layers * F) ** -0.5)

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        """What the states [B, L, D] have added to them."""
        gate_BLF = jax.nn.silu(_project(hidden_BLD, self.gate[...]))
        return _project(gate_BLF * _project(hidden_BLD, self.up[...]), self.down[...])


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, hidden_BLD, positions_BL, segments, cached_kv, start):
        """The states [B, L, D] after the layer, and the layer's cache with this call's keys and values."""
        mixed_BLD, kv = self.attention(self.attention_norm(hidden_BLD), positions_BL, segments, cached_kv, start)
        hidden_BLD = shard_activations(hidden_BLD + mixed_BLD)
        hidden_BLD = hidden_BLD + self.feed_forward(self.feed_forward_norm(hidden_BLD))
        return shard_activations(hidden_BLD), kv


class Decoder(nnx.Module):
    """Token ids in, final hidden states out; `output_VD` turns those into logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _weight(rngs, (config.vocab_size, config.width), 0.02)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_embeddings:
            self.head = _weight(rngs, (config.vocab_size, config.width), 0.02)

    def output_VD(self) -> jax.Array:
        """The output embedding [V, D]."""
        return (self.embedding if self.config.tied_embeddings else self.head)[...]

    def __call__(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          tokens_BL: [B, L] token ids.
          segment_ids_BL: [B, L] document numbers; attention stays within equal ones, positions restart at each.
          cache: what came before these tokens, when generating. A segment then continues at its own length.

        Returns:
          [B, L, D] hidden states after the last norm, in the compute dtype, and the cache with these tokens added.
        """
        if cache is None:
            start: jax.Array | int = 0
            cached_kv = None
            key_segments_BS = segment_ids_BL
            positions_BL = segment_positions(segment_ids_BL)
        else:
            start = cache.length
            key_segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BL, start, axis=1)
            positions_BL = jax.lax.dynamic_slice_in_dim(
                segment_positions(key_segments_BS), start, tokens_BL.shape[1], axis=1
            )
            cached_kv = (cache.k_NBSKC, cache.v_NBSKC)
        segments = segment_ids_BL, key_segments_BS
        hidden_BLD = shard_activations(self.embedding[...].astype(self.config.compute_dtype)[tokens_BL])
        graphdef, stacked = nnx.split(self.layers)

        def layer(hidden_BLD, layer_inputs):
            params, cached_kv = layer_inputs
            return nnx.merge(graphdef, params)(hidden_BLD, positions_BL, segments, cached_kv, start)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat])
        hidden_BLD, kv = jax.lax.scan(layer, hidden_BLD, (stacked, cached_kv), unroll=self.config.unroll)
        if cache is not None:
            cache = Cache(kv[0], kv[1], key_segments_BS, cache.length + tokens_BL.shape[1])
        return self.norm(hidden_BLD), cache


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Positions [B, L] counted from the start of each segment."""
    index_L = jnp.arange(segment_ids_BL.shape[1])
    starts_BL = jnp.diff(segment_ids_BL, axis=1, prepend=-1) != 0
    return index_L - jax.lax.cummax(jnp.where(starts_BL, index_L, 0), axis=1)


def build(config: ModelConfig) -> nnx.GraphDef:
    """The model's structure without parameters. `nnx.merge(graphdef, params)` makes it runnable."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh float32 parameters. To be called under `jax.jit`, with the shardings they shall have."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(seed)))[1])


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(lambda: init_params(config, 0))


def param_count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
