"""A layer of the decoder: norms, attention with rotary positions, a feed-forward.

Shapes: B batch rows, L sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.few_tokens import FewTokens
from rho1_jax.models.rope import Rotation, rotate
from rho1_jax.models.structure import ACTIVATIONS, Structure
from rho1_jax.runtime.sharding import HEADS, ROWS, shard_activations

# Attention of one layer: queries [B, L, H, C], keys and values [B, L, K, C] -> mixed values [B, L, H, C].
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class RMSNorm(nnx.Module):
    """Scales each vector along the last axis to a root mean square of one (arXiv 1910.07467), in float32.

    The parameter `scale` is stored without `offset`: the vector is multiplied by offset + scale.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.size, self.eps, self.offset = size, eps, offset
        self.scale = nnx.Param(jnp.full(size, 1 - offset, jnp.float32))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalizes vectors [..., size] and keeps their dtype."""
        x = hidden.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        scale = self.offset + self.scale[...] if self.offset else self.scale[...]
        return (x * scale).astype(hidden.dtype)


class LayerNorm(nnx.Module):
    """Scales and shifts each vector along the last axis to mean 0 and variance 1 (arXiv 1607.06450), in float32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(size, 1 - offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalizes vectors [..., size] and keeps their dtype."""
        x = hidden.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        return (x * (self.offset + self.scale[...]) + self.bias[...]).astype(hidden.dtype)


def hidden_norm(config: ModelConfig, structure: Structure) -> RMSNorm | LayerNorm:
    """A norm of hidden states."""
    norm = LayerNorm if structure.norm == "layer" else RMSNorm
    return norm(config.width, config.norm_eps, structure.norm_offset)


def _normed(norm: RMSNorm, x_BLHC: jax.Array) -> jax.Array:
    """Normalizes each head, or all heads together if the norm has their size."""
    return norm(x_BLHC.reshape(*x_BLHC.shape[:2], -1, norm.size)).reshape(x_BLHC.shape)


def _project(x: jax.Array, kernel: jax.Array, decoding: bool, contracted: int = 1) -> jax.Array:
    """Contracts the last `contracted` axes of x [B, L, ...] with the first ones of a kernel.

    This is one product of two matrices, because XLA on CPU runs the gradient of a batched product at half the speed.
    """
    inner, outer = kernel.shape[:contracted], kernel.shape[contracted:]
    size = math.prod(inner)
    x_TD, kernel_DX = x.reshape(-1, size), kernel.astype(x.dtype).reshape(size, -1)
    if not decoding:
        flat_TX = x_TD @ kernel_DX
    else:
        # The barrier lets the loop over tokens transpose the kernel only once.
        flat_TX = jax.lax.platform_dependent(
            x_TD,
            kernel_DX,
            cpu=lambda x, kernel: times_few(jax.lax.optimization_barrier(kernel.T), x).astype(x.dtype),
            default=jnp.matmul,
        )
    return flat_TX.reshape(*x.shape[:2], *outer)


def _times(kernel: jax.Array, x: jax.Array, contracted: int = 1) -> jax.Array:
    return _project(x, kernel, decoding=False, contracted=contracted)


def times_few(kernel_XD: jax.Array, x_TD: jax.Array) -> jax.Array:
    """x @ kernel.T for a few rows on CPU, where XLA copies the right operand, so the smaller one goes there."""
    return jax.lax.optimization_barrier(jnp.matmul(kernel_XD, x_TD.T, preferred_element_type=jnp.float32)).T


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """New weights, drawn from a normal distribution with this standard deviation."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped heads."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_width
        self.config, self.structure = config, structure
        self.q = weight(rngs, (D, H, C), D**-0.5)
        self.k = weight(rngs, (D, K, C), D**-0.5)
        self.v = weight(rngs, (D, K, C), D**-0.5)
        self.o = weight(rngs, (H, C, D), (2 * config.layers * H * C) ** -0.5)
        if structure.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((H, C)))
            self.k_bias = nnx.Param(jnp.zeros((K, C)))
            self.v_bias = nnx.Param(jnp.zeros((K, C)))
        if structure.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(D))
        if structure.qk_norm:
            q_size, k_size = (C, C) if structure.qk_norm_over == "head" else (H * C, K * C)
            self.q_norm = RMSNorm(q_size, config.norm_eps, structure.norm_offset)
            self.k_norm = RMSNorm(k_size, config.norm_eps, structure.norm_offset)

    def __call__(
        self,
        hidden_BLD: jax.Array,
        positions_BL: jax.Array,
        rotation: Rotation | None,
        mix: Mix,
        decoding: bool,
        few: FewTokens | None = None,
    ) -> jax.Array:
        """The output [B, L, D] of attention, to be added to the hidden states."""
        if few:
            q_BLHC = few([_times], self.q[...], hidden_BLD, (ROWS, HEADS))
        else:
            q_BLHC = _project(hidden_BLD, self.q[...], decoding)
        k_BLKC, v_BLKC = (_project(hidden_BLD, kernel[...], decoding) for kernel in (self.k, self.v))
        if self.structure.qkv_bias:
            q_BLHC += self.q_bias[...].astype(q_BLHC.dtype)
            k_BLKC += self.k_bias[...].astype(k_BLKC.dtype)
            v_BLKC += self.v_bias[...].astype(v_BLKC.dtype)
        if self.structure.qk_norm:
            q_BLHC, k_BLKC = _normed(self.q_norm, q_BLHC), _normed(self.k_norm, k_BLKC)
        if rotation is not None:
            q_BLHC, k_BLKC = rotate(q_BLHC, positions_BL, rotation), rotate(k_BLKC, positions_BL, rotation)
        mixed_BLHC = mix(q_BLHC, k_BLKC, v_BLKC)
        if few:
            mixed_BLD = few([partial(_times, contracted=2)], self.o[...], mixed_BLHC, (HEADS, ROWS))
        else:
            mixed_BLD = _project(mixed_BLHC, self.o[...], decoding, contracted=2)
        return mixed_BLD + self.o_bias[...].astype(mixed_BLD.dtype) if self.structure.output_bias else mixed_BLD


class FeedForward(nnx.Module):
    """A feed-forward, with a gate (SwiGLU or GEGLU, arXiv 2002.05202) or without."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        D, F = config.width, config.ff_width
        self.structure, self.recomputed = structure, config.remat == "full"
        if structure.gated:
            self.gate = weight(rngs, (D, F), D**-0.5)
        self.up = weight(rngs, (D, F), D**-0.5)
        self.down = weight(rngs, (F, D), (2 * config.layers * F) ** -0.5)
        if structure.feed_forward_bias:
            if structure.gated:
                self.gate_bias = nnx.Param(jnp.zeros(F))
            self.up_bias, self.down_bias = nnx.Param(jnp.zeros(F)), nnx.Param(jnp.zeros(D))

    def __call__(self, hidden_BLD: jax.Array, decoding: bool) -> jax.Array:
        """The output [B, L, D] of the feed-forward, to be added to the hidden states."""
        return self.contract(self.expand(hidden_BLD, decoding), decoding)

    def expand(self, hidden_BLD: jax.Array, decoding: bool) -> tuple[jax.Array, ...]:
        """What the activation applies to and, with a gate, what that is multiplied by: [B, L, F] each."""
        names = ("gate", "up") if self.structure.gated else ("up",)
        return tuple(self._project(name, hidden_BLD, decoding) for name in names)

    def contract(self, expanded: tuple[jax.Array, ...], decoding: bool) -> jax.Array:
        """The output [B, L, D] from what `expand` returns."""
        inner_BLF = ACTIVATIONS[self.structure.activation](expanded[0])
        if self.structure.gated:
            inner_BLF *= expanded[1]
        return self._project("down", inner_BLF, decoding)

    def through(self, few: FewTokens, hidden_BLD: jax.Array) -> jax.Array:
        """The output [B, L, D], with gradients from few tokens."""
        graphdef, params = nnx.split(self)

        def expand(params: nnx.State, hidden_BLD: jax.Array) -> tuple[jax.Array, ...]:
            return nnx.merge(graphdef, params).expand(hidden_BLD, decoding=False)

        def contract(params: nnx.State, expanded: tuple[jax.Array, ...]) -> jax.Array:
            return nnx.merge(graphdef, params).contract(expanded, decoding=False)

        if self.recomputed:
            return few([lambda params, x: contract(params, expand(params, x))], params, hidden_BLD, (ROWS, ROWS))
        return few([expand, contract], params, hidden_BLD, (ROWS, HEADS, ROWS))

    def _project(self, name: str, x: jax.Array, decoding: bool) -> jax.Array:
        """The product of x [B, L, ...] with the kernel of this name, plus its bias if it has one."""
        product = _project(x, getattr(self, name)[...], decoding)
        if not self.structure.feed_forward_bias:
            return product
        return product + getattr(self, f"{name}_bias")[...].astype(product.dtype)


class Layer(nnx.Module):
    """Attention and feed-forward, each with its norms and added to the hidden states."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        norm = partial(hidden_norm, config, structure)
        self.structure = structure
        self.pre_norm, self.post_norm = structure.norm_placement != "post", structure.norm_placement != "pre"
        self.attention = Attention(config, structure, rngs)
        self.feed_forward = FeedForward(config, structure, rngs)
        if self.pre_norm:
            self.attention_norm, self.feed_forward_norm = norm(), norm()
        if self.post_norm:
            self.attention_post_norm, self.feed_forward_post_norm = norm(), norm()

    def __call__(
        self,
        hidden_BLD: jax.Array,
        positions_BL: jax.Array,
        rotation: Rotation | None,
        mix: Mix,
        decoding: bool,
        few: FewTokens | None = None,
    ) -> jax.Array:
        """The hidden states [B, L, D] after the layer. With `few`, its backward pass goes through few tokens."""
        x_BLD = self.attention_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.attention(x_BLD, positions_BL, rotation, mix, decoding, few)
        attended_BLD = self._scaled(self.attention_post_norm(x_BLD) if self.post_norm else x_BLD)
        if not self.structure.parallel_residual:
            hidden_BLD = shard_activations(hidden_BLD + attended_BLD, decoding)
        x_BLD = self.feed_forward_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.feed_forward.through(few, x_BLD) if few else self.feed_forward(x_BLD, decoding)
        fed_BLD = self._scaled(self.feed_forward_post_norm(x_BLD) if self.post_norm else x_BLD)
        if self.structure.parallel_residual:
            fed_BLD = fed_BLD + attended_BLD
        return shard_activations(hidden_BLD + fed_BLD, decoding)

    def _scaled(self, x_BLD: jax.Array) -> jax.Array:
        scale = self.structure.residual_scale
        return x_BLD if scale == 1 else x_BLD * scale
