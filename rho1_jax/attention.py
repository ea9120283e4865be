"""Causal grouped-query attention within documents.

Shapes: B batch rows, L queries, S keys, H query heads, K key/value heads, G query heads per key/value head, C head
width.
"""

import jax
import jax.numpy as jnp


def attention_mask(
    query_segments_BL: jax.Array,
    key_segments_BS: jax.Array,
    first_query: jax.Array | int,
    sliding_window: int | None,
) -> jax.Array:
    """Which keys each query sees: those of its own segment, not after it, and within the window.

    Args:
      query_segments_BL: [B, L] segment ids of the queries.
      key_segments_BS: [B, S] segment ids of the keys.
      first_query: index, among the S keys, of the first query.
      sliding_window: how many keys, itself included, a query sees at most; None means all.

    Returns:
      [B, L, S] bool.
    """
    queries_L = first_query + jnp.arange(query_segments_BL.shape[1])
    distance_LS = queries_L[:, None] - jnp.arange(key_segments_BS.shape[1])[None, :]
    near_LS = distance_LS >= 0
    if sliding_window is not None:
        near_LS &= distance_LS < sliding_window
    return (query_segments_BL[:, :, None] == key_segments_BS[:, None, :]) & near_LS


def attention(q_BLHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BLS: jax.Array) -> jax.Array:
    """Softmax attention with scale 1 / sqrt(C); the softmax is in float32.

    The G query heads of a key/value head are stacked along the sequence, so that each of the two products is one
    batched matrix multiplication, which XLA runs well on CPU too.

    Returns:
      [B, L, H, C] in the dtype of the queries.
    """
    B, L, H, C = q_BLHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    q_BKXC = q_BLHC.reshape(B, L, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, C)
    k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
    logits_BKXS = jnp.einsum("BKXC,BKSC->BKXS", q_BKXC * C**-0.5, k_BKSC, preferred_element_type=jnp.float32)
    mask_B1XS = jnp.broadcast_to(mask_BLS[:, None, None], (B, 1, G, L, S)).reshape(B, 1, G * L, S)
    # A query that sees no key is padding; a finite floor keeps its softmax, and its gradient, from being NaN.
    logits_BKXS = jnp.where(mask_B1XS, logits_BKXS, jnp.finfo(jnp.float32).min)
    weights_BKXS = jax.nn.softmax(logits_BKXS, axis=-1).astype(v_BSKC.dtype)
    mixed_BKXC = jnp.einsum("BKXS,BKSC->BKXC", weights_BKXS, v_BKSC)
    return mixed_BKXC.reshape(B, K, G, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)
