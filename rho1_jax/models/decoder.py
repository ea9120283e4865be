"""A decoder as Llama, Mistral and Qwen have it: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Shapes: B batch rows, L sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, N layers.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.attention import attention
from rho1_jax.runtime.sharding import shard_activations

Params = dict  # nested: parameter name -> array; layers are stacked along a leading axis N
# Attention of a layer: queries [B, L, H, C], keys and values [B, L, K, C] -> mixed values [B, L, H, C].
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
    x_TD, kernel_DX = x.reshape(-1, size), kernel.astype(x.dtype).reshape(size, -1)
    if x.shape[1] > 1:
        flat_TX = x_TD @ kernel_DX
    else:
        # Behind a barrier, so that the loop over tokens turns the kernel once.
        flat_TX = jax.lax.platform_dependent(
            x_TD,
            kernel_DX,
            cpu=lambda x, kernel: _times_few(jax.lax.optimization_barrier(kernel.T), x).astype(x.dtype),
            default=jnp.matmul,
        )
    return flat_TX.reshape(*x.shape[:2], *outer)


def _times_few(kernel_XD: jax.Array, x_TD: jax.Array) -> jax.Array:
    """x @ kernel.T of a few rows, on CPU. XLA copies the right operand of a product there, so it is the smaller one."""
    return jax.lax.optimization_barrier(jnp.matmul(kernel_XD, x_TD.T, preferred_element_type=jnp.float32)).T


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

    def __call__(self, hidden_BLD: jax.Array, positions_BL: jax.Array, mix: Mix) -> jax.Array:
        """What the states [B, L, D] have added to them."""
        q_BLHC, k_BLKC, v_BLKC = (_project(hidden_BLD, kernel[...]) for kernel in (self.q, self.k, self.v))
        if FAMILIES[self.config.family].qkv_bias:
            q_BLHC += self.q_bias[...].astype(q_BLHC.dtype)
            k_BLKC += self.k_bias[...].astype(k_BLKC.dtype)
            v_BLKC += self.v_bias[...].astype(v_BLKC.dtype)
        if FAMILIES[self.config.family].qk_norm:
            q_BLHC, k_BLKC = self.q_norm(q_BLHC), self.k_norm(k_BLKC)
        frequencies = rotary_frequencies(self.config)
        q_BLHC, k_BLKC = rotate(q_BLHC, positions_BL, frequencies), rotate(k_BLKC, positions_BL, frequencies)
        return _project(mix(q_BLHC, k_BLKC, v_BLKC), self.o[...], contracted=2)


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

    def __call__(self, hidden_BLD: jax.Array, positions_BL: jax.Array, mix: Mix) -> jax.Array:
        """The states [B, L, D] after the layer."""
        hidden_BLD = hidden_BLD + self.attention(self.attention_norm(hidden_BLD), positions_BL, mix)
        hidden_BLD = shard_activations(hidden_BLD)
        hidden_BLD = hidden_BLD + self.feed_forward(self.feed_forward_norm(hidden_BLD))
        return shard_activations(hidden_BLD)


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

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Of the next token, [B, V] in float32, after one hidden state of each row."""
        return jax.lax.platform_dependent(
            self.output_VD().astype(hidden_BD.dtype),
            hidden_BD,
            cpu=_times_few,
            default=partial(jnp.einsum, "VD,BD->BV", preferred_element_type=jnp.float32),
        )

    def __call__(self, tokens_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Runs the decoder.

        Args:
          tokens_BL: [B, L] token ids.
          segment_ids_BL: [B, L] document numbers; attention stays within equal ones, positions restart at each.

        Returns:
          [B, L, D] hidden states after the last norm, in the compute dtype.
        """
        positions_BL, mix = segment_positions(segment_ids_BL), self.mix_within(segment_ids_BL)
        graphdef, stacked = nnx.split(self.layers)

        def layer(hidden_BLD, params):
            return nnx.merge(graphdef, params)(hidden_BLD, positions_BL, mix), None

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat])
        hidden_BLD, _ = jax.lax.scan(layer, self._embed(tokens_BL), stacked, unroll=self.config.unroll)
        return self.norm(hidden_BLD)

    def mix_within(self, segment_ids_BL: jax.Array) -> Mix:
        """Attention within the documents of whole rows."""
        window, kernel = self.config.sliding_window, self.config.attention
        return lambda q, k, v: attention(q, k, v, segment_ids_BL, sliding_window=window, kernel=kernel)

    def layer_by_layer(
        self, layers: Iterable[Params], tokens_BL: jax.Array, positions_BL: jax.Array, mix: Mix
    ) -> jax.Array:
        """Runs the decoder as generation does.

        Args:
          layers: each layer's own parameters, not stacked.
          tokens_BL: [B, L] token ids.
          positions_BL: [B, L] positions within their documents.
          mix: attention; called for one layer after the other.

        Returns:
          [B, L, D] hidden states as `__call__` gives them.
        """
        graphdef, hidden_BLD = nnx.split(self.layers)[0], self._embed(tokens_BL)
        for params in layers:
            hidden_BLD = nnx.merge(graphdef, params)(hidden_BLD, positions_BL, mix)
        return self.norm(hidden_BLD)

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        return shard_activations(self.embedding[...].astype(self.config.compute_dtype)[tokens_BL])


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
