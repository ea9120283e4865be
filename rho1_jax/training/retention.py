"""Which checkpoints of a run are kept: the newest, every K-th step, and the best."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from orbax.checkpoint import checkpoint_managers as policies

from rho1_jax.runtime.command_line import parse_named
from rho1_jax.runtime.errors import UserError

LOWER_IS_BETTER = {"loss": True, "accuracy": False}


def check_retention(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if no evaluation gives the metric of `config.checkpoint.best`."""
    settings, evaluation = config.checkpoint, config.eval
    tasks = [name for name in evaluation.tasks.split(",") if name]
    questions = parse_named(evaluation.questions, "config.eval.questions")
    metrics = [f"eval/{name}/loss" for name in parse_named(evaluation.data, "config.eval.data")]
    metrics += [f"eval/{name}/accuracy" for name in (*tasks, *questions)]
    if settings.best and settings.best not in metrics:
        raise UserError(
            f"config.checkpoint.best={settings.best!r} is not one of the metrics that config.eval gives: "
            f"{', '.join(metrics) or 'none'}"
        )


class _Scored(NamedTuple):
    """A checkpoint as `BestN` expects it."""

    metrics: float | None


@dataclasses.dataclass
class KeepBest(policies.PreservationPolicy):
    """Keeps the checkpoint with the best value of a metric, and the newest of equal ones.

    Attributes:
      metric: its name, which ends in a key of LOWER_IS_BETTER.
      values: its value at each step that was evaluated.
    """

    metric: str
    values: dict[int, float]

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        """True for the best checkpoint. Orbax calls it."""
        values = [self.values.get(info.step, math.nan) for info in checkpoints]
        scored = [_Scored(value if math.isfinite(value) else None) for value in values]
        best = policies.BestN(
            get_metric_fn=lambda value: value,
            reverse=LOWER_IS_BETTER[self.metric.rpartition("/")[2]],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return best.should_preserve(scored, context=context)


def retention_policy(keep: int, keep_every: int, best: KeepBest | None) -> policies.PreservationPolicy:
    """Keeps every checkpoint that any of the three keys of config.checkpoint asks for."""
    chosen: list[policies.PreservationPolicy] = [policies.LatestN(keep or None)]
    if keep_every:
        chosen.append(policies.EveryNSteps(keep_every))
    if best:
        chosen.append(best)
    return policies.AnyPreservationPolicy(chosen)
