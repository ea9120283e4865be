"""One line for each failure of Orbax, instead of the tracebacks that its threads print."""

import dataclasses
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

SHOWN = 160  # characters of an error


def one_line(error: Exception) -> str:
    """The system's reason for an error of Orbax or TensorStore or, if it gives none, the start of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = f"{type(error).__name__}: {error}"
    text = re.sub(r'Error opening "\w+" driver: ', "", " ".join(text.split()))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def hide_complaints() -> None:
    """Hides what Orbax prints in addition to the error that it raises.

    When one read or write fails, Orbax logs the error in each of its threads. It also abandons the other reads and
    writes and closes their event loop, so each of them complains when it ends.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_not_about_orbax)
    if not isinstance(sys.unraisablehook, _ExceptOrbax):
        sys.unraisablehook = _ExceptOrbax(sys.unraisablehook)


@dataclasses.dataclass(frozen=True)
class _ExceptOrbax:
    """A `sys.unraisablehook` that skips exceptions of abandoned reads and writes."""

    report: Callable[[Any], Any]

    def __call__(self, ignored: "sys.UnraisableHookArgs") -> None:
        orbax = inspect.iscoroutine(ignored.object) and "orbax" in ignored.object.cr_code.co_filename
        if not orbax and str(ignored.exc_value) != "Event loop is closed":
            self.report(ignored)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_about_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()
