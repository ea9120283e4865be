"""One step of Selective Language Modeling, as one jitted function.

Reference forward, policy forward, score, select, masked mean, gradient, update (Rho-1, arXiv 2404.07965, section 2.2).

Shapes: B batch rows, L sequence, M microbatches, b = B / M rows of one microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rho1_jax import selection
from rho1_jax.data.packing import Batch
from rho1_jax.model import Params
from rho1_jax.token_loss import token_losses


class TrainState(NamedTuple):
    """What a step takes and gives: everything that training changes."""

    step: jax.Array  # updates done so far
    params: Params  # float32 master weights
    opt_state: optax.OptState


class _Tokens(NamedTuple):
    """What the step knows of each of its tokens: [B, L] each, or None."""

    inputs: jax.Array
    targets: jax.Array
    segment_ids: jax.Array
    eligible: jax.Array
    random: jax.Array | None = None
    reference_loss: jax.Array | None = None
    selected: jax.Array | None = None


def _tokens(batch: Batch, document_mask: bool) -> _Tokens:
    segment_ids_BL = batch.segment_ids[:, :-1]
    return _Tokens(
        inputs=batch.tokens[:, :-1],
        targets=batch.tokens[:, 1:],
        segment_ids=segment_ids_BL if document_mask else jnp.minimum(segment_ids_BL, 1),
        eligible=selection.eligible_targets(batch.segment_ids, batch.responses),
        reference_loss=batch.reference_losses,
    )


def _losses(graphdef: nnx.GraphDef, params: Params, tokens: _Tokens) -> jax.Array:
    model = nnx.merge(graphdef, params)
    hidden_BLD, _ = model(tokens.inputs, tokens.segment_ids)
    return token_losses(hidden_BLD, model.output_VD(), tokens.targets, model.config.loss_chunk)


def make_token_losses(graphdef: nnx.GraphDef, document_mask: bool) -> Callable[[Params, Batch], tuple]:
    """A function of (params, batch): losses [B, L] in nats, and which of them are eligible [B, L]."""

    def batch_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens = _tokens(batch, document_mask)
        return _losses(graphdef, params, tokens), tokens.eligible

    return batch_losses


def make_train_step(
    policy: nnx.GraphDef,
    reference: nnx.GraphDef | None,
    optimizer: optax.GradientTransformation,
    *,
    score: str,
    ratio: float,
    scope: str,
    microbatches: int,
    document_mask: bool,
    seed: int,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict, jax.Array]]:
    """The train step: (state, reference params, batch) -> (next state, metrics, selected [B, L]).

    Args:
      policy: structure of the model in training.
      reference: structure of the frozen model; None where the score needs none, or where the batches bring its losses.
      optimizer: applied to the gradient of the selected tokens' mean loss.
      score: a name in `selection.SCORES`.
      ratio: share of the eligible tokens to select.
      scope: tokens that compete with one another: those of the whole step ("global"), of a "microbatch" or of a
        "sequence".
      microbatches: M parts that the rows are taken in, one after the other. The update does not depend on M, except
        by the scope "microbatch". With M > 1 the scope "global" costs a second forward pass.
      document_mask: attention stays within documents, positions restart at each.
      seed: of the random score.
    """
    rule = selection.SCORES[score]
    select_ahead = rule.function is not None and scope == "global" and microbatches > 1

    def split(x_BL: jax.Array) -> jax.Array:
        # Row r goes to microbatch r mod M: every device, which holds consecutive rows, has its share of each.
        return x_BL.reshape(-1, microbatches, *x_BL.shape[1:]).swapaxes(0, 1)

    def join(x_MbL: jax.Array) -> jax.Array:
        return x_MbL.swapaxes(0, 1).reshape(-1, *x_MbL.shape[2:])

    def select(policy_loss_BL: jax.Array, tokens: _Tokens) -> jax.Array:
        if rule.function is None:
            return tokens.eligible
        score_BL = rule.function(selection.Signals(policy_loss_BL, tokens.reference_loss, tokens.random))
        with jax.named_scope("selection"):
            return selection.select(score_BL, tokens.eligible, ratio, scope)

    def selected_loss(params: Params, tokens: _Tokens):
        policy_loss_bL = _losses(policy, params, tokens)
        selected_bL = select(policy_loss_bL, tokens) if tokens.selected is None else tokens.selected
        return jnp.where(selected_bL, policy_loss_bL, 0).sum(), (policy_loss_bL, selected_bL)

    def train_step(state: TrainState, reference_params: Params | None, batch: Batch):
        tokens = _tokens(batch, document_mask)
        if rule.needs_random:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            tokens = tokens._replace(random=jax.random.uniform(key, tokens.targets.shape))
        tokens = jax.tree.map(split, tokens)
        if rule.needs_reference and tokens.reference_loss is None:
            assert reference is not None and reference_params is not None
            reference_loss_MbL = jax.lax.map(lambda part: _losses(reference, reference_params, part), tokens)
            tokens = tokens._replace(reference_loss=reference_loss_MbL)
        if select_ahead:
            policy_loss_MbL = jax.lax.map(lambda part: _losses(policy, state.params, part), tokens)
            selected_BL = select(join(policy_loss_MbL), jax.tree.map(join, tokens))
            tokens = tokens._replace(selected=split(selected_BL))

        def accumulate(gradient: Params, part: _Tokens):
            (_, outcome), part_gradient = jax.value_and_grad(selected_loss, has_aux=True)(state.params, part)
            return jax.tree.map(jnp.add, gradient, part_gradient), outcome

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        gradient, (policy_loss_MbL, selected_MbL) = jax.lax.scan(accumulate, zeros, tokens)
        count = jnp.maximum(selection.count(selected_MbL), 1)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = _metrics(policy_loss_MbL, selected_MbL, tokens) | {"gradient_norm": optax.tree.norm(gradient)}
        next_state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return next_state, metrics, join(selected_MbL)

    return train_step


def _metrics(policy_loss: jax.Array, selected: jax.Array, tokens: _Tokens) -> dict[str, jax.Array]:
    """Means over the step's tokens, in nats; `loss` and the reference's are over all eligible ones."""
    eligible_count = selection.count(tokens.eligible)
    selected_count = selection.count(selected)

    def mean(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1)

    metrics = {
        "loss": mean(policy_loss, tokens.eligible, eligible_count),
        "selected_loss": mean(policy_loss, selected, selected_count),
        "selected_fraction": selected_count / jnp.maximum(eligible_count, 1),
        "selected_count": selected_count,
    }
    if tokens.reference_loss is not None:
        metrics["reference_loss"] = mean(tokens.reference_loss, tokens.eligible, eligible_count)
        metrics["mean_excess"] = metrics["loss"] - metrics["reference_loss"]
    return metrics
