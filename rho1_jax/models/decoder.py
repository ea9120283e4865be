"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, a gated feed-forward.

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
import numpy as np
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.attention import attention
from rho1_jax.models.families import family_of
from rho1_jax.models.few_tokens import HEADS, ROWS, FewTokens, Probe, mark_selected
from rho1_jax.models.structure import ACTIVATIONS, Structure, soft_cap
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
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(size, 1 - offset, jnp.float32))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalizes vectors [..., size] and keeps their dtype."""
        x = hidden.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        scale = self.offset + self.scale[...] if self.offset else self.scale[...]
        return (x * scale).astype(hidden.dtype)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Frequencies [C / 2] of the rotary positions (arXiv 2104.09864), in radians per position.

    A `rope_factor` above 1 scales them like Llama 3.1. Waves with fewer than `rope_low_frequency_factor` turns in the
    original length are stretched by the factor; waves with more than `rope_high_frequency_factor` turns are unchanged.
    Between the two, the scaling is interpolated linearly.
    """
    half = config.head_width // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    turns = config.rope_original_length * frequencies / (2 * np.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def rotate(x_BLHC: jax.Array, positions_BL: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates each pair by position times frequency. Pairs join the two halves of a head, as in Llama."""
    angles_BL1c = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    sin, cos = jnp.sin(angles_BL1c), jnp.cos(angles_BL1c)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


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


def _times(kernel: jax.Array, x: jax.Array, contracted: int = 1) -> jax.Array:
    return _project(x, kernel, decoding=False, contracted=contracted)


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
        if structure.qk_norm:
            self.q_norm = RMSNorm(C, config.norm_eps, structure.norm_offset)
            self.k_norm = RMSNorm(C, config.norm_eps, structure.norm_offset)

    def __call__(
        self, hidden_BLD: jax.Array, positions_BL: jax.Array, mix: Mix, decoding: bool, few: FewTokens | None
    ) -> jax.Array:
        """The output [B, L, D] of attention, to be added to the hidden states."""
        if few:
            q_BLHC = few(_times, self.q[...], hidden_BLD, (ROWS, HEADS))
        else:
            q_BLHC = _project(hidden_BLD, self.q[...], decoding)
        k_BLKC, v_BLKC = (_project(hidden_BLD, kernel[...], decoding) for kernel in (self.k, self.v))
        if self.structure.qkv_bias:
            q_BLHC += self.q_bias[...].astype(q_BLHC.dtype)
            k_BLKC += self.k_bias[...].astype(k_BLKC.dtype)
            v_BLKC += self.v_bias[...].astype(v_BLKC.dtype)
        if self.structure.qk_norm:
            q_BLHC, k_BLKC = self.q_norm(q_BLHC), self.k_norm(k_BLKC)
        frequencies = rotary_frequencies(self.config)
        q_BLHC, k_BLKC = rotate(q_BLHC, positions_BL, frequencies), rotate(k_BLKC, positions_BL, frequencies)
        mixed_BLHC = mix(q_BLHC, k_BLKC, v_BLKC)
        if few:
            return few(partial(_times, contracted=2), self.o[...], mixed_BLHC, (HEADS, ROWS))
        return _project(mixed_BLHC, self.o[...], decoding, contracted=2)


