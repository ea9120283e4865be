"""Which checkpoints are kept."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config_of

from rho1_jax.configs import default
from rho1_jax.evals.evaluator import Evaluator
from rho1_jax.runtime import stopping
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.runtime.stopping import Stopped
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint
from rho1_jax.training.checkpoint import Checkpoints, Meta
from rho1_jax.training.config import as_saved
from rho1_jax.training.health import Health
from rho1_jax.training.retention import check_retention
from rho1_jax.training.state import TrainState

LOSS, ACCURACY = "eval/clean/loss", "eval/sums/accuracy"


def save(workdir, steps, metrics=lambda step: {}, **retention):
    checkpoints = Checkpoints(workdir, **retention)
    for step in steps:
        state = TrainState(jnp.int32(step), {"w": jnp.full(3, float(step))}, {"count": jnp.int32(step)})
        meta = Meta(step, 0, 0, as_saved(default.get_config()), [], "t", None)
        checkpoints.save(state, meta, metrics(step))
    checkpoints.close()
    return checkpoint.steps(workdir)


def test_the_last_ones_are_kept(tmp_path):
    assert save(tmp_path / "two", range(1, 6), keep=2) == [4, 5]
    assert save(tmp_path / "all", range(1, 6), keep=0) == [1, 2, 3, 4, 5]
    assert save(tmp_path / "all", [6], keep=1) == [6]


def test_every_kth_step_is_kept_as_well(tmp_path):
    assert save(tmp_path, range(1, 8), keep=2, keep_every=3) == [3, 6, 7]


@pytest.mark.parametrize(
    ("best", "values", "kept"),
    [
        (LOSS, [3.0, 1.0, 2.0, 4.0, 5.0], [2, 5]),
        (ACCURACY, [0.1, 0.2, 0.5, 0.3, 0.5], [5]),  # of two equal ones, the newest
        (ACCURACY, [0.9, 0.2, 0.5, 0.3, 0.5], [1, 5]),
        (LOSS, [3.0, float("nan"), 2.0, float("inf"), 5.0], [3, 5]),
        (LOSS, [3.0, None, None, None, None], [1, 5]),  # steps without an evaluation
    ],
)
def test_the_best_one_is_kept_as_well(tmp_path, best, values, kept):
    def metrics(step):
        return {} if values[step - 1] is None else {best: values[step - 1]}

    assert save(tmp_path, range(1, 6), metrics, keep=1, best=best) == kept


def test_the_best_one_is_known_after_a_restart(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        kept = save(tmp_path, [step], lambda _, loss=loss: {LOSS: loss}, keep=1, best=LOSS, keep_every=3)
    assert kept == [2, 3, 4]
    stored = json.loads((checkpoint.at(tmp_path, 2) / "meta" / "metadata").read_text())
    assert stored["metrics"] == {LOSS: 1.0}


def test_damaged_checkpoints_are_not_counted_and_never_deleted(tmp_path):
    save(tmp_path, range(1, 4), lambda step: {LOSS: float(step == 3)}, keep=2, best=LOSS)
    (checkpoint.at(tmp_path, 3) / "meta" / "metadata").write_text("{")
    (tmp_path / "checkpoints" / "1.damaged").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2, best=LOSS)
    abstract = TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, {"count": jnp.int32(0)})
    state, meta = checkpoints.newest(abstract, lambda meta: None)
    assert meta.step == 2 and np.array_equal(state.params["w"], np.full(3, 2.0))
    for step in (4, 5):
        checkpoints.save(state, meta._replace(step=step), {LOSS: 9.0})
    checkpoints.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"1.damaged", "2", "3.damaged", "4", "5"}  # 2 has the lowest loss


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "best",
            "loss",
            "config.checkpoint.best='loss' is not one of the metrics .*: eval/held_out/loss, eval/gsm8k/acc",
        ),
        ("best", "eval/held_out/accuracy", "is not one of the metrics"),
    ],
)
def test_values_that_are_not_allowed_are_refused(key, value, message):
    config = config_of("clm", "data")
    config.eval.tasks = "gsm8k"
    config.checkpoint[key] = value
    with pytest.raises(UserError, match=message):
        check_retention(config)


def test_metrics_of_the_config_can_be_best():
    config = config_of("clm", "data")
    config.eval.update(tasks="gsm8k", questions="sums=FILE")
    for best in ("", "eval/held_out/loss", "eval/gsm8k/accuracy", "eval/sums/accuracy"):
        config.checkpoint.best = best
        check_retention(config)


def test_a_run_keeps_its_best_checkpoint(data, tmp_path):
    config = config_of("clm", data)
    config.steps = 6
    config.optimizer.learning_rate = 3.0  # the loss rises
    config.eval.every = config.checkpoint.every = 2
    config.checkpoint.update(keep=1, best="eval/held_out/loss")
    train_model(config, tmp_path)
    losses = {
        line["step"]: line["eval/held_out/loss"]
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "eval/held_out/loss" in line
    }
    best = min(losses, key=losses.get)
    assert losses.keys() == {2, 4, 6} and checkpoint.steps(tmp_path) == sorted({best, 6})
    config.checkpoint.best = "eval/other/loss"
    with pytest.raises(UserError, match=r"config\.checkpoint\.best='eval/other/loss' is not one of"):
        train_model(config, tmp_path)


def test_the_best_checkpoint_is_opened_by_name(tmp_path):
    config = as_saved(default.get_config())
    config["checkpoint"]["best"] = LOSS
    values = [3.0, 1.0, 1.0, float("nan"), 4.0]
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, {"count": jnp.int32(0)})
    checkpoints = Checkpoints(tmp_path / "run", keep=0)
    for step, loss in enumerate(values, start=1):
        checkpoints.save(state, Meta(step, 0, 0, config, [], "t", None), {LOSS: loss})
    checkpoints.close()
    assert checkpoint.find(tmp_path / "run", "--checkpoint").name == "5"
    best = checkpoint.find(tmp_path / "run" / "best", "--checkpoint")
    assert best == checkpoint.at(tmp_path / "run", 3)  # of two equal ones, the newest
    (tmp_path / "best").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "best")  # a run that has this name itself
    shutil.move(tmp_path / "best" / "run" / "checkpoints", tmp_path / "best")
    assert checkpoint.find(tmp_path / "best", "--checkpoint").name == "5"


def test_a_run_without_a_best_checkpoint_says_so(tmp_path):
    save(tmp_path, [1], keep=1)
    with pytest.raises(UserError, match="--checkpoint=.*/best: the run was trained without config.checkpoint.best; na"):
        checkpoint.find(tmp_path / "best", "--checkpoint")
    with pytest.raises(UserError, match="nowhere/best is neither a run"):
        checkpoint.find(tmp_path / "nowhere" / "best", "--checkpoint")


def evaluated(*values, metric=LOSS):
    health = Health()
    for step, value in enumerate(values, start=1):
        health = health.after_evaluation(step, metric, value)
    return health


def test_evaluations_without_a_better_value_are_counted():
    assert evaluated(3.0, 2.0, 2.5, 2.0)[-4:] == (LOSS, 2.0, 2, 2)  # an equal value is not better
    assert evaluated(0.1, 0.3, 0.2, metric=ACCURACY)[-4:] == (ACCURACY, 0.3, 2, 1)
    assert evaluated(float("nan"), float("inf")).stagnation() == f"{LOSS} has not improved in 2 evaluations"
    assert (
        evaluated(float("nan"), 5.0, 6.0).stagnation() == f"{LOSS} has not improved in 1 evaluations since 5 at step 2"
    )
    assert evaluated(3.0, 4.0).after_evaluation(3, ACCURACY, 0.0)[-4:] == (ACCURACY, 0.0, 3, 0)
    assert evaluated(3.0, 4.0).after({"loss": 1.0, "skipped": 0.0})[-4:] == (LOSS, 3.0, 1, 1)  # kept between them


def impatient(data):
    """A run that is evaluated every second step, and ends after two evaluations that are not better."""
    config = config_of("clm", data)
    config.update(steps=20, log_every=1)
    config.eval.every, config.checkpoint.every = 2, 4
    config.checkpoint.update(keep=1, best="eval/held_out/loss", patience=2)
    return config


def test_a_run_ends_when_its_patience_is_spent_and_stays_ended(data, tmp_path, monkeypatch, capsys):
    values = iter([2.0, 1.0, 1.5, 1.2, 0.5, 0.6])
    monkeypatch.setattr(Evaluator, "__call__", lambda self, params: {"eval/held_out/loss": next(values)})
    config = impatient(data)
    params = jax.device_get(train_model(config, tmp_path / "run"))
    message = "ended early, at step 8 of 20: eval/held_out/loss has not improved in 2 evaluations since 1 at step 4"
    assert message in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "run") == [4, 8]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))
    assert checkpoint.find(tmp_path / "run" / "best", "--checkpoint").name == "4"
    again = jax.device_get(train_model(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert message in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "run") == [4, 8]
    # More patience trains on: 0.5 at step 10 is better, 0.6 at step 12 is not.
    config.update(steps=12)
    config.checkpoint.patience = 3
    train_model(config, tmp_path / "run")
    assert checkpoint.find(tmp_path / "run", "--checkpoint").name == "12"


def test_the_step_that_spends_the_patience_is_saved(data, tmp_path, monkeypatch):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda self, params: {"eval/held_out/loss": next(values)})
    train_model(impatient(data), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [4, 6]


def test_an_interrupted_run_ends_at_the_same_step(data, tmp_path, monkeypatch):
    """Stopped before the evaluation that decides, which the resumed run makes."""
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda self, params: {"eval/held_out/loss": next(values)})
    votes = iter([False] * 5 + [True])
    monkeypatch.setattr(stopping, "vote", lambda: functools.partial(bool, next(votes)))
    with pytest.raises(Stopped, match="stopped after step 6 of 20"):
        train_model(impatient(data), tmp_path / "run")
    assert checkpoint.load_meta(checkpoint.find(tmp_path / "run", "x")).pending
    monkeypatch.setattr(stopping, "vote", lambda: lambda: False)
    train_model(impatient(data), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run")[-1] == 6
    meta = checkpoint.load_meta(checkpoint.find(tmp_path / "run", "x"))
    assert meta.pending is None and meta.health["evaluations_since_best"] == 2
    train_model(impatient(data), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run")[-1] == 6


def test_patience_needs_a_metric(data):
    config = config_of("clm", data)
    config.checkpoint.patience = 3
    with pytest.raises(
        UserError, match=r"config.checkpoint.patience=3 needs config.checkpoint.best, .*: eval/held_out/"
    ):
        check_retention(config)
