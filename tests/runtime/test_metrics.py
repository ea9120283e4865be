"""metrics.jsonl across interruptions, and progress without a terminal."""

import json

import pytest

from rho1_jax.runtime import progress as progress_module
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import MetricsWriter, read_metrics
from rho1_jax.runtime.progress import Progress


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    writer.close()
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": 0.25})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_new_run_drops_old_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(tmp_path, 0).close()
    assert read_metrics(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl:2: not a JSON object"):
        read_metrics(tmp_path)


def test_progress_without_a_terminal_prints_lines_with_rate_and_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress("work", 100, unit="rows", initial=20) as progress:
        for _ in range(4):
            now[0] += 6.0
            progress.advance(15, note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 50/100 50%  2.50rows/s 00:20 left, loss 1.5"
    assert len(lines) == 3 and lines[-1].startswith("work: 80/100")
    assert not any("\r" in line for line in lines)


def test_metrics_lines_are_json_objects_of_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(7, {"loss": 1.5, "eval/clean/loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 7, "loss": 1.5, "eval/clean/loss": 2.0}
    writer.close()