class FeedForward(nnx.Module):
    """A gated feed-forward: SwiGLU or GEGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        D, F = config.width, config.ff_width
        self.activation, self.recomputed = structure.activation, config.remat == "full"
        self.gate = _weight(rngs, (D, F), D**-0.5)
        self.up = _weight(rngs, (D, F), D**-0.5)
        self.down = _weight(rngs, (F, D), (2 * config.layers * F) ** -0.5)

    def __call__(self, hidden_BLD: jax.Array, decoding: bool) -> jax.Array:
        """The output [B, L, D] of the feed-forward, to be added to the hidden states."""
        return self.contract(self.expand(hidden_BLD, decoding), decoding)

    def expand(self, hidden_BLD: jax.Array, decoding: bool) -> tuple[jax.Array, jax.Array]:
        """The gate and what it multiplies, [B, L, F] each."""
        return _project(hidden_BLD, self.gate[...], decoding), _project(hidden_BLD, self.up[...], decoding)

    def contract(self, expanded: tuple[jax.Array, jax.Array], decoding: bool) -> jax.Array:
        """The output [B, L, D] from what `expand` returns."""
        gate_BLF, up_BLF = expanded
        return _project(ACTIVATIONS[self.activation](gate_BLF) * up_BLF, self.down[...], decoding)

    def through(self, few: FewTokens, hidden_BLD: jax.Array) -> jax.Array:
        """The output [B, L, D], with gradients from few tokens."""
        graphdef, params = nnx.split(self)

        def expand(params, hidden_BLD):
            return nnx.merge(graphdef, params).expand(hidden_BLD, decoding=False)

        def contract(params, expanded):
            return nnx.merge(graphdef, params).contract(expanded, decoding=False)

        if self.recomputed:
            return few(lambda params, x: contract(params, expand(params, x)), params, hidden_BLD, (ROWS, ROWS))
        return few(expand, params, hidden_BLD, (ROWS, ROWS), then=(contract, HEADS))


class Layer(nnx.Module):
    """Attention and feed-forward, each with its norms and added to the hidden states."""

    def __init__(self, config: ModelConfig, structure: Structure, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.width, config.norm_eps, structure.norm_offset)
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
        mix: Mix,
        decoding: bool,
        few: FewTokens | None = None,
    ) -> jax.Array:
        """The hidden states [B, L, D] after the layer. `few`: how its backward pass goes through few tokens."""
        x_BLD = self.attention_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.attention(x_BLD, positions_BL, mix, decoding, few)
        hidden_BLD = hidden_BLD + (self.attention_post_norm(x_BLD) if self.post_norm else x_BLD)
        hidden_BLD = shard_activations(hidden_BLD, decoding)
        x_BLD = self.feed_forward_norm(hidden_BLD) if self.pre_norm else hidden_BLD
        x_BLD = self.feed_forward.through(few, x_BLD) if few else self.feed_forward(x_BLD, decoding)
        hidden_BLD = hidden_BLD + (self.feed_forward_post_norm(x_BLD) if self.post_norm else x_BLD)
        return shard_activations(hidden_BLD, decoding)


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
        self.norm = RMSNorm(config.width, config.norm_eps, self.structure.norm_offset)
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

    def __call__(self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, probe: Probe | None = None) -> jax.Array:
        """Runs the decoder on whole rows.

        Args:
          tokens_BL: [B, L] token ids.
          segment_ids_BL: [B, L] document numbers. Attention stays within equal ones, and positions restart at each.
          probe: makes the backward pass go through few tokens; None: through all.

        Returns:
          [B, L, D] hidden states after the last norm, in the compute dtype.
        """
        positions_BL, windows = segment_positions(segment_ids_BL), self.structure.windows
        graphdef, stacked = nnx.split(self.layers)

        def layer_with(window: int | None) -> Callable:
            mix = self.mix_within(segment_ids_BL, window)

            def layer(states, inputs):
                hidden_BLD, mark_BL = states
                params, layer_probe = inputs
                few = FewTokens(layer_probe, mark_BL) if layer_probe else None
                hidden_BLD = nnx.merge(graphdef, params)(hidden_BLD, positions_BL, mix, decoding=False, few=few)
                return (hidden_BLD, few.mark if few else None), None

            return layer if self.config.remat == "none" else jax.checkpoint(layer, policy=REMAT[self.config.remat])

        layers = [layer_with(window) for window in windows]
        selected = probe is not None and probe.backward.choice == "selected"
        mark_BL = jnp.zeros(tokens_BL.shape) if selected else None
        states = self._embed(tokens_BL, decoding=False), mark_BL
        hidden_BLD, mark_BL = _scan_layers(layers, states, (stacked, probe), self.config.unroll)
        return self.norm(hidden_BLD if mark_BL is None else mark_selected(hidden_BLD, mark_BL))

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
        mix: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
        decoding: bool,
    ) -> jax.Array:
        """Runs the decoder for generation.

        Args:
          layers: parameters of each layer, not stacked.
          tokens_BL: [B, L] token ids.
          positions_BL: [B, L] positions within their documents.
          mix: attention, called with the number of the layer, counted from 0, and its queries, keys and values.
          decoding: True for rows of one token, which are computed and sharded differently from whole rows.

        Returns:
          [B, L, D] hidden states, as `__call__` returns them.
        """
        graphdef, hidden_BLD = nnx.split(self.layers)[0], self._embed(tokens_BL, decoding)
        for n, params in enumerate(layers):
            hidden_BLD = nnx.merge(graphdef, params)(hidden_BLD, positions_BL, partial(mix, n), decoding)
        return self.norm(hidden_BLD)

    def _embed(self, tokens_BL: jax.Array, decoding: bool) -> jax.Array:
        scale = self.structure.embedding_scale
        hidden_BLD = self.embedding[...].astype(self.config.compute_dtype)[tokens_BL]
        return shard_activations(hidden_BLD if scale == 1 else hidden_BLD * scale, decoding)


def _scan_layers(layers: Sequence[Callable], states: Any, stacked: Any, unroll: int) -> Any:
    """Runs N layers with a pattern of P functions, the bodies of `jax.lax.scan`, that repeats over them.

    The scan runs over groups of P layers; the N % P layers at the end follow it.
    """
    if len(layers) == 1:
        return jax.lax.scan(layers[0], states, stacked, unroll=unroll)[0]
    P, N = len(layers), jax.tree.leaves(stacked)[0].shape[0]
    grouped = jax.tree.map(lambda x: x[: N // P * P].reshape(N // P, P, *x.shape[1:]), stacked)

    def group(states, inputs):
        for n, layer in enumerate(layers):
            states, _ = layer(states, jax.tree.map(lambda x, n=n: x[n], inputs))
        return states, None

    states, _ = jax.lax.scan(group, states, grouped, unroll=-(-unroll // P))
    for n in range(N // P * P, N):
        states, _ = layers[n % P](states, jax.tree.map(lambda x, n=n: x[n], stacked))
    return states


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


def layer_count(params: Params) -> int:
    """The number of layers N that parameters have."""
    return jax.tree.leaves(params["layers"])[0].shape[0]
