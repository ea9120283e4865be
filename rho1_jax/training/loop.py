"""The loop of a training run: steps, and what is logged and saved along the way."""

import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from rho1_jax.data.packing import Batch
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.models.decoder import Params
from rho1_jax.runtime import stopping
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import replacing
from rho1_jax.runtime.metrics import MetricsWriter
from rho1_jax.runtime.processes import gather_json, is_first, say
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.stopping import Stopped
from rho1_jax.training import health
from rho1_jax.training.accounting import Ledger
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.health import Health
from rho1_jax.training.setup import RunSetup
from rho1_jax.training.state import TrainState

SKIPPED_DIR = "skipped"


class Step(Protocol):
    """A compiled train step, with the parameters of a frozen reference bound."""

    def __call__(self, state: TrainState, *, batch: Batch) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        """The next state, the metrics, and the weights [B, L]."""


class _Dispatched(NamedTuple):
    """A step that the devices are running: its number, its rows, and its results."""

    number: int
    batch: Batch
    metrics: dict[str, jax.Array]
    weight_BL: jax.Array


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
        self.health = Health(**meta.health) if meta.health else Health()
        self.is_failing = False  # too many steps in a row were skipped
        self.tokens_per_step = self.config.batch_size * seq_len
        self.writer = MetricsWriter(workdir, meta.step - bool(meta.pending)) if is_first() else None
        self.progress = Progress(workdir.name, self.config.steps, unit="steps", initial=meta.step)
        self.clock = time.monotonic()
        self.first_step = self.clock_step = self.saved_step = meta.step

    def run(self, state: TrainState, step: Step, batches: Iterator[Batch]) -> Params:
        """Steps from `self.meta.step` to the last, or until config.checkpoint.patience is spent.

        The metrics of a step are fetched while the next one runs.

        Raises:
          Stopped: the run was asked to stop, and is saved.
          UserError: too many steps in a row were skipped. The run and the rows of the last one are saved.
        """
        try:
            with self.progress:
                state = self.steps(state, step, batches)
        finally:
            self.checkpoints.close()
            if self.writer:
                self.writer.close()
        return state.params

    def steps(self, state: TrainState, step: Step, batches: Iterator[Batch]) -> TrainState:
        """Runs the steps. Returns the last state."""
        config, waiting = self.config, None
        if self.meta.pending:
            self.evaluate_pending(state, self.meta.pending)
        for number in range(self.meta.step + 1, config.steps + 1):
            if self.is_out_of_patience():
                say(f"ended early, at step {self.meta.step} of {config.steps}: {self.health.stagnation()}")
                break
            if number == config.trace.first:
                jax.profiler.start_trace(str(self.workdir / "trace"))
            vote = stopping.vote()
            batch = next(batches)
            state, metrics, weight_BL = step(state, batch=batch)
            stopping.save_on_stop(config.checkpoint.grace_seconds)
            if waiting:
                self.log(waiting.number, self.count(waiting), {})
            waiting = _Dispatched(number, batch, metrics, weight_BL)
            if config.trace.first and number == min(config.trace.last, config.steps):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            stop = vote() or multihost_utils.reached_preemption_sync_point(number)
            evaluate = self.is_evaluated(number)
            save = number == config.steps or number % config.checkpoint.every == 0
            if stop or evaluate or save or self.is_failing:
                # The metrics of a checkpoint's step reach metrics.jsonl before the checkpoint is written.
                done, waiting = waiting, None
                line = self.count(done)
                stop = stop or self.is_failing  # as of this step: one that is finite ends a row of skipped ones
                evaluations: dict[str, float] = {}
                if not evaluate:
                    self.log(number, line, {})
                else:
                    self.meta = self.meta._replace(pending=line)
                    if not stop:
                        evaluations = self.evaluate_pending(state, line)
                        save = save or self.is_out_of_patience()
                if stop or save:
                    self.save(state, evaluations)
                if stop:
                    self.stop(done)
        return state

    def is_evaluated(self, number: int) -> bool:
        """True for a step that an evaluation follows."""
        return number == self.config.steps or number % self.config.eval.every == 0

    def evaluate_pending(self, state: TrainState, line: dict[str, float]) -> dict[str, float]:
        """Evaluates the last step, logs it, and returns the evaluations.

        If the run is asked to stop meanwhile, it saves the state, and the resumed run does the evaluation.

        Raises:
          Stopped: the run was asked to stop.
        """
        start = time.monotonic()
        try:
            evaluations = self.evaluator(state.params)
        except Stopped:
            self.save(state, {})
            raise self.stopped() from None
        self.clock += time.monotonic() - start  # the rate does not count evaluations
        if best := self.config.checkpoint.best:
            value = gather_json(evaluations[best])[0]  # graders have time limits: processes could differ
            self.health = self.health.after_evaluation(self.meta.step, best, value)
        self.meta = self.meta._replace(pending=None, health=self.health._asdict())
        self.log(self.meta.step, line, evaluations)
        if self.meta.step == self.saved_step:  # a run that was stopped before this evaluation
            self.checkpoints.add_evaluations(self.meta, evaluations)
        return evaluations

    def is_out_of_patience(self) -> bool:
        """True if config.checkpoint.best has not improved for config.checkpoint.patience evaluations."""
        settings, health = self.config.checkpoint, self.health
        return health.metric == settings.best and 0 < settings.patience <= health.evaluations_since_best

    def save(self, state: TrainState, evaluations: dict[str, float]) -> None:
        """Starts to save a checkpoint. The rate does not count the time until training can continue."""
        if self.meta.step == self.saved_step:
            return
        start = time.monotonic()
        self.checkpoints.save(state, self.meta, evaluations)
        self.saved_step = self.meta.step
        if self.writer:
            self.ledger.write(self.workdir, self.meta.tokens_seen, self.meta.tokens_selected)
        self.clock += time.monotonic() - start

    def count(self, done: _Dispatched) -> dict[str, float]:
        """Counts a step, and returns its metrics for the log, without evaluations."""
        metrics = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        selected = 0 if metrics["skipped"] else int(metrics["selected_count"])
        learning_rate: dict[str, float] = {}
        if done.number % self.config.log_every == 0 or self.is_evaluated(done.number):
            # Computed on a device, after the step that runs there: not for steps that are not logged.
            learning_rate["learning_rate"] = float(self.schedule(done.number - 1 - self.health.skipped_steps))
        if metrics["skipped"]:
            say(f"step {done.number} was skipped: {_shown(metrics)}; {health.advice(metrics, self.health)}")
        elif self.health.is_spike(metrics["loss"]):
            say(f"step {done.number}: the loss jumped to {metrics['loss']:.3f} from {self.health.loss_mean:.3f}")
        self.health = self.health.after(metrics)
        self.is_failing = bool(metrics["skipped"]) and self.health.skipped_in_a_row >= self.config.max_skipped_steps
        self.meta = self.meta._replace(
            step=done.number,
            tokens_seen=self.meta.tokens_seen + self.tokens_per_step,
            tokens_selected=self.meta.tokens_selected + selected,
            health=self.health._asdict(),
        )
        totals = {"tokens_seen": self.meta.tokens_seen, "tokens_selected": self.meta.tokens_selected}
        alarms = {"skipped_steps": self.health.skipped_steps, "loss_spikes": self.health.loss_spikes}
        shown = {name: value for name, value in metrics.items() if name not in ("selected_count", "skipped")}
        line = totals | shown | alarms | learning_rate
        return {name: value for name, value in line.items() if math.isfinite(value)}

    def log(self, number: int, line: dict[str, float], evaluations: dict[str, float]) -> None:
        """Shows a step, and writes its metrics if this step is logged."""
        note = " ".join([f"loss {line['loss']:.3f}" if "loss" in line else "skipped", *_notes(evaluations)])
        self.progress.advance_to(number, note)
        if self.writer and (evaluations or number % self.config.log_every == 0 or number == self.config.steps):
            self.writer.write(number, line | self.speed(number, line.get("selected_fraction", 0.0)) | evaluations)

    def speed(self, number: int, selected_fraction: float) -> dict[str, float]:
        """Tokens per second since the last call and, on a known chip, the share of its peak that training used."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        tokens = (number - self.clock_step) * self.tokens_per_step
        if self.clock_step > self.first_step:  # the first step compiles
            self.ledger.add_steps(tokens, seconds)
        self.clock_step = number
        mfu = self.ledger.mfu(tokens, selected_fraction * tokens, seconds)
        return {"tokens_per_second": tokens / seconds} | ({} if mfu is None else {"mfu": mfu})

    def stopped(self) -> Stopped:
        """Waits until the run is saved. Returns the exception to raise."""
        self.checkpoints.close()
        message = f"stopped after step {self.meta.step} of {self.config.steps}; the same command resumes there"
        return Stopped(message, self.config.checkpoint.stop_status)

    def stop(self, done: _Dispatched) -> None:
        """Ends a run that is saved, on request or because it fails. Then it also writes the rows of the last step."""
        if not self.is_failing:
            raise self.stopped()
        path = self.workdir / SKIPPED_DIR / f"step_{done.number}_process_{jax.process_index()}.npz"
        path.parent.mkdir(exist_ok=True)
        arrays = {**done.batch._asdict(), **done.batch.columns, "weight_BL": done.weight_BL}
        rows: dict[str, Any] = {name: _local(x) for name, x in arrays.items() if isinstance(x, jax.Array)}
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, **rows)
        metrics = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        raise UserError(
            f"the last {self.health.skipped_in_a_row} steps were skipped, up to step {done.number}: {_shown(metrics)}. "
            f"The rows of the last one are in {path}, and the state is in the checkpoint of that step; "
            f"{health.advice(metrics, self.health)}"
        )


def _local(array: jax.Array) -> np.ndarray:
    """The rows of an array [B, ...] that this process holds, in order."""
    shards = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return np.concatenate([shards[start] for start in sorted(shards)])


def _shown(metrics: dict[str, float]) -> str:
    names = ("loss", "reference_loss", "gradient_norm")
    return ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.3g}" for name in names if name in metrics)


def _notes(evaluations: dict[str, float]) -> list[str]:
    return [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in evaluations.items()]
