"""Run one command as several processes: start-up, and output from the first process only."""

import hashlib
import json
import resource
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax._src import distributed  # jax.distributed publishes neither the store of all processes nor the coordinator
from jax.experimental import multihost_utils

from rho1_jax.runtime import peers, stopping
from rho1_jax.runtime.errors import UserError

AUTOMATIC = "auto"


def define_distributed_flag() -> flags.FlagHolder[str]:
    """Define --distributed, for commands that run on several hosts at once."""
    return flags.DEFINE_string(
        "distributed",
        "",
        "Run this command as one of several processes: 'auto' on Cloud TPU, GKE, Slurm and Open MPI, where the "
        "environment describes the processes; elsewhere HOST:PORT,PROCESSES,INDEX, with the HOST:PORT of process 0.",
    )


def start(value: str) -> None:
    """Join the other processes. Call this before any other use of JAX. Does nothing if `value` is empty.

    Raises:
      UserError: `value` is neither "auto" nor HOST:PORT,PROCESSES,INDEX, or the other processes cannot be reached.
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
        # Without this, processes end with stack dumps as soon as process 0 is gone. `peers` reports which one died.
        jax.config.update("jax_enable_recoverability", True)
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed={value}: {error}") from None
    stopping.handle_signals()  # JAX installed its own
    # Where every process has just reached process 0.
    peers.watch(str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]"))


def is_first() -> bool:
    """True on the process that writes files and prints."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """Gathers a JSON value from each process, ordered by process number. All of them must call it."""
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in texts]


def is_first_with(text: str) -> bool:
    """True in the process that is the first to pass a text, False in those that pass the same text later."""
    client = distributed.global_state.client
    try:
        if client is not None:
            client.key_value_set(f"rho1_jax/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", "")
    except jax.errors.JaxRuntimeError as error:
        return "ALREADY_EXISTS" not in str(error)  # any other error: the first process is gone
    return True


def say(text: str) -> None:
    """Print a line on standard output, from the first process only."""
    if is_first():
        print(text, flush=True)


def usage(start: float) -> str:
    """Seconds since `start`, by `time.monotonic`, and the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{time.monotonic() - start:.0f} seconds, peak memory {peak:.2f} GiB"
