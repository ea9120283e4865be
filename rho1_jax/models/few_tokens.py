"""Backward passes through the few tokens that carry most of the gradient.

Some parts of a layer process each token by itself. `FewTokens` computes such a part for all tokens, and its gradient
from k of them: of each device's tokens, those whose cotangents matter most. The forward pass stays exact. Gradients
along the residual stream and through attention's keys and values still come from all tokens.

Shapes: B batch rows, L sequence. On one device: T tokens in its rows, k tokens that are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rho1_jax.configs.default import BackwardConfig
from rho1_jax.runtime.sharding import BATCH_AXES, ROWS, on_mesh


@partial(jax.tree_util.register_dataclass, data_fields=("energy", "key"), meta_fields=("backward",))
@dataclasses.dataclass(frozen=True)
class Probe:
    """What a backward pass reads and reports: for all layers or, inside a layer, for that one.

    Attributes:
      backward: how many tokens the backward pass goes through, and which.
      energy: zeros [N, 2], one row per layer. Its "gradient" is the report: the squared norms of the cotangents that
        were left out, and of all cotangents, summed over the layer's parts.
      key: random keys [N], one per layer, for the choice "drawn".
    """

    backward: BackwardConfig
    energy: jax.Array
    key: jax.Array

    @classmethod
    def of(cls, backward: BackwardConfig, energy_N2: jax.Array, key: jax.Array) -> "Probe":
        """The probe of a whole model, with a key of its own for each layer."""
        return cls(backward, energy_N2, jax.random.split(key, len(energy_N2)))


class FewTokens:
    """Applies per-token functions within one layer, with gradients from few tokens."""

    def __init__(self, probe: Probe, mark_BL: jax.Array | None):
        """Sets up a layer.

        Args:
          probe: of the layer.
          mark_BL: zeros whose cotangent says which tokens are selected; None unless the choice is "selected". The
            attribute `mark` is the same array, passed through every call so far.
        """
        self._probe, self.mark, self._calls = probe, mark_BL, 0

    def __call__(
        self,
        functions: Sequence[Callable[[Any, Any], Any]],
        params: Any,
        x: jax.Array,
        specs: Sequence[PartitionSpec],
    ) -> jax.Array:
        """Applies functions one after the other, each to `params` and what the one before it returned.

        The backward pass keeps what each function is applied to, and recomputes everything inside it for the k tokens.

        Args:
          functions: map (params, arrays [B, L, ...]) to arrays [B, L, ...], each token by itself.
          params: parameters of all the functions.
          x: [B, L, ...] what the first function is applied to.
          specs: how x, what the functions pass on, and the result are sharded.

        Returns:
          [B, L, ...] what the last function returns.
        """
        key, self._calls = jax.random.fold_in(self._probe.key, self._calls), self._calls + 1
        backward = self._probe.backward
        *kept_specs, y_spec = specs

        def forward(params, x, mark_BL, energy, key):
            kept = []
            for function in functions:
                kept.append(x)
                x = function(params, x)
            return (x, mark_BL), (params, kept, key)

        def gradients(residuals, cotangents):
            params, kept, key = residuals
            bar, mark_BL = cotangents
            energy_BL = (bar.astype(jnp.float32) ** 2).sum(axis=tuple(range(2, bar.ndim)))
            index, place_BL, scale, energy = choose(energy_BL, mark_BL, backward, key)
            bar_k = take(bar, index, y_spec)
            if backward.choice != "largest":
                bar_k = (bar_k * scale.reshape(-1, *[1] * (bar_k.ndim - 1))).astype(bar.dtype)
            params_bars = []
            for function, x, spec in reversed(list(zip(functions, kept, kept_specs))):
                x_k = jax.tree.map(partial(take, index=index, spec=spec), x)
                params_bar, bar_k = jax.vjp(function, params, x_k)[1](bar_k)
                params_bars.append(params_bar)
            params_bar = jax.tree.map(lambda *bars: reduce(jnp.add, bars), *params_bars)
            return params_bar, put(bar_k, place_BL, kept_specs[0]), mark_BL, energy, None

        composed = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        composed.defvjp(forward, gradients)
        y, self.mark = composed(params, x, self.mark, self._probe.energy, key)
        return y


def kept_tokens(tokens: float, T: int) -> int:
    """How many of T tokens the backward pass goes through."""
    return max(1, math.ceil(round(tokens * T, 6)))


def choose(
    energy_BL: jax.Array, mark_BL: jax.Array | None, backward: BackwardConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses k tokens on each device.

    Args:
      energy_BL: squared norms of the cotangents.
      mark_BL: positive for selected tokens; None unless the choice is "selected".
      backward: how many tokens, and which.
      key: random key for "drawn".

    Returns:
      Indices of the tokens among the device's, [k] on each device; the place of each token in these, [B, L], k if it
      was left out; what each cotangent is multiplied by, [k] on each device; and the energy that is left out and that
      of all tokens, [2].
    """

    def local(energy_bL: jax.Array, mark_bL: jax.Array | None, key_data: jax.Array):
        energy_T = energy_bL.ravel()
        T, k = energy_T.size, kept_tokens(backward.tokens, energy_T.size)
        priority_T = energy_T if mark_bL is None else jnp.where(mark_bL.ravel() > 0, energy_T, 0)
        if backward.choice == "drawn":
            norm_T = jnp.sqrt(energy_T)
            priority_T = norm_T / _uniform(key_data, T)
        # `top_k` ranks negative NaNs last. They come first, so that the gradient is seen not to be finite.
        priority_T = jnp.where(jnp.isnan(priority_T), jnp.inf, priority_T)
        priority, index = jax.lax.top_k(priority_T, min(k + 1, T))
        threshold, index = priority[-1], index[:k]
        place_bL = jnp.full(T, k).at[index].set(jnp.arange(k)).reshape(energy_bL.shape)
        scale = (priority[:k] > 0).astype(jnp.float32)
        if backward.choice == "drawn" and k < T:
            norm_k = norm_T[index]
            scale = jnp.where(norm_k > 0, jnp.maximum(norm_k, threshold) / norm_k, 0)
        left_out_T = energy_T.at[index].set(jnp.where(scale > 0, 0, energy_T[index]))
        return index, place_bL, scale, left_out_T.reshape(energy_bL.shape)

    mark_spec = None if mark_BL is None else ROWS
    on_devices = on_mesh(local, (ROWS, mark_spec, PartitionSpec()), ROWS)
    index, place_BL, scale, left_out_BL = on_devices(energy_BL, mark_BL, jax.random.key_data(key))
    return index, place_BL, scale, jnp.stack([left_out_BL.sum(), energy_BL.sum()])


