"""Causal grouped-query attention within documents: one function, a kernel for each kind of device.

Shapes: B batch rows, L queries, S keys, H query heads, K key/value heads, G query heads per key/value head, C head
width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import BATCH_AXES, on_mesh

ATTENTION = ("auto", "xla", "splash", "cudnn")
# Which kernel "auto" takes on which devices, for rows whose length the kernel can divide.
KERNELS = {"tpu": ("splash", 128), "gpu": ("cudnn", 64)}
XLA_BLOCK = 64  # queries whose logits exist at once, in short rows
XLA_BLOCKS = 8  # at most this many blocks, in long rows
SPLASH_BLOCK = 512  # queries and keys, at most


def attention(
    q_BLHC: jax.Array,
    k_BLKC: jax.Array,
    v_BLKC: jax.Array,
    segments_BL: jax.Array,
    *,
    sliding_window: int | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention with scale 1 / sqrt(C), the softmax in float32, to earlier keys of the same segment and itself.

    Args:
      q_BLHC: [B, L, H, C] queries.
      k_BLKC: [B, L, K, C] keys; K divides H.
      v_BLKC: [B, L, K, C] values.
      segments_BL: [B, L] segment ids.
      sliding_window: how many keys, itself included, a query sees at most; None means all.
      kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto": by the devices at hand.

    Returns:
      [B, L, H, C] in the dtype of the queries.

    Raises:
      UserError: the kernel cannot take rows of this length.
    """
    L = q_BLHC.shape[1]
    if kernel == "auto":
        kernel, multiple = KERNELS.get(jax.default_backend(), ("xla", 1))
        kernel = "xla" if L % multiple else kernel
    row_kernels = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
    return row_kernels[kernel](q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window)


def cached_attention(q_BHC: jax.Array, k_BKCS: jax.Array, v_BKSC: jax.Array, visible_BS: jax.Array) -> jax.Array:
    """The same, of one query a row, to those of S cached keys that it sees. Keys lie as the product reads them.

    Args:
      q_BHC: [B, H, C] queries.
      k_BKCS: [B, K, C, S] keys; K divides H.
      v_BKSC: [B, K, S, C] values.
      visible_BS: [B, S] which keys each query sees, one at least.

    Returns:
      [B, H, C] in the dtype of the queries.
    """
    B, H, C = q_BHC.shape
    q_BKGC = q_BHC.reshape(B, k_BKCS.shape[1], -1, C)
    logits_BKGS = jnp.einsum("BKGC,BKCS->BKGS", q_BKGC * C**-0.5, k_BKCS, preferred_element_type=jnp.float32)
    weights_BKGS = jax.nn.softmax(logits_BKGS, where=visible_BS[:, None, None])
    mixed_BKGC = jnp.einsum("BKGS,BKSC->BKGC", weights_BKGS.astype(v_BKSC.dtype), v_BKSC)
    return mixed_BKGC.reshape(B, H, C)


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


def _attend(q_BLHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BLS: jax.Array) -> jax.Array:
    """The G query heads of a key/value head are stacked along the sequence, so that each of the two products is one
    batched matrix multiplication, which XLA runs well on CPU too."""
    B, L, H, C = q_BLHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    q_BKXC = q_BLHC.reshape(B, L, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, C)
    k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
    logits_BKXS = jnp.einsum("BKXC,BKSC->BKXS", q_BKXC * C**-0.5, k_BKSC, preferred_element_type=jnp.float32)
    mask_B1XS = jnp.broadcast_to(mask_BLS[:, None, None], (B, 1, G, L, S)).reshape(B, 1, G * L, S)
    # A query that sees no key is padding; a finite floor keeps its softmax, and its gradient, from being NaN.
    logits_BKXS = jnp.where(mask_B1XS, logits_BKXS, jnp.finfo(jnp.float32).min)
    largest_BKX1 = jax.lax.stop_gradient(logits_BKXS.max(axis=-1, keepdims=True))
    weights_BKXS = jnp.exp(logits_BKXS - largest_BKX1)
    total_BKX1 = weights_BKXS.sum(axis=-1, keepdims=True)
    mixed_BKXC = jnp.einsum(
        "BKXS,BKSC->BKXC", weights_BKXS.astype(v_BSKC.dtype), v_BKSC, preferred_element_type=jnp.float32
    )
    mixed_BKXC = (mixed_BKXC / total_BKX1).astype(q_BLHC.dtype)
    return mixed_BKXC.reshape(B, K, G, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def _xla(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window):
    """Block after block of queries, each against the keys it can see; the backward pass makes its logits again."""
    L = q_BLHC.shape[1]
    size = max(XLA_BLOCK, -(-L // XLA_BLOCKS))
    mixed = []
    for start in range(0, L, size):
        stop = min(start + size, L)
        first = 0 if sliding_window is None else max(0, start + 1 - sliding_window)

        @jax.checkpoint
        def block(q_BlHC, k_BSKC, v_BSKC, query_segments_Bl, key_segments_BS, first_query=start - first):
            mask_BlS = attention_mask(query_segments_Bl, key_segments_BS, first_query, sliding_window)
            return _attend(q_BlHC, k_BSKC, v_BSKC, mask_BlS)

        queries, keys = slice(start, stop), slice(first, stop)
        mixed.append(
            block(q_BLHC[:, queries], k_BLKC[:, keys], v_BLKC[:, keys], segments_BL[:, queries], segments_BL[:, keys])
        )
    return jnp.concatenate(mixed, axis=1)


def _splash(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window):
    """Splash attention, a Pallas kernel that skips blocks no query sees. Each device has its own rows and heads."""
    L, C = q_BLHC.shape[1], q_BLHC.shape[3]
    block = next((size for size in (SPLASH_BLOCK, 256, 128) if L % size == 0), None)
    if block is None:
        raise UserError(f"config.model.attention='splash' needs rows of a multiple of 128 tokens, not {L}; take 'xla'")
    sizes = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # Without a window, that of a whole row.
    head_mask = splash_mask.LocalMask((L, L), window_size=((sliding_window or L) - 1, 0), offset=0)

    def on_device(q_BLhC, k_BLkC, v_BLkC, segments_BL):
        masks = splash_mask.MultiHeadMask([head_mask] * q_BLhC.shape[2])
        kernel = splash_kernel.make_splash_mha_single_device(masks, block_sizes=sizes)
        heads_first = [x.swapaxes(1, 2) for x in (q_BLhC * C**-0.5, k_BLkC, v_BLkC)]
        segments = splash_kernel.SegmentIds(segments_BL, segments_BL)
        return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)

    heads, rows = PartitionSpec(BATCH_AXES, None, "tensor"), PartitionSpec(BATCH_AXES)
    return on_mesh(on_device, (heads, heads, heads, rows), heads)(q_BLHC, k_BLKC, v_BLKC, segments_BL)


def _cudnn(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window):
    """cuDNN's fused attention, through JAX."""
    return jax.nn.dot_product_attention(
        q_BLHC,
        k_BLKC,
        v_BLKC,
        mask=(segments_BL[:, :, None] == segments_BL[:, None, :])[:, None],
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )
