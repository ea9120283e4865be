"""Signs that a run is in trouble: skipped steps, jumps of the loss, and evaluations that do not improve."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rho1_jax.training.retention import goodness

MEMORY = 50  # steps that the running mean of the loss looks back
SPIKE_DEVIATIONS = 6.0


class Health(NamedTuple):
    """Counts and averages over the steps of a run. Checkpoints store them, so a resumed run continues them.

    Attributes:
      skipped_steps: steps without an update, because their loss, gradient or a signal was not finite.
      skipped_in_a_row: skipped steps since the last update.
      loss_spikes: steps whose loss was SPIKE_DEVIATIONS standard deviations above the running mean.
      loss_mean: running mean of the loss, in nats.
      loss_variance: running variance of the loss.
      steps: number of steps in the mean and the variance.
      metric: the metric of config.checkpoint.best at the last evaluation; "": none.
      best: its best finite value so far; None if there was none.
      best_step: the step of that value.
      evaluations_since_best: evaluations after it.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_spikes: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    steps: int = 0
    metric: str = ""
    best: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0

    def after(self, metrics: Mapping[str, float]) -> "Health":
        """The health after a step with these metrics."""
        if metrics["skipped"]:
            return self._replace(skipped_steps=self.skipped_steps + 1, skipped_in_a_row=self.skipped_in_a_row + 1)
        loss = metrics["loss"]
        share = max(1 / (self.steps + 1), 1 / MEMORY)
        deviation = loss - self.loss_mean
        return self._replace(
            skipped_in_a_row=0,
            loss_spikes=self.loss_spikes + self.is_spike(loss),
            loss_mean=self.loss_mean + share * deviation,
            loss_variance=(1 - share) * (self.loss_variance + share * deviation**2),
            steps=self.steps + 1,
        )

    def after_evaluation(self, step: int, metric: str, value: float) -> "Health":
        """The health after an evaluation that gave a metric this value. A new metric starts from the beginning."""
        before = self if metric == self.metric else self._replace(metric=metric, best=None, evaluations_since_best=0)
        if math.isfinite(value) and (before.best is None or goodness(metric, value) > goodness(metric, before.best)):
            return before._replace(best=value, best_step=step, evaluations_since_best=0)
        return before._replace(evaluations_since_best=before.evaluations_since_best + 1)

    def stagnation(self) -> str:
        """Says for how long the metric has not improved."""
        since = "" if self.best is None else f" since {self.best:.4g} at step {self.best_step}"
        return f"{self.metric} has not improved in {self.evaluations_since_best} evaluations{since}"

    def is_spike(self, loss: float) -> bool:
        """True if a loss is far above those of the last steps."""
        return self.steps >= MEMORY and loss > self.loss_mean + SPIKE_DEVIATIONS * math.sqrt(self.loss_variance)


def advice(metrics: Mapping[str, float], health: Health) -> str:
    """Suggests what to try after a skipped step with these metrics."""
    if not math.isfinite(metrics.get("reference_loss", 0.0)):
        return "the reference's losses are not finite on these rows: check the rows and the reference"
    if health.steps == 0:
        return "no step of this run had a finite loss: check the starting weights, config.model and the data"
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return "a signal that selection reads is not finite on these rows: check config.data.external"
    return (
        "try a lower config.optimizer.learning_rate from an earlier checkpoint, or config.model.compute_dtype=float32"
    )
