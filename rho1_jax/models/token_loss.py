"""Per-token cross-entropy and entropy. Unless there is memory to spare, the logits of all tokens never exist at once.

Shapes: B batch rows, L sequence, D model width, V vocabulary. On one device: T tokens in its rows, v words in its part
of the vocabulary, c tokens in a chunk, n chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rho1_jax.models import structure
from rho1_jax.runtime.sharding import BATCH_AXES, ROWS, RULES, mesh_is_set, on_mesh

VOCABULARY, WIDTH = RULES["head"]
LOGITS = PartitionSpec(BATCH_AXES, VOCABULARY)
LOGIT_BYTES = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def token_losses(
    hidden_BLD: jax.Array,
    output_VD: jax.Array,
    targets_BL: jax.Array,
    chunk: int,
    entropies: bool,
    soft_cap: float | None = None,
    kept_gib: float = 0.0,
) -> tuple[jax.Array, jax.Array | None]:
    """The loss -log p(target) of every token and, if asked, the entropy of its prediction.

    The backward pass covers only tokens whose loss has a gradient: under selection, the selected ones. It recomputes
    their logits, unless those of all tokens fit into `kept_gib`. On a mesh, each device computes both passes for its
    own rows and its own part of the vocabulary.

    Args:
      hidden_BLD: [B, L, D] final hidden states.
      output_VD: [V, D] output embedding. Its gradient is summed in float32, even for hidden states in another dtype.
      targets_BL: [B, L] token ids.
      chunk: number of tokens per device whose logits exist at the same time.
      entropies: True to compute entropies. They pass no gradient.
      soft_cap: soft cap on the logits; None means no cap.
      kept_gib: GiB per device that logits may take between the forward and the backward pass.

    Returns:
      [B, L] float32 losses, and [B, L] float32 entropies or None, all in nats.
    """
    return _forward(hidden_BLD, output_VD, targets_BL, chunk, entropies, soft_cap, 0.0)[0]


def _vocabulary_axis() -> str | None:
    """The mesh axis that the vocabulary is sharded over, or None without a mesh."""
    return VOCABULARY if mesh_is_set() else None


def _forward(hidden_BLD, output_VD, targets_BL, chunk, entropies, soft_cap, kept_gib):
    options = {"chunk": chunk, "entropies": entropies, "soft_cap": soft_cap, "axis": _vocabulary_axis()}
    local = functools.partial(_local_losses, **options, kept_gib=kept_gib)
    on_devices = on_mesh(local, (ROWS, PartitionSpec(VOCABULARY), ROWS), (ROWS, ROWS, ROWS, LOGITS))
    loss_BL, log_total_BL, entropy_BL, logits_TV = on_devices(
        hidden_BLD, output_VD.astype(hidden_BLD.dtype), targets_BL
    )
    return (loss_BL, entropy_BL), (hidden_BLD, output_VD, targets_BL, log_total_BL, logits_TV)


def _backward(chunk, _entropies, soft_cap, _kept_gib, kept, gradients):
    gradient_BL, _ = gradients
    hidden_BLD, output_VD, *others = kept
    local = functools.partial(_local_gradients, chunk=chunk, soft_cap=soft_cap, axis=_vocabulary_axis())
    in_specs = (ROWS, PartitionSpec(VOCABULARY), ROWS, ROWS, LOGITS, ROWS)
    on_devices = on_mesh(local, in_specs, (ROWS, PartitionSpec(VOCABULARY, WIDTH)))
    hidden_gradient_BLD, output_gradient_VD = on_devices(
        hidden_BLD, output_VD.astype(hidden_BLD.dtype), *others, gradient_BL
    )
    return hidden_gradient_BLD.astype(hidden_BLD.dtype), output_gradient_VD.astype(output_VD.dtype), None


token_losses.defvjp(_forward, _backward)


def _logits(hidden_cD: jax.Array, output_vD: jax.Array, soft_cap: float | None) -> jax.Array:
    logits_cv = jnp.einsum("cD,vD->cv", hidden_cD, output_vD, preferred_element_type=jnp.float32)
    return structure.soft_cap(logits_cv, soft_cap)


def _local_targets(targets: jax.Array, output_vD: jax.Array, axis: str | None) -> jax.Array:
    """Targets as indices into this device's part of the vocabulary. Targets in another device's part are out of range.

    `axis` here and below is the mesh axis of the vocabulary, or None without a mesh.
    """
    return targets if axis is None else targets - jax.lax.axis_index(axis) * output_vD.shape[0]


def _local_losses(hidden_BLD, output_vD, targets_BL, *, chunk, entropies, soft_cap, axis, kept_gib):
    """Losses, logarithms of the softmax denominators, entropies or None, [B, L] each; kept logits [T, v] or None."""
    T, D = targets_BL.size, hidden_BLD.shape[-1]
    chunk = min(chunk, T)
    padding = -T % chunk
    keep = (T + padding) * output_vD.shape[0] * LOGIT_BYTES <= kept_gib * 2**30
    hidden_ncD = jnp.pad(hidden_BLD.reshape(T, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_nc = jnp.pad(_local_targets(targets_BL.ravel(), output_vD, axis), (0, padding)).reshape(-1, chunk)

    def chunk_losses(part):
        hidden_cD, targets_c = part
        logits_cv = _logits(hidden_cD, output_vD, soft_cap)
        largest_c = logits_cv.max(axis=-1)
        if axis is not None:
            largest_c = jax.lax.pmax(largest_c, axis)
        total_c = jnp.exp(logits_cv - largest_c[:, None]).sum(axis=-1)
        target_logit_c = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=-1, mode="fill", fill_value=0)[:, 0]
        # A negative index would count from the end.
        target_logit_c = jnp.where(targets_c < 0, 0, target_logit_c)
        if axis is not None:
            total_c, target_logit_c = jax.lax.psum((total_c, target_logit_c), axis)
        log_total_c = largest_c + jnp.log(total_c)
        entropy_c = None
        if entropies:
            below_cv = logits_cv - largest_c[:, None]
            weighted_c = (jnp.exp(below_cv) * below_cv).sum(axis=-1)
            if axis is not None:
                weighted_c = jax.lax.psum(weighted_c, axis)
            entropy_c = jnp.log(total_c) - weighted_c / total_c
        return (log_total_c - target_logit_c, log_total_c, entropy_c), logits_cv if keep else None

    chunks, logits_ncv = jax.lax.map(chunk_losses, (hidden_ncD, targets_nc))
    logits_Tv = None if logits_ncv is None else logits_ncv.reshape(T + padding, -1)
    return *jax.tree.map(lambda x_nc: x_nc.ravel()[:T].reshape(targets_BL.shape), chunks), logits_Tv


def _local_gradients(hidden_BLD, output_vD, targets_BL, log_total_BL, logits_Tv, gradient_BL, *, chunk, soft_cap, axis):
    """Gradients of sum(gradient_BL * losses) with respect to hidden states and output embedding, in float32."""
    T, D = targets_BL.size, hidden_BLD.shape[-1]
    chunk = min(chunk, T)
    size = -(-T // chunk) * chunk
    hidden_TD, log_total_T, gradient_T = hidden_BLD.reshape(T, D), log_total_BL.ravel(), gradient_BL.ravel()
    targets_T = _local_targets(jnp.ravel(targets_BL), output_vD, axis)
    # The tokens that have a gradient come first, in their order; index T marks the empty places after them.
    matters_T = gradient_T != 0
    rank_T = jnp.where(matters_T, jnp.cumsum(matters_T) - 1, size)
    order_T = jnp.full(size, T).at[rank_T].set(jnp.arange(T), mode="drop")

    def add_chunk(n, sums):
        hidden_gradient_TD, output_gradient_vD = sums
        order_c = jax.lax.dynamic_slice_in_dim(order_T, n * chunk, chunk)

        def chosen(x_T: jax.Array) -> jax.Array:
            return x_T.at[order_c].get(mode="fill", fill_value=0)

        hidden_cD, weight_c, log_total_c, targets_c = map(chosen, (hidden_TD, gradient_T, log_total_T, targets_T))
        logits_cv = _logits(hidden_cD, output_vD, soft_cap) if logits_Tv is None else chosen(logits_Tv)
        weighted_cv = jnp.exp(logits_cv - log_total_c[:, None]) * weight_c[:, None]
        is_target_cv = jnp.arange(output_vD.shape[0]) == targets_c[:, None]
        by_logits_cv = jnp.where(is_target_cv, weighted_cv - weight_c[:, None], weighted_cv)
        if soft_cap is not None:
            by_logits_cv *= 1 - (logits_cv / soft_cap) ** 2  # the derivative of the cap
        by_logits_cv = by_logits_cv.astype(hidden_cD.dtype)
        by_hidden_cD = jnp.einsum("cv,vD->cD", by_logits_cv, output_vD, preferred_element_type=jnp.float32)
        output_gradient_vD += jnp.einsum("cv,cD->vD", by_logits_cv, hidden_cD, preferred_element_type=jnp.float32)
        return (
            jax.lax.dynamic_update_slice_in_dim(hidden_gradient_TD, by_hidden_cD, n * chunk, axis=0),
            output_gradient_vD,
        )

    zeros = jnp.zeros((size, D), jnp.float32), jnp.zeros(output_vD.shape, jnp.float32)
    hidden_gradient_TD, output_gradient_vD = jax.lax.fori_loop(0, -(-matters_T.sum() // chunk), add_chunk, zeros)
    if axis is not None:
        hidden_gradient_TD = jax.lax.psum(hidden_gradient_TD, axis)
        output_gradient_vD = jax.lax.psum(output_gradient_vD, "data")
        output_gradient_vD = jax.lax.psum_scatter(output_gradient_vD, WIDTH, scatter_dimension=1, tiled=True)
    hidden_gradient_TD = hidden_gradient_TD.at[rank_T].get(mode="fill", fill_value=0)
    return hidden_gradient_TD.reshape(hidden_BLD.shape), output_gradient_vD
