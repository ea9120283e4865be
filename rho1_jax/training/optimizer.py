"""AdamW with warm-up, decay and clipping by global norm."""

import jax
import optax

from rho1_jax.configs.default import OptimizerConfig
from rho1_jax.models.decoder import Params
from rho1_jax.runtime.sharding import path_name

DECAYS = ("cosine", "linear")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine or linear decay to a fraction of the peak, where it stays.

    The decay ends after `config.schedule_steps` updates; if that is 0, after `steps`.
    """
    steps = config.schedule_steps or steps
    peak, final = config.learning_rate, config.final_learning_rate_fraction
    warmup = round(config.warmup_fraction * steps)
    after = max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=final),
        "linear": optax.linear_schedule(peak, peak * final, after),
    }[config.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def _decayed(params: Params) -> Params:
    """True for matrices, which decay; False for biases and the scales of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith(("norm/scale", "norm/bias", "_bias")), params
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW under a learning rate schedule. Its state holds two trees shaped like the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
            mu_dtype=config.first_moment_dtype,
        ),
    )
