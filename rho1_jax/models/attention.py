"""Causal grouped-query attention within documents: one function, with a kernel for each kind of device.

Shapes: B batch rows, L queries, S keys, H query heads, K key/value heads, G query heads per key/value head, C head
width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from rho1_jax.models import structure
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.sharding import HEADS, ROWS, on_mesh

ATTENTION = ("auto", "xla", "splash", "cudnn")
# Platform -> the kernel that "auto" selects there, and the multiple that row lengths must be.
KERNELS = {"tpu": ("splash", 128), "gpu": ("cudnn", 128)}
XLA_BLOCK = 64  # queries whose logits exist at once, in short rows
XLA_BLOCKS = 8  # maximum number of blocks, in long rows
SPLASH_BLOCK = 512  # maximum number of queries and of keys in a block
CUDNN_BLOCK = 512  # queries whose mask exists at once
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's name for cuDNN's forward kernel


def attention(
    q_BLHC: jax.Array,
    k_BLKC: jax.Array,
    v_BLKC: jax.Array,
    segments_BL: jax.Array,
    *,
    sliding_window: int | None = None,
    kernel: str = "auto",
    query_scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Softmax attention of each token to itself and to earlier tokens of its segment. The softmax is in float32.

    Args:
      q_BLHC: [B, L, H, C] queries.
      k_BLKC: [B, L, K, C] keys; K divides H.
      v_BLKC: [B, L, K, C] values.
      segments_BL: [B, L] segment ids.
      sliding_window: maximum number of keys a query sees, itself included; None means all.
      kernel: "xla", "splash" (TPU), "cudnn" (NVIDIA GPU), or "auto": the kernel of the platform if it can compute
        these rows, and "xla" if it cannot.
      query_scale: factor on the queries; None means 1 / sqrt(C).
      soft_cap: soft cap on the logits; None means no cap.

    Returns:
      [B, L, H, C] in the dtype of the queries.

    Raises:
      UserError: the kernel cannot compute rows of this length, dtype or head width, or has no soft cap.
    """
    L = q_BLHC.shape[1]
    if kernel == "auto":
        kernel, multiple = KERNELS.get(jax.default_backend(), ("xla", 1))
        no_cudnn = kernel == "cudnn" and (not _compute_capability() or _cudnn_refusal(q_BLHC, soft_cap))
        kernel = "xla" if L % multiple or no_cudnn else kernel
    row_kernels = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
    return row_kernels[kernel](q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window, query_scale, soft_cap)


