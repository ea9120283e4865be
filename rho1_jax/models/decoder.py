"""A decoder-only transformer: norms, rotary positions, grouped-query attention, a feed-forward.

What else it computes is up to the `Structure` of the model's family.

Shapes: B batch rows, L sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, N layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.attention import attention
from rho1_jax.models.families import family_of
from rho1_jax.models.rope import Rotation, rotate
from rho1_jax.models.structure import ACTIVATIONS, LayerKind, Structure, soft_cap
from rho1_jax.runtime.sharding import shard_activations

Params = dict  # nested: parameter name -> array; layers are stacked along a leading axis N
# Attention of one layer: queries [B, L, H, C], keys and values [B, L, K, C] -> mixed values [B, L, H, C].
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# What the backward pass keeps of each layer's forward pass, besides the layer's input: everything, the products with
# weights, or nothing. It recomputes the rest.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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


def _norm(config: ModelConfig, structure: Structure) -> RMSNorm | LayerNorm:
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
            cpu=lambda x, kernel: _times_few(jax.lax.optimization_barrier(kernel.T), x).astype(x.dtype),
            default=jnp.matmul,
        )
    return flat_TX.reshape(*x.shape[:2], *outer)


def _times_few(kernel_XD: jax.Array, x_TD: jax.Array) -> jax.Array:
    """x @ kernel.T for a few rows on CPU, where XLA copies the right operand, so the smaller one goes there."""
    return jax.lax.optimization_barrier(jnp.matmul(kernel_XD, x_TD.T, preferred_element_type=jnp.float32)).T


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped heads."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_width
        self.config, self.structure = config, structure
        self.q = _weight(rngs, (D, H, C), D**-0.5)
        self.k = _weight(rngs, (D, K, C), D**-0.5)
        self.v = _weight(rngs, (D, K, C), D**-0.5)
        self.o = _weight(rngs, (H, C, D), (2 * config.layers * H * C) ** -0.5)
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
        self, hidden_BLD: jax.Array, positions_BL: jax.Array, rotation: Rotation | None, mix: Mix, decoding: bool
    ) -> jax.Array:
        """The output [B, L, D] of attention, to be added to the hidden states."""
        q_BLHC, k_BLKC, v_BLKC = (_project(hidden_BLD, kernel[...], decoding) for kernel in (self.q, self.k, self.v))
        if self.structure.qkv_bias:
            q_BLHC += self.q_bias[...].astype(q_BLHC.dtype)
            k_BLKC += self.k_bias[...].astype(k_BLKC.dtype)
            v_BLKC += self.v_bias[...].astype(v_BLKC.dtype)
        if self.structure.qk_norm:
            q_BLHC, k_BLKC = _normed(self.q_norm, q_BLHC), _normed(self.k_norm, k_BLKC)
        if rotation is not None:
            q_BLHC, k_BLKC = rotate(q_BLHC, positions_BL, rotation), rotate(k_BLKC, positions_BL, rotation)
        mixed_BLD = _project(mix(q_BLHC, k_BLKC, v_BLKC), self.o[...], decoding, contracted=2)
        return mixed_BLD + self.o_bias[...].astype(mixed_BLD.dtype) if self.structure.output_bias else mixed_BLD


class FeedForward(nnx.Module):
    """A feed-forward, with a gate (SwiGLU or GEGLU, arXiv 2002.05202) or without."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        D, F = config.width, config.ff_width
        self.structure = structure
        if structure.gated:
            self.gate = _weight(rngs, (D, F), D**-0.5)
        self.up = _weight(rngs, (D, F), D**-0.5)
        self.down = _weight(rngs, (F, D), (2 * config.layers * F) ** -0.5)
        if structure.feed_forward_bias:
            if structure.gated:
                self.gate_bias = nnx.Param(jnp.zeros(F))
            self.up_bias, self.down_bias = nnx.Param(jnp.zeros(F)), nnx.Param(jnp.zeros(D))

    def __call__(self, hidden_BLD: jax.Array, decoding: bool) -> jax.Array:
        """The output [B, L, D] of the feed-forward, to be added to the hidden states."""
        activation = ACTIVATIONS[self.structure.activation]
        if self.structure.gated:
            gate_BLF = activation(self._project("gate", hidden_BLD, decoding))
            inner_BLF = gate_BLF * self._project("up", hidden_BLD, decoding)
        else:
            inner_BLF = activation(self._project("up", hidden_BLD, decoding))
        return self._project("down", inner_BLF, decoding)

    def _project(self, name: str, x: jax.Array, decoding: bool) -> jax.Array:
        """The product of x [B, L, ...] with the kernel of this name, plus its bias if it has one."""
        product = _project(x, getattr(self, name)[...], decoding)
        if not self.structure.feed_forward_bias:
            return product
        return product + getattr(self, f"{name}_bias")[...].astype(product.dtype)


