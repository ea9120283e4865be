"""Write and read a run's metrics: metrics.jsonl and a TensorBoard event file."""

import errno
import os
import pathlib
import socket
import struct
import sys
import time
from typing import Annotated, Any

import pydantic
from pydantic_core import PydanticCustomError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from typing_extensions import TypedDict

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, replacing
from rho1_jax.runtime.schema import parse_json

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("number", "input should be a number")
    return value


class Line(TypedDict, extra_items=Annotated[Any, pydantic.AfterValidator(_number)]):  # type: ignore[call-arg]
    """A line of metrics.jsonl: the step, and a number for each metric. NaN counts as a number."""

    step: int


class MetricsWriter:
    """Appends metrics to metrics.jsonl, one JSON object per line, and to a TensorBoard event file.

    If the files cannot be written, it warns once, drops the metrics, and the run continues.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Open the files of `workdir` and drop every step after `resume_step`.

        An interrupted run may have logged steps after its last checkpoint. The resumed run logs them again.

        Raises:
          UserError: metrics.jsonl is damaged.
          OSError: the files cannot be written.
        """
        self._path, folder = workdir / METRICS_FILE, workdir / TENSORBOARD_DIR
        kept = [raw + b"\n" for raw, line in _lines(self._path) if line["step"] <= resume_step]
        with replacing(self._path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self._events = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        # Makes TensorBoard hide the steps from here on in earlier files.
        restart = Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._header = _record(Event(wall_time=time.time(), file_version="brain.Event:2")) + _record(restart)
        folder.mkdir(exist_ok=True)
        _append(self._events, self._header)
        self._lost = 0  # steps whose metrics were lost since the last one that was written

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step's metrics to disk."""
        event = Event(wall_time=time.time(), step=step)
        for name, value in metrics.items():
            event.summary.value.extend(scalar(name, value).value)
        try:
            _append(self._path, json_lines([{"step": step, **metrics}]).encode())
            self._events.parent.mkdir(exist_ok=True)
            _append(self._events, _record(event), self._header)
        except OSError as error:
            if not self._lost:
                path, problem = error.filename or self._path, error.strerror
                _warn(f"step {step}: {path}: {problem}. Training continues, but metrics are lost until this is fixed")
            self._lost += 1
        else:
            if self._lost:
                _warn(f"step {step}: can write {self._path} again; the metrics of {self._lost} steps are lost")
            self._lost = 0

    def close(self) -> None:
        """Report metrics that were lost up to the end of the run."""
        if self._lost:
            _warn(f"{self._path}: the metrics of the last {self._lost} logged steps are lost")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _append(path: pathlib.Path, data: bytes, header: bytes = b"") -> None:
    """Appends all of the data or, if the disk is full, none. Opens the file again, since it may have been removed."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        data = data if end else header + data
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _record(event: Event) -> bytes:
    """An event in the format of event files: its length and its content, each followed by a checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(checksums) + content + next(checksums)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl, one dict per logged step. Skips a last line that a crash cut short.

    Raises:
      UserError: a line is not a JSON object of numbers with a step.
    """
    return [line for _, line in _lines(workdir / METRICS_FILE)]


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl, raw and parsed; none if there is no such file."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")  # a line that was cut short has no line break
    lines: list[tuple[bytes, dict[str, Any]]] = []
    for number, raw in enumerate(whole, start=1):
        try:
            lines.append((raw, dict(parse_json(raw, Line, f"{path}:{number}"))))
        except UserError as error:
            raise UserError(f"{error}; fix or remove the line") from None
    return lines
