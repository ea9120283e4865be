"""Which checkpoints of a run are kept: the newest, every K-th step, and the best. Which one that is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import ml_collections
from orbax.checkpoint import checkpoint_managers as policies

from rho1_jax.runtime.command_line import parse_named
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.description import Description

LOWER_IS_BETTER = {"loss": True, "accuracy": False}


def goodness(metric: str, value: float) -> float:
    """A value of eval/NAME/loss or eval/NAME/accuracy, with the sign changed if lower is better."""
    return -value if LOWER_IS_BETTER[metric.rpartition("/")[2]] else value


def check_retention(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if no evaluation gives the metric of `config.checkpoint.best`, or if `patience` lacks one."""
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
    if settings.patience and not settings.best:
        raise UserError(
            f"config.checkpoint.patience={settings.patience} needs config.checkpoint.best, the metric that has to "
            f"improve: {', '.join(metrics) or 'no evaluation of config.eval gives one'}"
        )


def best_step(descriptions: Sequence[Description], named: str) -> int:
    """The step of a run's best checkpoint, by the config.checkpoint.best of the last one.

    Args:
      descriptions: those of all checkpoints of the run.
      named: what named the best checkpoint, for errors.

    Raises:
      UserError: the run has no such metric, or no checkpoint has a finite value of it.
    """
    metric = descriptions[-1].meta.config["checkpoint"]["best"]
    if not metric:
        raise UserError(f"{named}: the run was trained without config.checkpoint.best; name one of its checkpoints")
    step = _best(metric, {x.meta.step: x.metrics[metric] for x in descriptions if metric in x.metrics})
    if step is None:
        raise UserError(f"{named}: no checkpoint of the run has a finite {metric}; name one of its checkpoints")
    return step


def _best(metric: str, values: Mapping[int, float]) -> int | None:
    """The step with the best finite value, and the newest of equal ones; None if no value is finite."""
    finite = [step for step, value in values.items() if math.isfinite(value)]
    return max(finite, key=lambda step: (goodness(metric, values[step]), step), default=None)


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
        best = _best(self.metric, {x.step: self.values[x.step] for x in checkpoints if x.step in self.values})
        return [info.step == best for info in checkpoints]


def retention_policy(keep: int, keep_every: int, best: KeepBest | None) -> policies.PreservationPolicy:
    """Keeps every checkpoint that any of the three keys of config.checkpoint asks for."""
    chosen: list[policies.PreservationPolicy] = [policies.LatestN(keep or None)]
    if keep_every:
        chosen.append(policies.EveryNSteps(keep_every))
    if best:
        chosen.append(best)
    return policies.AnyPreservationPolicy(chosen)
