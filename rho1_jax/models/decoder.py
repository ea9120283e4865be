"""A decoder-only transformer: norms, rotary positions, grouped-query attention, a feed-forward.

What else it computes is up to the `Structure` of the model's family.

Shapes: B batch rows, L sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, N layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.attention import attention
from rho1_jax.models.families import family_of
from rho1_jax.models.few_tokens import FewTokens, Probe, mark_selected
from rho1_jax.models.layer import Layer, Mix, hidden_norm, times_few, weight
from rho1_jax.models.rope import Rotation
from rho1_jax.models.structure import LayerKind, soft_cap
from rho1_jax.runtime.sharding import shard_activations

Params = dict  # nested: parameter name -> array; layers are stacked along a leading axis N

# What the backward pass keeps of each layer's forward pass, besides the layer's input: everything, the products with
# weights, or nothing. It recomputes the rest.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Maps token ids to final hidden states; `output_VD` turns those into logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.structure = config, family_of(config).structure(config)
        self.embedding = weight(rngs, (config.vocab_size, config.width), 0.02)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, self.structure, rngs)

        self.layers = stack(rngs)
        self.norm = hidden_norm(config, self.structure)
        if not config.tied_embeddings:
            self.head = weight(rngs, (config.vocab_size, config.width), 0.02)

    def output_VD(self) -> jax.Array:
        """The output embedding [V, D]. Logits still need the structure's `logit_soft_cap`."""
        return (self.embedding if self.config.tied_embeddings else self.head)[...]

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Logits [B, V] of the next token in float32, from one final hidden state [B, D] of each row."""
        logits_BV = jax.lax.platform_dependent(
            self.output_VD().astype(hidden_BD.dtype),
            hidden_BD,
            cpu=times_few,
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
          [B, L, D] hidden states after the last norm, in the compute dtype, already divided by the structure's
          `logit_divisor`.
        """
        positions_BL = segment_positions(segment_ids_BL)
        graphdef, stacked = nnx.split(self.layers)

        def layer_of(kind: LayerKind) -> Callable:
            mix = self.mix_within(segment_ids_BL, kind.window)
            rotation = self._rotation(kind, tokens_BL.shape[1])

            def layer(states, inputs):
                (hidden_BLD, mark_BL), (params, layer_probe) = states, inputs
                few = FewTokens(layer_probe, mark_BL) if layer_probe else None
                hidden_BLD = nnx.merge(graphdef, params)(hidden_BLD, positions_BL, rotation, mix, False, few)
                return (hidden_BLD, few.mark if few else None), None

            return layer if self.config.remat == "none" else jax.checkpoint(layer, policy=REMAT[self.config.remat])

        layers = [layer_of(kind) for kind in self.structure.kinds(self.config)]
        is_marked = probe is not None and probe.backward.choice == "selected"
        states = self._embed(tokens_BL, decoding=False), jnp.zeros(tokens_BL.shape, jnp.float32) if is_marked else None
        hidden_BLD, mark_BL = _scan_layers(layers, states, (stacked, probe), self.config.unroll)
        return self._finish(hidden_BLD if mark_BL is None else mark_selected(hidden_BLD, mark_BL))

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