def _uniform(key_data: jax.Array, size: int) -> jax.Array:
    """Numbers in (0, 1], different on each device."""
    key = jax.random.wrap_key_data(key_data)
    for axis in BATCH_AXES:
        if axis in jax.sharding.get_abstract_mesh().axis_names:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return 1 - jax.random.uniform(key, (size,))


def take(x: jax.Array, index: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The chosen tokens of x [B, L, ...] as [S k, 1, ...] on S devices that share the batch."""

    def local(x_bL: jax.Array, index_k: jax.Array) -> jax.Array:
        return x_bL.reshape(-1, *x_bL.shape[2:])[index_k][:, None]

    return on_mesh(local, (spec, ROWS), spec)(x, index)


def put(x_k: jax.Array, place_BL: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The inverse of `take`: an array [B, L, ...] that is zero everywhere else."""

    def local(x_k1: jax.Array, place_bL: jax.Array) -> jax.Array:
        return x_k1[:, 0].at[place_bL].get(mode="fill", fill_value=0)

    return on_mesh(local, (spec, ROWS), spec)(x_k, place_BL)


@jax.custom_vjp
def mark_selected(hidden_BLD: jax.Array, mark_BL: jax.Array) -> jax.Array:
    """Returns the hidden states. The cotangent of `mark_BL` is 1 where theirs is not zero: at the selected tokens."""
    return hidden_BLD


mark_selected.defvjp(
    lambda hidden_BLD, mark_BL: (hidden_BLD, None),
    lambda _, bar_BLD: (bar_BLD, (bar_BLD != 0).any(axis=-1).astype(jnp.float32)),
)
