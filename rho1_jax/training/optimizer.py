"""AdamW with warm-up, decay and clipping by global norm; and references that follow the parameters."""

from typing import NamedTuple

import jax
import optax

from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.runtime.sharding import path_name

DECAYS = ("cosine", "linear")
MOVES = ("average", "snapshot")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine or a line down to a fraction of the peak at the last step."""
    peak, final = config.learning_rate, config.final_learning_rate_fraction
    warmup = round(config.warmup_fraction * steps)
    after = max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=final),
        "linear": optax.linear_schedule(peak, peak * final, after),
    }[config.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def _decayed(params):
    """Weight decay applies to matrices, neither to the scales of norms nor to biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith(("norm/scale", "_bias")), params
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps. Its state holds two trees of the parameters' shape."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
            mu_dtype=config.first_moment_dtype,
        ),
    )
    return _from_host(optimizer) if config.host_offload else optimizer


def _from_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, its state brought to the device for each update. The step says where it goes back to."""

    def update(updates, state, params=None):
        return optimizer.update(updates, jax.device_put(state, jax.memory.Space.Device), params)

    return optax.GradientTransformation(optimizer.init, update)


class MovingReference(NamedTuple):
    """A reference that follows the model in training, in float32 like it.

    Attributes:
      kind: "average", of the parameters over time, or "snapshot", the parameters of some steps ago.
      decay: of the average: what a step leaves of it.
      every: steps from one snapshot to the next.
    """

    kind: str
    decay: float
    every: int

    def move(self, reference, params, step: jax.Array):
        """The reference after `step` updates, the last of which gave `params`."""
        if self.kind == "average":
            return optax.incremental_update(params, reference, 1 - self.decay)
        return optax.periodic_update(params, reference, step, self.every)
