"""Per-token cross-entropy, a stretch of the sequence at a time.

Shapes: B batch rows, L sequence, D model width, V vocabulary, c positions of one chunk.
"""

import jax
import jax.numpy as jnp


def _chunk_loss(hidden_BcD: jax.Array, targets_Bc: jax.Array, output_VD: jax.Array) -> jax.Array:
    logits_BcV = jnp.einsum("BcD,VD->BcV", hidden_BcD, output_VD, preferred_element_type=jnp.float32)
    target_logit_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BcV, axis=-1) - target_logit_Bc


def token_losses(hidden_BLD: jax.Array, output_VD: jax.Array, targets_BL: jax.Array, chunk: int) -> jax.Array:
    """-log p(target) of every token.

    Args:
      hidden_BLD: [B, L, D] final hidden states.
      output_VD: [V, D] output embedding, in the dtype of the hidden states.
      targets_BL: [B, L] token ids.
      chunk: positions whose logits exist at once; below L, logits are made again in the backward pass.

    Returns:
      [B, L] float32 losses in nats.
    """
    B, L, D = hidden_BLD.shape
    if chunk >= L:
        return _chunk_loss(hidden_BLD, targets_BL, output_VD)
    chunks = -(-L // chunk)
    padding = chunks * chunk - L
    hidden_nBcD = jnp.pad(hidden_BLD, ((0, 0), (0, padding), (0, 0))).reshape(B, chunks, chunk, D).swapaxes(0, 1)
    targets_nBc = jnp.pad(targets_BL, ((0, 0), (0, padding))).reshape(B, chunks, chunk).swapaxes(0, 1)
    chunk_loss = jax.checkpoint(_chunk_loss)
    losses_nBc = jax.lax.map(lambda chunk: chunk_loss(*chunk, output_VD), (hidden_nBcD, targets_nBc))
    return losses_nBc.swapaxes(0, 1).reshape(B, chunks * chunk)[:, :L]
