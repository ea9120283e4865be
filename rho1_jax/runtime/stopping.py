"""Stop on SIGTERM or SIGINT without losing work: the first signal asks, a second one ends the process at once.

The handler only writes the signal's number to a pipe. A thread reads it, so that a signal is noticed even while the
main thread waits for a compilation.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

GRACE_SECONDS = 30.0
# One request may arrive twice: `timeout` signals its child, and then the group that the child belongs to.
SAME_REQUEST_SECONDS = 0.5

_requested, _saved = threading.Event(), threading.Event()
_listening = False
_grace_seconds: float | None = None  # None: there is nothing to save


class Stopped(Exception):
    """A command stopped on request. The message says what is kept and how to resume.

    Attributes:
      status: exit status of the command.
    """

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


def listen() -> None:
    """Handles SIGTERM and SIGINT from now on. Commands that save call it once, in the main thread."""
    global _listening
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _listening = True
    handle_signals()
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def handle_signals() -> None:
    """Installs the handlers again if a library installed its own. Does nothing before `listen`."""
    if _listening:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)


def save_on_stop(grace_seconds: float = GRACE_SECONDS) -> None:
    """Lets the command save its work when it is asked to stop. Before this call, a signal just ends it.

    Args:
      grace_seconds: seconds after which the process ends even if it has not saved.
    """
    global _grace_seconds
    _grace_seconds = grace_seconds


def saved() -> None:
    """Says that the command has saved its work, so that the deadline no longer holds."""
    _saved.set()


def requested() -> bool:
    """True once this process was asked to stop."""
    return _requested.is_set()


def vote() -> Callable[[], bool]:
    """Starts a vote on whether any process was asked to stop. Call the result for the answer that all processes share.

    Call it at the same place in every process, under `jax.set_mesh` if there are several. It costs one small
    all-reduce, queued after the running step.
    """
    if jax.process_count() == 1:
        return requested
    mesh = jax.sharding.get_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    asked = jax.make_array_from_callback((mesh.size,), everywhere, lambda index: np.full(1, requested()))
    result = _any(NamedSharding(mesh, PartitionSpec()))(asked)
    return lambda: bool(result)


@functools.cache
def _any(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=sharding)


def check(message: str) -> None:
    """Raises `Stopped` with a message, in all processes, if any was asked to stop."""
    if vote()():
        raise Stopped(message)


def _watch(pipe: int) -> None:
    """Reacts to each signal. Runs in its own thread."""
    first_time: float | None = None
    while True:
        number = os.read(pipe, 1)[0]
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        name = signal.Signals(number).name
        if _grace_seconds is None and not jax.distributed.is_initialized():
            _end(f"{name}: stopped, with nothing to save", 128 + number)
        elif first_time is None:
            # Of several processes, none ends alone: another one may have something to save by now.
            grace = GRACE_SECONDS if _grace_seconds is None else _grace_seconds
            first_time = time.monotonic()
            _requested.set()
            _print(f"{name}: saving and stopping within {grace:.0f} seconds; send a second signal to stop at once")
            threading.Thread(target=_enforce, args=(grace,), name="grace", daemon=True).start()
        elif time.monotonic() - first_time > SAME_REQUEST_SECONDS:
            _end(f"{name}: stopped at once", 128 + number)


def _enforce(grace: float) -> None:
    if not _saved.wait(grace):
        _end(f"not saved within {grace:.0f} seconds", 1)


def _end(text: str, status: int) -> None:
    _print(text)
    os._exit(status)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
