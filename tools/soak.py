"""Trains for many tiny steps, with evaluations and checkpoints, and watches memory and open files of the process.

python -m tools.soak [--output=runs/soak] [--steps=20000]

Prints the resident memory and the open descriptors along the way. The exit status is 1 if, from a fifth of the run on,
memory grows by more than 2 % or the number of descriptors grows.
"""

import pathlib
import statistics
import sys
import time
from typing import NamedTuple

from absl import flags

from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.metrics import read_metrics
from tools.faults import make_inputs, new_folder, start, training_flags

SECONDS = 2.0  # between two samples
GROWTH = 0.02


class Sample(NamedTuple):
    """Memory and open files of the process at a step."""

    step: float
    megabytes: float
    descriptors: int


def sample(process: int, workdir: pathlib.Path) -> Sample | None:
    """Samples a process. None if it has not logged a step or has ended."""
    proc = pathlib.Path(f"/proc/{process}")
    try:
        pages = int((proc / "statm").read_text().split()[1])
        if not pages:  # it has ended, but nobody has asked for its status yet
            return None
        lines = read_metrics(workdir)
        return Sample(lines[-1]["step"], pages * 4096 / 2**20, len(list((proc / "fd").iterdir())))
    except (OSError, IndexError):
        return None


def growth(samples: list[Sample], steps: int) -> tuple[float, int]:
    """Relative growth of memory, and growth of descriptors, from the second fifth of the run to the last one."""
    early = [s for s in samples if steps / 5 <= s.step < 2 * steps / 5]
    late = [s for s in samples if s.step >= 4 * steps / 5]
    if not early or not late:
        raise UserError("the run was too short to measure its growth; raise --steps")
    megabytes, descriptors = (
        [statistics.median(getattr(s, name) for s in part) for part in (early, late)]
        for name in ("megabytes", "descriptors")  # a checkpoint that is being written has some open
    )
    return megabytes[1] / megabytes[0] - 1, round(descriptors[1] - descriptors[0])


def main() -> None:
    """The command."""
    output = flags.DEFINE_string("output", "runs/soak", "Directory for the run; it is removed first.")
    steps = flags.DEFINE_integer("steps", 20_000, "Steps of the run.")

    def command() -> None:
        folder = new_folder(local_path(output.value, "--output").absolute())
        inputs = new_folder(folder / "inputs")
        make_inputs(inputs)
        changes = {"steps": steps.value, "log_every": 50, "eval.every": 200, "checkpoint.every": 100}
        arguments = training_flags(inputs, "slm", inputs / "data", **changes)
        (process,) = start("rho1_jax.train", [*arguments, f"--workdir={folder}/run"], folder / "log.txt")
        samples: list[Sample] = []
        while process.poll() is None:
            time.sleep(SECONDS)
            now = sample(process.pid, folder / "run")
            if now and (not samples or now.step >= samples[-1].step + steps.value / 40):
                samples.append(now)
                print(f"step {now.step:6.0f}  {now.megabytes:7.1f} MiB  {now.descriptors} descriptors", flush=True)
        if process.returncode:
            raise UserError(f"{folder}/log.txt: {(folder / 'log.txt').read_text()[-500:]}")
        memory, descriptors = growth(samples, steps.value)
        print(f"memory {memory:+.1%}, descriptors {descriptors:+d}")
        if memory > GROWTH or descriptors > 0:
            sys.exit(1)

    run(command)


if __name__ == "__main__":
    main()
