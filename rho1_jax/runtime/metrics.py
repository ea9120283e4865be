"""Write and read a run's metrics: metrics.jsonl and TensorBoard event files."""

import json
import pathlib

import tensorboardX

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, write_text

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics to metrics.jsonl, one JSON object per line, and to TensorBoard event files."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Open the files of `workdir` and drop every step after `resume_step`.

        An interrupted run may have logged steps after its last checkpoint. The resumed run logs them again.
        """
        self._path = workdir / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step] if self._path.exists() else []
        write_text(self._path, json_lines(kept))
        self._file = self._path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step's metrics and flush the line to disk."""
        self._file.write(json_lines([{"step": step, **metrics}]))
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Close metrics.jsonl and the event file."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Read a run's metrics.jsonl, one dict per logged step. Skips a last line that a crash cut short.

    Raises:
      UserError: a line before the last is not valid JSON.
    """
    path = workdir / METRICS_FILE
    lines = path.read_text().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a JSON object; fix or remove the line") from None
    return metrics
