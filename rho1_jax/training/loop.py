"""The loop of a training run: steps, and what is logged and saved along the way."""

import math
import pathlib
import time
from collections.abc import Iterator
from typing import Protocol

import jax

from rho1_jax.data.packing import Batch
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models.decoder import Params
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import MetricsWriter
from rho1_jax.runtime.processes import is_first
from rho1_jax.runtime.progress import Progress
from rho1_jax.training.accounting import Ledger
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.setup import RunSetup
from rho1_jax.training.state import TrainState


class Step(Protocol):
    """A compiled train step, with the parameters of a frozen reference bound."""

    def __call__(self, state: TrainState, *, batch: Batch) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        """The next state, the metrics, and the weights [B, L]."""


class Loop:
    """The steps of a run, with what is logged and saved along the way."""

    def __init__(
        self,
        setup: RunSetup,
        workdir: pathlib.Path,
        meta: Meta,
        seq_len: int,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        ledger: Ledger,
    ):
        self.config, self.schedule, self.meta = setup.config, setup.schedule, meta
        self.workdir, self.evaluator, self.checkpoints, self.ledger = workdir, evaluator, checkpoints, ledger
        self.tokens_per_step = self.config.batch_size * seq_len
        self.writer = MetricsWriter(workdir, meta.step) if is_first() else None
        self.progress = Progress(workdir.name, self.config.steps, unit="steps", initial=meta.step)
        self.clock = time.monotonic()
        self.first_step = self.clock_step = meta.step

    def run(self, state: TrainState, step: Step, batches: Iterator[Batch]) -> Params:
        """Steps from `self.meta.step` to the last. The metrics of a step are fetched while the next one runs."""
        config, waiting = self.config, None
        with self.progress:
            for number in range(self.meta.step + 1, config.steps + 1):
                if number == config.trace.first:
                    jax.profiler.start_trace(str(self.workdir / "trace"))
                state, metrics, _ = step(state, batch=next(batches))
                if waiting:
                    self.record(*waiting, {})
                waiting = (number, metrics)
                if config.trace.first and number == min(config.trace.last, config.steps):
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                last = number == config.steps
                evaluate = last or number % config.eval.every == 0
                save = last or number % config.checkpoint.every == 0
                evaluations: dict[str, float] = {}
                if evaluate or save:
                    # The metrics of a checkpoint's step reach metrics.jsonl before the checkpoint is written.
                    evaluations = self.evaluate(state.params) if evaluate else {}
                    self.record(*waiting, evaluations)
                    waiting = None
                if save:
                    self.save(state, evaluations)
        self.checkpoints.close()
        if self.writer:
            self.writer.close()
        return state.params

    def evaluate(self, params: Params) -> dict[str, float]:
        """All evaluations. The rate does not count their time."""
        start = time.monotonic()
        metrics = self.evaluator(params)
        self.clock += time.monotonic() - start
        return metrics

    def save(self, state: TrainState, evaluations: dict[str, float]) -> None:
        """Starts to save a checkpoint. The rate does not count the time until training can continue."""
        start = time.monotonic()
        self.checkpoints.save(state, self.meta, evaluations)
        if self.writer:
            self.ledger.write(self.workdir, self.meta.tokens_seen, self.meta.tokens_selected)
        self.clock += time.monotonic() - start

    def record(self, number: int, device_metrics: dict[str, jax.Array], evaluations: dict[str, float]) -> None:
        """Counts a step's tokens, and writes its metrics if the step is one of those that are logged."""
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
            raise UserError(
                f"step {number}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; no checkpoint was "
                "written since. Try a lower config.optimizer.learning_rate or a longer warm-up"
            )
        self.meta = self.meta._replace(
            step=number,
            tokens_seen=self.meta.tokens_seen + self.tokens_per_step,
            tokens_selected=self.meta.tokens_selected + int(metrics.pop("selected_count")),
        )
        note = " ".join([f"loss {metrics['loss']:.3f}", *(f"{k[5:]} {v:.3f}" for k, v in evaluations.items())])
        self.progress.advance_to(number, note)
        if self.writer and (evaluations or number % self.config.log_every == 0 or number == self.config.steps):
            totals = {"tokens_seen": self.meta.tokens_seen, "tokens_selected": self.meta.tokens_selected}
            schedule = {"learning_rate": float(self.schedule(number - 1))}
            speed = self.speed(number, metrics["selected_fraction"])
            self.writer.write(number, totals | metrics | schedule | speed | evaluations)

    def speed(self, number: int, selected_fraction: float) -> dict[str, float]:
        """Tokens per second since the last call and, on a known chip, the share of its peak that training used."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        tokens = (number - self.clock_step) * self.tokens_per_step
        if self.clock_step > self.first_step:  # the first step compiles
            self.ledger.add_steps(tokens, seconds)
        self.clock_step = number
        mfu = self.ledger.mfu(tokens, selected_fraction * tokens, seconds)
        return {"tokens_per_second": tokens / seconds} | ({} if mfu is None else {"mfu": mfu})
