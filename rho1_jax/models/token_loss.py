"""Per-token cross-entropy, and entropy, that never holds the logits of all tokens, neither forward nor backward.

Shapes: B batch rows, L sequence, D model width, V vocabulary. On one device: T tokens of its rows, v its part of the
vocabulary, c tokens of one chunk, n chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rho1_jax.runtime.sharding import BATCH_AXES, RULES, mesh_is_set, on_mesh

ROWS = PartitionSpec(BATCH_AXES)
VOCABULARY, WIDTH = RULES["head"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_losses(
    hidden_BLD: jax.Array, output_VD: jax.Array, targets_BL: jax.Array, chunk: int, entropies: bool
) -> tuple[jax.Array, jax.Array | None]:
    """-log p(target) of every token and, if asked, the entropy of its prediction.

    The backward pass makes logits again, and only those of tokens whose loss has a gradient: under selection, of the
    selected ones. On a mesh each device does both for its own rows and its own part of the vocabulary.

    Args:
      hidden_BLD: [B, L, D] final hidden states.
      output_VD: [V, D] output embedding. Its gradient is summed in float32, whatever the dtype of the hidden states.
      targets_BL: [B, L] token ids.
      chunk: tokens of a device whose logits exist at once.
      entropies: whether to make them. No gradient passes through an entropy.

    Returns:
      [B, L] float32 losses, and [B, L] float32 entropies or None, all in nats.
    """
    return _forward(hidden_BLD, output_VD, targets_BL, chunk, entropies)[0]


def _forward(hidden_BLD, output_VD, targets_BL, chunk, entropies):
    local = functools.partial(_local_losses, chunk=chunk, entropies=entropies)
    on_devices = on_mesh(local, (ROWS, PartitionSpec(VOCABULARY), ROWS), ROWS)
    loss_BL, log_total_BL, entropy_BL = on_devices(hidden_BLD, output_VD.astype(hidden_BLD.dtype), targets_BL)
    return (loss_BL, entropy_BL), (hidden_BLD, output_VD, targets_BL, log_total_BL)


def _backward(chunk, _, kept, gradients):
    gradient_BL, _ = gradients
    hidden_BLD, output_VD, *others = kept
    local = functools.partial(_local_gradients, chunk=chunk)
    in_specs = (ROWS, PartitionSpec(VOCABULARY), ROWS, ROWS, ROWS)
    on_devices = on_mesh(local, in_specs, (ROWS, PartitionSpec(VOCABULARY, WIDTH)))
    hidden_gradient_BLD, output_gradient_VD = on_devices(
        hidden_BLD, output_VD.astype(hidden_BLD.dtype), *others, gradient_BL
    )
    return hidden_gradient_BLD.astype(hidden_BLD.dtype), output_gradient_VD.astype(output_VD.dtype), None


token_losses.defvjp(_forward, _backward)


def _logits(hidden_cD: jax.Array, output_vD: jax.Array) -> jax.Array:
    return jnp.einsum("cD,vD->cv", hidden_cD, output_vD, preferred_element_type=jnp.float32)


def _local_targets(targets: jax.Array, output_vD: jax.Array) -> jax.Array:
    """Targets as indices into this device's part of the vocabulary; outside of it where they are another's."""
    return targets - jax.lax.axis_index(VOCABULARY) * output_vD.shape[0] if mesh_is_set() else targets


def _local_losses(hidden_BLD, output_vD, targets_BL, *, chunk, entropies):
    """Losses, logarithms of the softmax's denominators, and entropies or None: [B, L] each."""
    T, D = targets_BL.size, hidden_BLD.shape[-1]
    chunk = min(chunk, T)
    padding = -T % chunk
    hidden_ncD = jnp.pad(hidden_BLD.reshape(T, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_nc = jnp.pad(_local_targets(targets_BL.ravel(), output_vD), (0, padding)).reshape(-1, chunk)

    def one(part):
        hidden_cD, targets_c = part
        logits_cv = _logits(hidden_cD, output_vD)
        largest_c = logits_cv.max(axis=-1)
        if mesh_is_set():
            largest_c = jax.lax.pmax(largest_c, VOCABULARY)
        total_c = jnp.exp(logits_cv - largest_c[:, None]).sum(axis=-1)
        target_logit_c = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=-1, mode="fill", fill_value=0)[:, 0]
        # A negative index would count from the end.
        target_logit_c = jnp.where(targets_c < 0, 0, target_logit_c)
        if mesh_is_set():
            total_c, target_logit_c = jax.lax.psum((total_c, target_logit_c), VOCABULARY)
        log_total_c = largest_c + jnp.log(total_c)
        entropy_c = None
        if entropies:
            below_cv = logits_cv - largest_c[:, None]
            weighted_c = (jnp.exp(below_cv) * below_cv).sum(axis=-1)
            if mesh_is_set():
                weighted_c = jax.lax.psum(weighted_c, VOCABULARY)
            entropy_c = jnp.log(total_c) - weighted_c / total_c
        return log_total_c - target_logit_c, log_total_c, entropy_c

    found = jax.lax.map(one, (hidden_ncD, targets_nc))
    return jax.tree.map(lambda x_nc: x_nc.ravel()[:T].reshape(targets_BL.shape), found)


def _local_gradients(hidden_BLD, output_vD, targets_BL, log_total_BL, gradient_BL, *, chunk):
    """Gradients of the sum of gradient_BL * losses by hidden states [B, L, D] and output embedding, in float32."""
    T, D = targets_BL.size, hidden_BLD.shape[-1]
    chunk = min(chunk, T)
    size = -(-T // chunk) * chunk
    hidden_TD, log_total_T, gradient_T = hidden_BLD.reshape(T, D), log_total_BL.ravel(), gradient_BL.ravel()
    targets_T = _local_targets(jnp.ravel(targets_BL), output_vD)
    # The tokens that matter, in their order, and nothing behind them.
    matters_T = gradient_T != 0
    rank_T = jnp.where(matters_T, jnp.cumsum(matters_T) - 1, size)
    order_T = jnp.full(size, T).at[rank_T].set(jnp.arange(T), mode="drop")

    def one(n, sums):
        hidden_gradient_TD, output_gradient_vD = sums
        order_c = jax.lax.dynamic_slice_in_dim(order_T, n * chunk, chunk)
        hidden_cD, weight_c, log_total_c, targets_c = (
            x_T.at[order_c].get(mode="fill", fill_value=0) for x_T in (hidden_TD, gradient_T, log_total_T, targets_T)
        )
        weighted_cv = jnp.exp(_logits(hidden_cD, output_vD) - log_total_c[:, None]) * weight_c[:, None]
        is_target_cv = jnp.arange(output_vD.shape[0]) == targets_c[:, None]
        by_logits_cv = jnp.where(is_target_cv, weighted_cv - weight_c[:, None], weighted_cv).astype(hidden_cD.dtype)
        by_hidden_cD = jnp.einsum("cv,vD->cD", by_logits_cv, output_vD, preferred_element_type=jnp.float32)
        output_gradient_vD += jnp.einsum("cv,cD->vD", by_logits_cv, hidden_cD, preferred_element_type=jnp.float32)
        return (
            jax.lax.dynamic_update_slice_in_dim(hidden_gradient_TD, by_hidden_cD, n * chunk, axis=0),
            output_gradient_vD,
        )

    zeros = jnp.zeros((size, D), jnp.float32), jnp.zeros(output_vD.shape, jnp.float32)
    hidden_gradient_TD, output_gradient_vD = jax.lax.fori_loop(0, -(-matters_T.sum() // chunk), one, zeros)
    if mesh_is_set():
        hidden_gradient_TD = jax.lax.psum(hidden_gradient_TD, VOCABULARY)
        output_gradient_vD = jax.lax.psum(output_gradient_vD, "data")
        output_gradient_vD = jax.lax.psum_scatter(output_gradient_vD, WIDTH, scatter_dimension=1, tiled=True)
    hidden_gradient_TD = hidden_gradient_TD.at[rank_T].get(mode="fill", fill_value=0)
    return hidden_gradient_TD.reshape(hidden_BLD.shape), output_gradient_vD