def cached_attention(
    q_BHC: jax.Array,
    k_BKCS: jax.Array,
    v_BKSC: jax.Array,
    visible_BS: jax.Array,
    query_scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of one query per row to the visible ones of S cached keys, which are stored in the product's layout.

    Args:
      q_BHC: [B, H, C] queries.
      k_BKCS: [B, K, C, S] keys; K divides H.
      v_BKSC: [B, K, S, C] values.
      visible_BS: [B, S] bool, which keys each query sees, at least one.
      query_scale: as in `attention`.
      soft_cap: as in `attention`.

    Returns:
      [B, H, C] in the dtype of the queries.
    """
    B, H, C = q_BHC.shape
    q_BKGC = q_BHC.reshape(B, k_BKCS.shape[1], -1, C)
    scale = C**-0.5 if query_scale is None else query_scale
    logits_BKGS = jnp.einsum("BKGC,BKCS->BKGS", q_BKGC * scale, k_BKCS, preferred_element_type=jnp.float32)
    weights_BKGS = jax.nn.softmax(structure.soft_cap(logits_BKGS, soft_cap), where=visible_BS[:, None, None])
    mixed_BKGC = jnp.einsum("BKGS,BKSC->BKGC", weights_BKGS.astype(v_BKSC.dtype), v_BKSC)
    return mixed_BKGC.reshape(B, H, C)


def attention_mask(
    query_segments_BL: jax.Array,
    key_segments_BS: jax.Array,
    first_query: jax.Array | int,
    sliding_window: int | None,
) -> jax.Array:
    """Marks the keys each query sees: those of its own segment, up to its own position, and within the window.

    Args:
      query_segments_BL: [B, L] segment ids of the queries.
      key_segments_BS: [B, S] segment ids of the keys.
      first_query: index, among the S keys, of the first query.
      sliding_window: maximum number of keys a query sees, itself included; None means all.

    Returns:
      [B, L, S] bool.
    """
    queries_L = first_query + jnp.arange(query_segments_BL.shape[1])
    distance_LS = queries_L[:, None] - jnp.arange(key_segments_BS.shape[1])[None, :]
    near_LS = distance_LS >= 0
    if sliding_window is not None:
        near_LS &= distance_LS < sliding_window
    return (query_segments_BL[:, :, None] == key_segments_BS[:, None, :]) & near_LS


def _attend(q_BLHC, k_BSKC, v_BSKC, mask_BLS, query_scale, soft_cap) -> jax.Array:
    """Attention with an explicit mask.

    Stacking the G query heads of a key/value head along the sequence makes each of the two products one batched matrix
    multiplication, which XLA runs well on CPU too.
    """
    B, L, H, C = q_BLHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    q_BKXC = q_BLHC.reshape(B, L, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, C)
    k_BKSC, v_BKSC = k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
    scale = C**-0.5 if query_scale is None else query_scale
    logits_BKXS = jnp.einsum("BKXC,BKSC->BKXS", q_BKXC * scale, k_BKSC, preferred_element_type=jnp.float32)
    logits_BKXS = structure.soft_cap(logits_BKXS, soft_cap)
    mask_B1XS = jnp.broadcast_to(mask_BLS[:, None, None], (B, 1, G, L, S)).reshape(B, 1, G * L, S)
    # A query that sees no key is padding. The finite floor keeps its softmax and its gradient free of NaN.
    logits_BKXS = jnp.where(mask_B1XS, logits_BKXS, jnp.finfo(jnp.float32).min)
    largest_BKX1 = jax.lax.stop_gradient(logits_BKXS.max(axis=-1, keepdims=True))
    weights_BKXS = jnp.exp(logits_BKXS - largest_BKX1)
    total_BKX1 = weights_BKXS.sum(axis=-1, keepdims=True)
    mixed_BKXC = jnp.einsum(
        "BKXS,BKSC->BKXC", weights_BKXS.astype(v_BSKC.dtype), v_BKSC, preferred_element_type=jnp.float32
    )
    mixed_BKXC = (mixed_BKXC / total_BKX1).astype(q_BLHC.dtype)
    return mixed_BKXC.reshape(B, K, G, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def _in_blocks(
    attend: Callable, size: int, q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window, key_multiple=1
) -> jax.Array:
    """Calls `attend` for one block of queries after another, each with the keys it can see.

    Args:
      attend: called with queries [B, l, H, C], keys and values [B, S, K, C], the segments of the queries [B, l] and of
        the keys [B, S], and the index, among the S keys, of the first query. Returns [B, l, H, C].
      size: number of queries in a block.
      q_BLHC: as in `attention`, like the arrays after it and the window.
      key_multiple: the index of each block's first key is a multiple of this.
    """
    L = q_BLHC.shape[1]
    mixed = []
    for start in range(0, L, size):
        stop = min(start + size, L)
        first = 0 if sliding_window is None else max(0, start + 1 - sliding_window) // key_multiple * key_multiple
        queries, keys = slice(start, stop), slice(first, stop)
        segments = segments_BL[:, queries], segments_BL[:, keys]
        mixed.append(attend(q_BLHC[:, queries], k_BLKC[:, keys], v_BLKC[:, keys], *segments, start - first))
    return jnp.concatenate(mixed, axis=1)


def _xla(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window, query_scale, soft_cap):
    """XLA's matrix multiplications, in blocks of queries. The backward pass recomputes their logits."""

    @partial(jax.checkpoint, static_argnums=5)
    def attend(q_BlHC, k_BSKC, v_BSKC, query_segments_Bl, key_segments_BS, first_query):
        mask_BlS = attention_mask(query_segments_Bl, key_segments_BS, first_query, sliding_window)
        return _attend(q_BlHC, k_BSKC, v_BSKC, mask_BlS, query_scale, soft_cap)

    size = max(XLA_BLOCK, -(-q_BLHC.shape[1] // XLA_BLOCKS))
    return _in_blocks(attend, size, q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window)


def _splash(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window, query_scale, soft_cap):
    """Splash attention, a Pallas kernel that skips blocks no query sees, on each device's own rows and heads."""
    L, C = q_BLHC.shape[1], q_BLHC.shape[3]
    block = next((size for size in (SPLASH_BLOCK, 256, 128) if L % size == 0), None)
    if block is None:
        raise UserError(f"attention kernel 'splash' needs rows of a multiple of 128 tokens, not {L}; use 'xla'")
    sizes = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    scale = C**-0.5 if query_scale is None else query_scale
    # Without a window, the mask is as wide as a row.
    head_mask = splash_mask.LocalMask((L, L), window_size=((sliding_window or L) - 1, 0), offset=0)

    def on_device(q_BLhC, k_BLkC, v_BLkC, segments_BL):
        masks = splash_mask.MultiHeadMask([head_mask] * q_BLhC.shape[2])
        kernel = splash_kernel.make_splash_mha_single_device(masks, block_sizes=sizes, attn_logits_soft_cap=soft_cap)
        heads_first = [x.swapaxes(1, 2) for x in (q_BLhC * scale, k_BLkC, v_BLkC)]
        segments = splash_kernel.SegmentIds(segments_BL, segments_BL)
        return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)

    return on_mesh(on_device, (HEADS, HEADS, HEADS, ROWS), HEADS)(q_BLHC, k_BLKC, v_BLKC, segments_BL)


def _cudnn(q_BLHC, k_BLKC, v_BLKC, segments_BL, sliding_window, query_scale, soft_cap):
    """cuDNN's fused attention, through JAX, in blocks of queries on each device's own rows and heads.

    cuDNN keeps the logits on the chip but reads the mask from memory, so it gets the mask of one block at a time. The
    backward pass rebuilds the masks; it does not run the forward kernel again.

    cuDNN's layout for packed rows needs no mask. It also needs Hopper or newer, and softmax statistics as long as the
    row for every document that a row could hold; and JAX 0.10 gives it wrong offsets for grouped heads.
    """
    if (refusal := _cudnn_refusal(q_BLHC, soft_cap)) is not None:
        raise UserError(f"attention kernel 'cudnn' {refusal}; use 'xla'")

    @partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD)
    def attend(q_BlhC, k_BSkC, v_BSkC, query_segments_Bl, key_segments_BS, first_query):
        mask_BlS = attention_mask(query_segments_Bl, key_segments_BS, first_query, sliding_window)
        return jax.nn.dot_product_attention(
            q_BlhC, k_BSkC, v_BSkC, mask=mask_BlS[:, None], scale=query_scale, implementation="cudnn"
        )

    def attend_alone(*arrays):
        # Without the barrier, XLA may build the masks of all blocks before the loop over layers, and keep them.
        return attend(*jax.lax.optimization_barrier(arrays))

    def on_device(q_BLhC, k_BLkC, v_BLkC, segments_BL):
        multiple = KERNELS["gpu"][1]  # of keys, too: before 9.15.1, cuDNN could access memory out of bounds at others
        return _in_blocks(attend_alone, CUDNN_BLOCK, q_BLhC, k_BLkC, v_BLkC, segments_BL, sliding_window, multiple)

    return on_mesh(on_device, (HEADS, HEADS, HEADS, ROWS), HEADS)(q_BLHC, k_BLKC, v_BLKC, segments_BL)


def _cudnn_refusal(q_BLHC: jax.Array, soft_cap: float | None) -> str | None:
    """What keeps cuDNN from computing attention of these queries, as the end of a sentence; None if nothing does."""
    _, L, _, C = q_BLHC.shape
    capability = _compute_capability()
    multiple, widest = KERNELS["gpu"][1], 256 if 9 <= capability < 10 else 128
    if 0 < capability < 8:
        return f"needs a GPU of compute capability 8.0 or newer, not {capability}"
    if soft_cap is not None:
        return f"cannot compute a soft cap ({soft_cap:g})"
    if L % multiple:
        return f"needs rows of a multiple of {multiple} tokens, not {L}"
    if q_BLHC.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs config.model.compute_dtype=bfloat16 or float16, not {q_BLHC.dtype}"
    if C % 8 or widest < C:
        return f"needs a head width that is a multiple of 8, at most {widest} on this device, not {C}"
    return None


def _compute_capability() -> float:
    """Compute capability of the devices, such as 8.9; 0 if they are not NVIDIA GPUs."""
    name = getattr(jax.devices()[0], "compute_capability", "")
    return float(name) if name[:1].isdigit() else 0.0
