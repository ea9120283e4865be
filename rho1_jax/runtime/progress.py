"""Report progress on standard error: a bar in a terminal, plain lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from tqdm import tqdm

from rho1_jax.runtime.processes import is_first

PLAIN_SECONDS = 10.0  # between two progress lines without a terminal
LARGE_UNITS = ("B", "params", "tokens")  # shown with the suffixes k, M and G
SILENT_SECONDS = 5.0  # without a terminal, shorter work prints nothing
WAITING_SECONDS = 2.0  # in a terminal, the longest silence of `waiting`


class Progress:
    """Progress with rate and time left: a bar in a terminal, a plain line every PLAIN_SECONDS elsewhere.

    The rate does not count the first piece of work, which may include compilation. Only the first process prints.
    """

    def __init__(self, name: str, total: int, unit: str, initial: int = 0, leave: bool = True):
        self._terminal = is_first() and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=name,
            unit=unit,
            unit_scale=unit in LARGE_UNITS,
            disable=not self._terminal,
            leave=leave,
            dynamic_ncols=True,
        )
        self._name, self._total, self._unit, self._initial = name, total, unit, initial
        self._done = self._counted_from = initial
        self._note = ""
        self._start = self._last_line = self._counted_since = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """Add `count` finished units. `note` is shown after the rate."""
        self.advance_to(self._done + count, note)

    def advance_to(self, done: int, note: str = "") -> None:
        """Set the number of finished units to `done`."""
        self._note = note
        first = self._done == self._initial and done < self._total
        if self._terminal:
            self._bar.set_postfix_str(note, refresh=False)
            if not first:
                self._bar.update(done - self._done)
        if first:
            self._count_from(done)
        self._done = done
        if is_first() and not self._terminal and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._print_line()

    def _count_from(self, done: int) -> None:
        """Start measuring the rate here."""
        self._counted_from, self._counted_since = done, time.monotonic()
        if self._terminal:
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.last_print_t = self._bar.start_t
            self._bar.unpause()  # moves the start to now
            self._bar.refresh()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            self._total,
            self._last_line - self._counted_since,
            prefix=self._name,
            unit=self._unit,
            unit_scale=self._unit in LARGE_UNITS,
            initial=self._counted_from,
            postfix=self._note,
            bar_format="{desc}: {n_fmt}/{total_fmt} {percentage:.0f}% {rate_fmt} {remaining} left{postfix}",
        )
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (
            is_first()
            and not self._terminal
            and self._done > self._initial
            and time.monotonic() - self._start >= SILENT_SECONDS
        ):
            self._print_line()
        self._bar.close()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[Callable[[], None]]:
    """Shows a text and the seconds while a terminal would be silent, and erases them at the end of the block.

    Yields:
      A function that erases them earlier, for example when there is output.
    """
    over = threading.Event()

    def show() -> None:
        start, shown = time.monotonic(), False
        while not over.wait(1.0 if shown else WAITING_SECONDS):
            print(f"\r{text}: {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
            shown = True
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)

    def end() -> None:
        over.set()
        if thread.is_alive():
            thread.join()

    if is_first() and sys.stderr.isatty():
        thread.start()
    try:
        yield end
    finally:
        end()
