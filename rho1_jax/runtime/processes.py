"""Several processes as one: start-up, and what only one of them does."""

from typing import Any

import jax
from absl import flags

from rho1_jax.runtime.errors import UserError

AUTOMATIC = "auto"


def define_distributed_flag() -> flags.FlagHolder[str]:
    """--distributed, for commands that run on several hosts at once."""
    return flags.DEFINE_string(
        "distributed",
        "",
        "Where several processes run this command: 'auto' on Cloud TPU, GKE, Slurm and Open MPI, whose environment "
        "tells how many and which; HOST:PORT,PROCESSES,INDEX elsewhere, HOST:PORT being that of process 0.",
    )


def start(value: str) -> None:
    """Joins the other processes, before anything else is asked of JAX. Nothing to do where the flag is empty.

    Raises:
      UserError: the flag is neither "auto" nor HOST:PORT,PROCESSES,INDEX, or the others cannot be reached.
    """
    if not value:
        return
    arguments: dict[str, Any] = {}
    if value != AUTOMATIC:
        try:
            address, processes, index = value.split(",")
            arguments = {"coordinator_address": address, "num_processes": int(processes), "process_id": int(index)}
        except ValueError:
            raise UserError(f"--distributed={value} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX") from None
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed={value}: {error}") from None


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """A line on standard output, once for all processes."""
    if is_first():
        print(text, flush=True)
