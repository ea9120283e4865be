"""The loop: it stops on request and resumes as if it had not, skips steps that are not finite, and counts spikes."""

import functools
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import STEPS, config_of

from rho1_jax import train
from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.runtime import stopping
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.runtime.stopping import Stopped
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint, setup
from rho1_jax.training.health import MEMORY, Health, advice
from rho1_jax.training.setup import check_resume


def lines_of(workdir):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(workdir)]


def newest(workdir):
    return checkpoint.load_meta(checkpoint.find(workdir, "workdir"))


@pytest.fixture(scope="module")
def undisturbed(data, reference, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    return workdir, jax.device_get(train_model(config_of("slm", data, reference), workdir))


@pytest.mark.parametrize("step", [3, 5, 8, 12])
def test_a_run_that_stops_after_a_step_resumes_as_if_it_had_not(
    step, data, reference, undisturbed, tmp_path, monkeypatch
):
    # The default evaluates steps 5, 10 and 12, and saves steps 4, 8 and 12.
    votes = iter([False] * (step - 1) + [True])
    monkeypatch.setattr(stopping, "check", lambda message: None)
    monkeypatch.setattr(stopping, "vote", lambda: functools.partial(bool, next(votes)))
    config = config_of("slm", data, reference)
    config.checkpoint.stop_status = 75
    with pytest.raises(Stopped, match=f"stopped after step {step} of {STEPS}; the same command") as stopped:
        train_model(config, tmp_path / "run")
    assert stopped.value.status == 75
    monkeypatch.undo()
    meta = newest(tmp_path / "run")
    assert meta.step == step and (meta.pending is not None) == (step in (5, 10, 12))
    params = jax.device_get(train_model(config_of("slm", data, reference), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[1])
    assert lines_of(tmp_path / "run") == lines_of(undisturbed[0])


def test_an_evaluation_that_is_stopped_is_done_by_the_resumed_run(data, reference, undisturbed, tmp_path, monkeypatch):
    def stop(message):
        raise Stopped(message)

    monkeypatch.setattr(stopping, "check", stop)
    with pytest.raises(Stopped, match="stopped after step 5 of 12"):
        train_model(config_of("slm", data, reference), tmp_path / "run")
    monkeypatch.undo()
    assert newest(tmp_path / "run").pending and [line["step"] for line in lines_of(tmp_path / "run")] == [2, 4]
    train_model(config_of("slm", data, reference), tmp_path / "run")
    assert repr(lines_of(tmp_path / "run")) == repr(lines_of(undisturbed[0]))  # counts are still integers


def poisoned(loaded, steps):
    """The batches of a run, with a NaN among the external numbers of these steps."""

    def batches(*arguments, first_step, **options):
        for number, batch in enumerate(loaded(*arguments, first_step=first_step, **options), start=first_step + 1):
            columns = {name: values.copy() for name, values in batch.columns.items()}
            if number in steps:
                columns["external_BL"][:, 5] = np.nan
            yield Batch(**batch._asdict() | {"columns": columns})

    return batches


@pytest.fixture
def external(data, tmp_path, monkeypatch):
    """Trains on tokens by a column of our own, which holds a NaN in the given steps."""
    rows = len(Store(data).rows("train"))
    np.save(tmp_path / "column.npy", np.random.default_rng(0).random((rows, 16), np.float32))
    config = config_of("slm", data)
    config.selection.score, config.data.external = "external", str(tmp_path / "column.npy")

    def run(name, steps, **changes):
        config.update(changes)
        with monkeypatch.context() as patch:
            patch.setattr(train, "batches", poisoned(train.batches, steps))
            return jax.device_get(train_model(config, tmp_path / name)), tmp_path / name

    return run


def test_a_step_with_a_signal_that_is_not_finite_is_skipped_and_counted(external, capsys):
    params, workdir = external("run", {6, 7})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    lines = {line["step"]: line for line in lines_of(workdir)}
    assert [lines[step]["skipped_steps"] for step in (5, 6, 8, 12)] == [0, 1, 2, 2]
    assert lines[8]["tokens_selected"] - lines[5]["tokens_selected"] == pytest.approx(
        lines[5]["tokens_selected"] / 5, rel=0.05
    )
    # The schedule waits for a skipped step.
    _, other = external("other", set())
    assert lines[12]["learning_rate"] == next(line for line in lines_of(other) if line["step"] == 10)["learning_rate"]
    output = capsys.readouterr().out
    assert "step 6 was skipped: loss" in output and "a signal that selection reads is not finite" in output


def test_a_run_whose_steps_are_all_skipped_stops_and_keeps_the_rows(external, tmp_path, capsys):
    with pytest.raises(UserError, match=r"the last 4 steps were skipped, up to step 8: .*step_8_process_0.npz"):
        external("run", range(5, 100), max_skipped_steps=3)
    meta = newest(tmp_path / "run")
    assert meta.step == 8 and meta.health["skipped_in_a_row"] == 4
    with np.load(tmp_path / "run/skipped/step_8_process_0.npz") as rows:
        assert rows["tokens"].shape == (8, 17) and np.isnan(rows["external_BL"][:, 5]).all()
    # It does not try three more steps: the count is part of the checkpoint.
    with pytest.raises(UserError, match="the last 6 steps were skipped, up to step 10"):
        external("run", range(5, 100), max_skipped_steps=3)
    # Once the rows are good again, it resumes.
    external("run", set(), max_skipped_steps=3)
    assert newest(tmp_path / "run").health["skipped_in_a_row"] == 0


def test_a_finite_step_ends_a_row_of_skipped_ones_even_as_the_limit_is_reached(external):
    # The fourth step of the row is on its way when the third one is known to be skipped.
    _, workdir = external("run", {5, 6, 7}, max_skipped_steps=3)
    assert newest(workdir).step == STEPS and newest(workdir).health["skipped_in_a_row"] == 0


def test_the_learning_rate_of_a_step_that_is_not_logged_is_not_waited_for(data, tmp_path, monkeypatch):
    counts, make = [], setup.learning_rate_schedule

    def counted(*arguments):
        schedule = make(*arguments)
        return lambda count: schedule(counts.append(count + 1) or count if isinstance(count, int) else count)

    monkeypatch.setattr(setup, "learning_rate_schedule", counted)
    train_model(config_of("clm", data), tmp_path / "run")
    assert counts == [2, 4, 5, 6, 8, 10, 12] == [line["step"] for line in lines_of(tmp_path / "run")]


def test_spikes_of_the_loss_are_counted():
    rng, health = np.random.default_rng(0), Health()
    losses = 3 + 0.1 * rng.standard_normal(400)
    losses[200] = losses[300] = 5.0
    for step, loss in enumerate(losses):
        assert health.is_spike(loss) == (step in (200, 300))
        health = health.after({"loss": loss, "skipped": 0.0})
    assert health.loss_spikes == 2 and health.loss_mean == pytest.approx(losses[-MEMORY:].mean(), abs=0.1)


def test_advice_fits_the_cause():
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "reference_loss": 1.0}
    trained = Health(steps=10)
    assert "the reference" in advice(metrics | {"reference_loss": np.nan}, trained)
    assert "starting weights" in advice(metrics | {"loss": np.nan}, Health())
    assert "learning_rate" in advice(metrics | {"gradient_norm": np.inf}, trained)
    assert "config.data.external" in advice(metrics, trained)


def test_a_run_can_be_made_longer_but_not_shorter_than_it_is(data, reference, undisturbed, tmp_path, capsys):
    config = config_of("slm", data, reference)
    config.steps = STEPS - 1
    with pytest.raises(UserError, match="config.steps=11 is below the 12 steps that this run has done"):
        train_model(config, undisturbed[0])
    assert '"steps": 12' in (undisturbed[0] / "config.json").read_text()
    saved = newest(undisturbed[0])
    check_resume(saved, saved._replace(config=saved.config | {"steps": 20}))
    message = "schedule now spans 20 steps: at step 13 the rate changes from 0.001 to 0.00[0-9]+. To keep the old one, "
    assert re.search(f"{message}set config.optimizer.schedule_steps=12", capsys.readouterr().out)
    shutil.copytree(undisturbed[0], tmp_path / "kept")
    config.steps, config.optimizer.schedule_steps = 20, STEPS
    train_model(config, tmp_path / "kept")
    assert "the learning rate of step 13 stays 0.001" in capsys.readouterr().out
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "kept") if line["step"] >= STEPS]
    assert rates[1:] == pytest.approx([1e-3] * (len(rates) - 1))