class Layer(nnx.Module):
    """Attention and feed-forward, each with its norms and added to the hidden states."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        norm = partial(_norm, config, structure)
        self.structure = structure
        self.pre_norm, self.post_norm = structure.norm_placement != "post", structure.norm_placement != "pre"
        self.attention = Attention(config, structure, rngs)
        self.feed_forward = FeedForward(config, structure, rngs)
        if self.pre_norm:
            self.attention_norm, self.feed_forward_norm = norm(), norm()
        if self.post_norm:
            self.attention_post_norm, self.feed_forward_post_norm = norm(), norm()

    def __call__(
        self, hidden_BLD: jax.Array, positions_BL: jax.Array, rotation: Rotation | None, mix: Mix, decoding: bool
    ) -> jax.Array:
        """The hidden states [B, L, D] after the layer."""
        x_BLD = self.attention_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.attention(x_BLD, positions_BL, rotation, mix, decoding)
        attended_BLD = self._scaled(self.attention_post_norm(x_BLD) if self.post_norm else x_BLD)
        if not self.structure.parallel_residual:
            hidden_BLD = shard_activations(hidden_BLD + attended_BLD, decoding)
        x_BLD = self.feed_forward_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.feed_forward(x_BLD, decoding)
        fed_BLD = self._scaled(self.feed_forward_post_norm(x_BLD) if self.post_norm else x_BLD)
        if self.structure.parallel_residual:
            fed_BLD = fed_BLD + attended_BLD
        return shard_activations(hidden_BLD + fed_BLD, decoding)

    def _scaled(self, x_BLD: jax.Array) -> jax.Array:
        scale = self.structure.residual_scale
        return x_BLD if scale == 1 else x_BLD * scale


class Decoder(nnx.Module):
    """Maps token ids to final hidden states; `output_VD` turns those into logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.structure = config, family_of(config).structure(config)
        self.embedding = _weight(rngs, (config.vocab_size, config.width), 0.02)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, self.structure, rngs)

        self.layers = stack(rngs)
        self.norm = _norm(config, self.structure)
        if not config.tied_embeddings:
            self.head = _weight(rngs, (config.vocab_size, config.width), 0.02)

    def output_VD(self) -> jax.Array:
        """The output embedding [V, D]. Logits still need the structure's `logit_soft_cap`."""
        return (self.embedding if self.config.tied_embeddings else self.head)[...]

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Logits [B, V] of the next token in float32, from one final hidden state [B, D] of each row."""
        logits_BV = jax.lax.platform_dependent(
            self.output_VD().astype(hidden_BD.dtype),
            hidden_BD,
            cpu=_times_few,
            default=partial(jnp.einsum, "VD,BD->BV", preferred_element_type=jnp.float32),
        )
        return soft_cap(logits_BV, self.structure.logit_soft_cap)

    def __call__(self, tokens_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Runs the decoder on whole rows.

        Args:
          tokens_BL: [B, L] token ids.
          segment_ids_BL: [B, L] document numbers. Attention stays within equal ones, and positions restart at each.

        Returns:
          [B, L, D] hidden states after the last norm, in the compute dtype, already divided by the structure's
          `logit_divisor`.
        """
        positions_BL = segment_positions(segment_ids_BL)
        graphdef, stacked = nnx.split(self.layers)

        def layer_of(kind: LayerKind) -> Callable:
            mix = self.mix_within(segment_ids_BL, kind.window)
            rotation = self._rotation(kind, tokens_BL.shape[1])

            def layer(hidden_BLD, params):
                return nnx.merge(graphdef, params)(hidden_BLD, positions_BL, rotation, mix, decoding=False), None

            return layer if self.config.remat == "none" else jax.checkpoint(layer, policy=REMAT[self.config.remat])

        layers = [layer_of(kind) for kind in self.structure.kinds(self.config)]
        return self._finish(_scan_layers(layers, self._embed(tokens_BL, decoding=False), stacked, self.config.unroll))

    def _rotation(self, kind: LayerKind, length: int | jax.Array) -> Rotation | None:
        return None if kind.rope is None else kind.rope.rotation(self.config.head_width, length)

    def mix_within(self, segment_ids_BL: jax.Array, window: int | None) -> Mix:
        """Attention within the documents of whole rows, for a layer with this sliding window."""
        return partial(
            attention,
            segments_BL=segment_ids_BL,
            sliding_window=window,
            kernel=self.config.attention,
            query_scale=self.structure.query_scale,
            soft_cap=self.structure.attention_soft_cap,
        )

    def layer_by_layer(
        self,
        layers: Sequence[Params],
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        lengths_B: jax.Array,
        mix: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
        decoding: bool,
    ) -> jax.Array:
        """Runs the decoder for generation.

        Args:
          layers: parameters of each layer, not stacked.
          tokens_BL: [B, L] token ids.
          positions_BL: [B, L] positions within their documents.
          lengths_B: [B] length that each document may reach.
          mix: attention, called with the number of the layer, counted from 0, and its queries, keys and values.
          decoding: True for rows of one token, which are computed and sharded differently from whole rows.

        Returns:
          [B, L, D] hidden states, as `__call__` returns them.
        """
        graphdef, hidden_BLD = nnx.split(self.layers)[0], self._embed(tokens_BL, decoding)
        for n, params in enumerate(layers):
            rotation = self._rotation(self.structure.kind(self.config, n), lengths_B)
            hidden_BLD = nnx.merge(graphdef, params)(hidden_BLD, positions_BL, rotation, partial(mix, n), decoding)
        return self._finish(hidden_BLD)

    def _embed(self, tokens_BL: jax.Array, decoding: bool) -> jax.Array:
        scale = self.structure.embedding_scale
        hidden_BLD = self.embedding[...].astype(self.config.compute_dtype)[tokens_BL]
        return shard_activations(hidden_BLD if scale == 1 else hidden_BLD * scale, decoding)

    def _finish(self, hidden_BLD: jax.Array) -> jax.Array:
        """Dividing the last hidden states divides the logits, wherever they are computed."""
        divisor = self.structure.logit_divisor
        return self.norm(hidden_BLD) if divisor == 1 else self.norm(hidden_BLD) / divisor


