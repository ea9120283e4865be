"""Limit the CPU time and the memory of code that comes from outside."""

import contextlib
import pathlib
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rho1_jax.runtime.errors import UserError


@contextlib.contextmanager
def time_limit(seconds: float, error: str) -> Iterator[None]:
    """Ends the block if it takes more CPU time than this. Only the main thread has the limit.

    A call into C, such as a power of large integers, is not interrupted.

    Raises:
      UserError: with the text `error`, when the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise UserError(error)

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def memory_limit(limit: int, error: str) -> Iterator[None]:
    """Ends the block if it needs more than `limit` bytes of address space beyond what the process has.

    The limit holds for the whole process while the block runs, so other threads should be idle. Only Linux has it.

    Raises:
      UserError: with the text `error`, when an allocation fails.
    """
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    bounds = [bound for bound in (used + limit, soft) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    except MemoryError:
        raise UserError(error) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
