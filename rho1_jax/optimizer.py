"""AdamW with warm-up, cosine decay and clipping by global norm."""

import dataclasses

import jax
import optax

from rho1_jax.sharding import path_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Field for field the `optimizer` section of a config."""

    learning_rate: float
    warmup_steps: int
    final_learning_rate_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine down to a fraction of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def _decayed(params):
    """Weight decay applies to matrices, not to the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).endswith("norm/scale"), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps. Its state holds two trees of the parameters' shape."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )
