"""One step of Selective Language Modeling, as one jitted function.

Reference forward, policy forward, score, select, masked mean, gradient, update (Rho-1, arXiv 2404.07965, section 2.2).

Shapes: B batch rows, L sequence, M microbatches, b = B / M rows of a microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rho1_jax.configs.default import BackwardConfig
from rho1_jax.data.packing import Batch
from rho1_jax.method import objectives, selection
from rho1_jax.method.selection import Selection
from rho1_jax.method.signals import POLICY_SIGNALS, RANDOM_SIGNAL, REFERENCE_SIGNALS, WEIGHT, Signals
from rho1_jax.models.decoder import Params, layer_count
from rho1_jax.models.few_tokens import Probe
from rho1_jax.models.forward import Rows, row_losses, rows_of
from rho1_jax.training.reference import MovingReference
from rho1_jax.training.state import TrainState

SLM_OBJECTIVE = "cross_entropy"
EXACT = BackwardConfig()
TINY = float(jnp.finfo(jnp.float32).tiny)

# (state, params of a frozen reference, batch) -> (next state, metrics, weights [B, L])
TrainStep = Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict[str, jax.Array], jax.Array]]


class _Tokens(NamedTuple):
    """The tokens of a step, their signals [B, L] and, once they are known, their weights [B, L]."""

    rows: Rows
    signals: Signals
    weight: jax.Array | None = None


def needed_signals(rule: Selection, objective: str) -> set[str]:
    """The signals that a step computes or reads."""
    return rule.needs | set(objectives.OBJECTIVES.needs(objective)) - {WEIGHT}


def make_train_step(
    policy: nnx.GraphDef,
    reference: nnx.GraphDef | None,
    optimizer: optax.GradientTransformation,
    *,
    rule: Selection,
    objective: str = SLM_OBJECTIVE,
    steps: int,
    microbatches: int,
    document_mask: bool,
    seed: int,
    moving: MovingReference | None = None,
    backward: BackwardConfig = EXACT,
) -> TrainStep:
    """Builds the train step.

    Args:
      policy: structure of the model in training.
      reference: structure of the reference model; None if no signal needs it, or if the batches carry its losses.
      optimizer: applied to the gradient of the objective.
      rule: gives each token its weight.
      objective: name of the objective, in `objectives.OBJECTIVES`.
      steps: steps of the whole run; the rule's schedule spans them.
      microbatches: M parts that the rows are processed in, one after the other. The update does not depend on M,
        except under the scope "microbatch" and in what `backward` leaves out. With M > 1, the scope "global" costs a
        second forward pass.
      document_mask: attention stays within documents, and positions restart at each.
      seed: seed of the random score, and of the tokens that `backward` draws.
      moving: how the reference follows the policy; None if it is frozen.
      backward: the tokens that the gradient is computed from.
    """
    needs = needed_signals(rule, objective)
    policy_entropies, reference_entropies = "policy_entropy_BL" in needs, "reference_entropy_BL" in needs
    is_slm = objective == SLM_OBJECTIVE  # its value is the metric `selected_loss`
    select_ahead = rule.ranks and rule.scope == "global" and microbatches > 1

    def split(x_BL: jax.Array) -> jax.Array:
        # Row r goes to microbatch r mod M, so every device, which holds consecutive rows, has its share of each.
        return x_BL.reshape(-1, microbatches, *x_BL.shape[1:]).swapaxes(0, 1)

    def join(x_MbL: jax.Array) -> jax.Array:
        return x_MbL.swapaxes(0, 1).reshape(-1, *x_MbL.shape[2:])

    def policy_signals(params: Params, tokens: _Tokens, probe: Probe | None = None) -> Signals:
        values = row_losses(policy, params, tokens.rows, policy_entropies, probe)
        return {name: value for name, value in zip(POLICY_SIGNALS, values) if value is not None}

    def reference_signals(params: Params | None, tokens: _Tokens) -> Signals:
        assert reference is not None and params is not None
        values = jax.lax.map(lambda rows: row_losses(reference, params, rows, reference_entropies), tokens.rows)
        return {name: value for name, value in zip(REFERENCE_SIGNALS, values) if value is not None}

    def weigh(signals: Signals, tokens: _Tokens, step: jax.Array) -> jax.Array:
        with jax.named_scope("selection"):
            return rule.weights(signals, tokens.rows.eligible, step, steps)

    def objective_sum(params: Params, energy_N2: jax.Array | None, step: jax.Array, tokens: _Tokens, part: jax.Array):
        probe = None
        if energy_N2 is not None:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed + 1), step), part)
            probe = Probe.of(backward, energy_N2, key)
        signals = {**tokens.signals, **policy_signals(params, tokens, probe)}
        weight_bL = weigh(signals, tokens, step) if tokens.weight is None else tokens.weight
        terms_bL = objectives.terms(objective, signals, weight_bL)
        return terms_bL.sum(), (signals["policy_loss_BL"], weight_bL, None if is_slm else terms_bL)

    def train_step(state: TrainState, reference_params: Params | None, batch: Batch):
        rows, signals = rows_of(batch, document_mask), dict(batch.columns)
        if RANDOM_SIGNAL in needs:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            signals[RANDOM_SIGNAL] = jax.random.uniform(key, rows.targets.shape)
        tokens = jax.tree.map(split, _Tokens(rows, signals))
        if needs & set(REFERENCE_SIGNALS) and "reference_loss_BL" not in signals:
            params = reference_params if moving is None else state.reference
            tokens = tokens._replace(signals={**tokens.signals, **reference_signals(params, tokens)})
        if select_ahead:
            ahead = jax.lax.map(lambda part: policy_signals(state.params, part), tokens)
            whole = jax.tree.map(join, tokens._replace(signals={**tokens.signals, **ahead}))
            tokens = tokens._replace(weight=split(weigh(whole.signals, whole, state.step)))

        # The "gradient" of these zeros reports what the backward pass left out of each layer.
        energy_N2 = jnp.zeros((layer_count(state.params), 2)) if backward.tokens < 1 else None

        def accumulate(sums: tuple[Params, jax.Array | None], part: tuple[_Tokens, jax.Array]):
            grad = jax.value_and_grad(objective_sum, argnums=(0, 1), has_aux=True)
            (_, outcome), gradients = grad(state.params, energy_N2, state.step, *part)
            return jax.tree.map(jnp.add, sums, gradients), outcome

        zeros = jax.tree.map(jnp.zeros_like, (state.params, energy_N2))
        parts = tokens, jnp.arange(microbatches)
        (gradient, energy_N2), (policy_loss_MbL, weight_MbL, terms_MbL) = jax.lax.scan(accumulate, zeros, parts)
        weight_sum = selection.total(weight_MbL)
        gradient = jax.tree.map(lambda g: g / jnp.where(weight_sum > 0, weight_sum, 1), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(gradient_norm) & _all_finite(tokens, policy_loss_MbL)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = _metrics(policy_loss_MbL, weight_MbL, tokens) | {"gradient_norm": gradient_norm, "skipped": ~finite}
        if energy_N2 is not None:
            metrics["backward_dropped"] = (energy_N2[:, 0] / jnp.maximum(energy_N2[:, 1], TINY)).max()
        if not is_slm:
            metrics["objective"] = terms_MbL.sum() / jnp.where(weight_sum > 0, weight_sum, 1)
        next_reference = None
        if moving is not None and state.reference is not None:
            next_reference = moving.move(state.reference, params, state.step + 1)
        return TrainState(state.step + 1, params, opt_state, next_reference), metrics, join(weight_MbL)

    return train_step


def _all_finite(tokens: _Tokens, policy_loss: jax.Array) -> jax.Array:
    """True if the policy's loss and every signal of every eligible token are finite."""
    signals = (policy_loss, *tokens.signals.values())
    return jnp.stack([jnp.isfinite(jnp.where(tokens.rows.eligible, x, 0)).all() for x in signals]).all()


def _metrics(policy_loss: jax.Array, weight: jax.Array, tokens: _Tokens) -> dict[str, jax.Array]:
    """Means over the step's tokens, in nats; `loss`, `reference_loss` and `mean_excess` are over the eligible ones."""
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
    if "reference_loss_BL" in tokens.signals:
        metrics["reference_loss"] = mean(tokens.signals["reference_loss_BL"])
        metrics["mean_excess"] = metrics["loss"] - metrics["reference_loss"]
    return metrics
