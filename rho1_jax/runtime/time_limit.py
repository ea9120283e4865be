"""Limit the CPU time of code that comes from outside."""

import contextlib
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
