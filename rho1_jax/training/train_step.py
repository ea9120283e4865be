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

from rho1_jax.data.packing import Batch
from rho1_jax.method import selection
from rho1_jax.method.selection import Selection
from rho1_jax.method.token_scores import REFERENCE_SIGNALS, Signals
from rho1_jax.models.decoder import Params
from rho1_jax.models.forward import Rows, row_losses, rows_of
from rho1_jax.training.optimizer import MovingReference
from rho1_jax.training.state import TrainState


class _Tokens(NamedTuple):
    """What the step knows of each of its tokens: [B, L] each, or None."""

    rows: Rows
    signals: Signals
    weight: jax.Array | None = None


def make_train_step(
    policy: nnx.GraphDef,
    reference: nnx.GraphDef | None,
    optimizer: optax.GradientTransformation,
    *,
    rule: Selection,
    steps: int,
    microbatches: int,
    document_mask: bool,
    seed: int,
    moving: MovingReference | None = None,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict, jax.Array]]:
    """The train step: (state, params of a frozen reference, batch) -> (next state, metrics, weights [B, L]).

    Args:
      policy: structure of the model in training.
      reference: structure of the reference model; None where the rule needs none, or where the batches bring its
        losses.
      optimizer: applied to the gradient of the selected tokens' mean loss.
      rule: what is trained on.
      steps: of the whole run, over which the rule's schedule goes.
      microbatches: M parts that the rows are taken in, one after the other. The update does not depend on M, except
        by the scope "microbatch". With M > 1 the scope "global" costs a second forward pass.
      document_mask: attention stays within documents, positions restart at each.
      seed: of the random score.
      moving: how the reference follows the policy; None where it is frozen.
    """
    needs = rule.needs
    needs_reference = bool(needs & REFERENCE_SIGNALS)
    select_ahead = rule.ranks and rule.scope == "global" and microbatches > 1

    def split(x_BL: jax.Array) -> jax.Array:
        # Row r goes to microbatch r mod M: every device, which holds consecutive rows, has its share of each.
        return x_BL.reshape(-1, microbatches, *x_BL.shape[1:]).swapaxes(0, 1)

    def join(x_MbL: jax.Array) -> jax.Array:
        return x_MbL.swapaxes(0, 1).reshape(-1, *x_MbL.shape[2:])

    def policy_losses(params: Params, tokens: _Tokens):
        return row_losses(policy, params, tokens.rows, entropies="policy_entropy_BL" in needs)

    def weigh(step: jax.Array, policy_loss_BL: jax.Array, policy_entropy_BL: jax.Array | None, tokens: _Tokens):
        signals = tokens.signals._replace(policy_loss_BL=policy_loss_BL, policy_entropy_BL=policy_entropy_BL)
        with jax.named_scope("selection"):
            return rule.weights(signals, tokens.rows.eligible, step, steps)

    def selected_loss(params: Params, step: jax.Array, tokens: _Tokens):
        policy_loss_bL, policy_entropy_bL = policy_losses(params, tokens)
        weight_bL = tokens.weight
        if weight_bL is None:
            weight_bL = weigh(step, policy_loss_bL, policy_entropy_bL, tokens)
        return jnp.where(weight_bL > 0, weight_bL * policy_loss_bL, 0).sum(), (policy_loss_bL, weight_bL)

    def add_reference(params: Params | None, tokens: _Tokens) -> _Tokens:
        assert reference is not None and params is not None
        entropies = "reference_entropy_BL" in needs
        loss_MbL, entropy_MbL = jax.lax.map(lambda part: row_losses(reference, params, part, entropies), tokens.rows)
        signals = tokens.signals._replace(reference_loss_BL=loss_MbL, reference_entropy_BL=entropy_MbL)
        return tokens._replace(signals=signals)

    def train_step(state: TrainState, reference_params: Params | None, batch: Batch):
        tokens = _Tokens(
            rows_of(batch, document_mask),
            Signals(
                reference_loss_BL=batch.reference_losses,
                reference_entropy_BL=batch.reference_entropies,
                external_BL=batch.external,
            ),
        )
        if "random_BL" in needs:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            noise_BL = jax.random.uniform(key, tokens.rows.targets.shape)
            tokens = tokens._replace(signals=tokens.signals._replace(random_BL=noise_BL))
        tokens = jax.tree.map(split, tokens)
        if needs_reference and batch.reference_losses is None:
            tokens = add_reference(reference_params if moving is None else state.reference, tokens)
        if select_ahead:
            ahead = jax.lax.map(lambda part: policy_losses(state.params, part), tokens)
            loss_BL, entropy_BL = jax.tree.map(join, ahead)
            weight_BL = weigh(state.step, loss_BL, entropy_BL, jax.tree.map(join, tokens))
            tokens = tokens._replace(weight=split(weight_BL))

        def accumulate(gradient: Params, part: _Tokens):
            grad = jax.value_and_grad(selected_loss, has_aux=True)
            (_, outcome), part_gradient = grad(state.params, state.step, part)
            return jax.tree.map(jnp.add, gradient, part_gradient), outcome

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        gradient, (policy_loss_MbL, weight_MbL) = jax.lax.scan(accumulate, zeros, tokens)
        weight_sum = selection.total(weight_MbL)
        gradient = jax.tree.map(lambda g: g / jnp.where(weight_sum > 0, weight_sum, 1), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _metrics(policy_loss_MbL, weight_MbL, tokens) | {"gradient_norm": optax.tree.norm(gradient)}
        next_reference = moving.move(state.reference, params, state.step + 1) if moving else None
        return TrainState(state.step + 1, params, opt_state, next_reference), metrics, join(weight_MbL)

    return train_step


def _metrics(policy_loss: jax.Array, weight: jax.Array, tokens: _Tokens) -> dict[str, jax.Array]:
    """Means over the step's tokens, in nats; `loss` and the reference's are over all eligible ones."""
    eligible_count = selection.total(tokens.rows.eligible)
    weight_sum = selection.total(weight)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(tokens.rows.eligible, values, 0).sum() / jnp.maximum(eligible_count, 1)

    metrics = {
        "loss": mean(policy_loss),
        "selected_loss": jnp.where(weight > 0, weight * policy_loss, 0).sum()
        / jnp.where(weight_sum > 0, weight_sum, 1),
        "selected_fraction": weight_sum / jnp.maximum(eligible_count, 1),
        "selected_count": selection.total(weight > 0),
    }
    if tokens.signals.reference_loss_BL is not None:
        metrics["reference_loss"] = mean(tokens.signals.reference_loss_BL)
        metrics["mean_excess"] = metrics["loss"] - metrics["reference_loss"]
    return metrics
