"""The forward pass over packed rows: per-token losses and entropies of a model.

Shapes: B batch rows, L sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rho1_jax.data.packing import Batch
from rho1_jax.method.selection import eligible_targets
from rho1_jax.models.decoder import Params
from rho1_jax.models.few_tokens import Probe
from rho1_jax.models.token_loss import token_losses


class Rows(NamedTuple):
    """Packed rows as a model reads them. All arrays are [B, L]."""

    inputs: jax.Array
    targets: jax.Array
    segment_ids: jax.Array  # of the inputs; attention stays within equal ones
    eligible: jax.Array  # bool: the target may be selected, and counts in means


def rows_of(batch: Batch, document_mask: bool) -> Rows:
    """Inputs and targets of packed rows. Without `document_mask`, attention crosses documents."""
    segment_ids_BL = batch.segment_ids[:, :-1]
    return Rows(
        inputs=batch.tokens[:, :-1],
        targets=batch.tokens[:, 1:],
        segment_ids=segment_ids_BL if document_mask else jnp.minimum(segment_ids_BL, 1),
        eligible=eligible_targets(batch.segment_ids, batch.responses),
    )


def row_losses(
    graphdef: nnx.GraphDef, params: Params, rows: Rows, entropies: bool = False, probe: Probe | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Losses [B, L] of the targets and, if `entropies`, entropies [B, L] of their predictions, in nats.

    With a probe, the backward pass goes through few tokens.
    """
    model = nnx.merge(graphdef, params)
    hidden_BLD = model(rows.inputs, rows.segment_ids, probe)
    config, soft_cap = model.config, model.structure.logit_soft_cap
    return token_losses(
        hidden_BLD, model.output_VD(), rows.targets, config.loss_chunk, entropies, soft_cap, config.logits_gib
    )


def make_token_losses(graphdef: nnx.GraphDef, document_mask: bool) -> Callable[[Params, Batch], tuple]:
    """Makes a function of (params, batch) that returns losses [B, L] in nats, and which are eligible [B, L], bool."""

    def batch_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = rows_of(batch, document_mask)
        return row_losses(graphdef, params, rows)[0], rows.eligible

    return batch_losses


def make_reference_signals(
    graphdef: nnx.GraphDef, document_mask: bool, entropies: bool
) -> Callable[[Params, Batch], tuple]:
    """Makes a function of (params, batch) that returns losses [B, L] and entropies [B, L] or None, in nats."""
    return lambda params, batch: row_losses(graphdef, params, rows_of(batch, document_mask), entropies)