def _scan_layers(layers: Sequence[Callable], hidden_BLD: jax.Array, stacked: Any, unroll: int) -> jax.Array:
    """Runs N layers with a pattern of P functions, the bodies of `jax.lax.scan`, that repeats over them.

    The scan runs over groups of P layers; the N % P layers at the end follow it.
    """
    if len(layers) == 1:
        return jax.lax.scan(layers[0], hidden_BLD, stacked, unroll=unroll)[0]
    P, N = len(layers), jax.tree.leaves(stacked)[0].shape[0]
    grouped = jax.tree.map(lambda x: x[: N // P * P].reshape(N // P, P, *x.shape[1:]), stacked)

    def group(hidden_BLD, params):
        for n, layer in enumerate(layers):
            hidden_BLD, _ = layer(hidden_BLD, jax.tree.map(lambda x, n=n: x[n], params))
        return hidden_BLD, None

    hidden_BLD, _ = jax.lax.scan(group, hidden_BLD, grouped, unroll=-(-unroll // P))
    for n in range(N // P * P, N):
        hidden_BLD, _ = layers[n % P](hidden_BLD, jax.tree.map(lambda x, n=n: x[n], stacked))
    return hidden_BLD


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Positions [B, L] counted from the start of each segment."""
    index_L = jnp.arange(segment_ids_BL.shape[1])
    starts_BL = jnp.diff(segment_ids_BL, axis=1, prepend=-1) != 0
    return index_L - jax.lax.cummax(jnp.where(starts_BL, index_L, 0), axis=1)


def build(config: ModelConfig) -> nnx.GraphDef:
    """The model's structure without parameters. `nnx.merge(graphdef, params)` makes it runnable."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, seed: int) -> Params:
    """New float32 parameters. Call it under `jax.jit` with the shardings you want."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(seed)))[1])


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(lambda: init_params(config, 0))


def param_count(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
