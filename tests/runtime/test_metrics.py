"""metrics.jsonl and the TensorBoard file across interruptions, damage, and disks that cannot be written."""

import json
import resource
import shutil
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import MetricsWriter, read_metrics


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


@pytest.mark.parametrize(
    "line, message",
    [
        ("broken", "not JSON"),
        ("[1]", r"input should be an object, not \[1\]"),
        ("3", "input should be an object, not 3"),
        ("", "not JSON"),
        ('{"loss": 1.0}', "step: field required"),
        ('{"step": "2"}', "step: input should be a valid integer, not '2'"),
        ('{"step": 2, "loss": "low"}', "loss: input should be a number, not 'low'"),
        ('{"step": 2, "loss": null}', "loss: input should be a number, not None"),
        (b'{"step": 2, "\xff": 1}', "not JSON"),
        ("[" * 100_000, "not JSON: recursion limit exceeded"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=rf"metrics.jsonl:2: {message}.*; fix or remove the line"):
        MetricsWriter(tmp_path, 3)


def test_lines_that_stay_keep_their_bytes(tmp_path):
    lines = '{"step": 1,  "loss": NaN, "tokens": 3}\n{"step": 2, "a\N{LINE SEPARATOR}b": 1e400}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    MetricsWriter(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def steps(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def events(workdir):
    """The steps of the events in all files, and their metrics. Each record must have the right checksums."""
    read = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            head, record, tail, content = (
                content[8:12],
                content[12 : 12 + size],
                content[12 + size :][:4],
                content[16 + size :],
            )
            assert struct.unpack("<II", head + tail) == (masked_crc32c(struct.pack("<Q", size)), masked_crc32c(record))
            event = Event.FromString(record)
            read += [(event.step, {value.tag: value.simple_value for value in event.summary.value})]
    return read


def test_tensorboard_gets_each_metric_and_where_a_run_resumed(tmp_path):
    for resumed in (0, 1):
        writer = MetricsWriter(tmp_path, resumed)
        for step in (1, 2):
            writer.write(step, {"loss": 0.5, "eval/a/loss": float(step)})
    expected = [(step, {"loss": 0.5, "eval/a/loss": float(step)}) for step in (1, 2)]
    assert events(tmp_path) == [(0, {}), (1, {}), *expected, (0, {}), (2, {}), *expected]


def lose(writer, path, capsys, restore):
    """Writes steps 2 and 3 while writing fails, and step 4 after `restore`. Returns the first warning."""
    writer.write(2, {"loss": 1.0})
    writer.write(3, {"loss": 1.0})
    restore()
    writer.write(4, {"loss": 1.0})
    writer.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: step 2: ") and "Training continues, but metrics are lost" in first
    assert second == f"warning: step 4: can write {path}/metrics.jsonl again; the metrics of 2 steps are lost"
    return first


def test_a_full_disk_loses_metrics_with_one_warning_and_cuts_no_line(tmp_path, capsys):
    """The limit on a file's size, like a full disk, lets a write end in the middle of a line."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        warning = lose(writer, tmp_path, capsys, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl: No space left on device" in warning
    assert steps(tmp_path) == [1, 4] and [step for step, _ in events(tmp_path)] == [0, 1, 1, 4]


def test_a_removed_work_directory_is_not_recreated_but_used_once_it_is_back(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    writer = MetricsWriter(workdir, 0)
    shutil.rmtree(workdir)
    warning = lose(writer, workdir, capsys, workdir.mkdir)
    assert "metrics.jsonl: No such file or directory" in warning
    assert steps(workdir) == [4] and [step for step, _ in events(workdir)] == [0, 1, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys, name):
    """/dev/full refuses every write, for any user."""
    writer = MetricsWriter(tmp_path, 0)
    path = tmp_path / name
    path = next(path.iterdir()) if path.is_dir() else path
    path.unlink()
    path.symlink_to("/dev/full")
    assert "No space left on device" in lose(writer, tmp_path, capsys, path.unlink)
    assert steps(tmp_path)[-1] == 4 and events(tmp_path)[-1][0] == 4


def test_metrics_lost_at_the_end_are_reported(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, 0)
    shutil.rmtree(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.endswith("the metrics of the last 1 logged steps are lost\n")


def test_metrics_lines_are_json_objects_of_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(7, {"loss": 1.5, "eval/clean/loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 7, "loss": 1.5, "eval/clean/loss": 2.0}
    writer.close()
