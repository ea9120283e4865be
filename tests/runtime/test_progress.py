"""Progress in a terminal and without one: rate and time left."""

import io
import sys
import threading
import time

import pytest

from rho1_jax.runtime import progress as progress_module
from rho1_jax.runtime.progress import Progress, waiting


@pytest.fixture
def now(monkeypatch):
    """The clock of `Progress` and tqdm, in seconds: a list of one number that the test changes."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_progress_without_a_terminal_prints_lines_with_rate_and_time_left(capsys, now):
    with Progress("work", 100, unit="rows", initial=20) as progress:
        for _ in range(4):
            now[0] += 6.0
            progress.advance(15, note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 50/100 50%  2.50rows/s 00:20 left, loss 1.5"
    assert len(lines) == 3 and lines[-1].startswith("work: 80/100")
    assert not any("\r" in line for line in lines)


def compile_then_step(now, seconds):
    """Does six of ten steps. The first takes 300 seconds, with compilation, and the others `seconds` each."""
    with Progress("run", 10, unit="steps") as progress:
        for step in range(6):
            now[0] += seconds if step else 300.0
            progress.advance_to(step + 1)


@pytest.mark.parametrize(
    "seconds, expected",
    [(20.0, "run: 6/10 60% 20.00s/steps 01:20 left"), (0.5, "run: 6/10 60%  2.00steps/s 00:02 left")],
)
def test_compilation_does_not_count(capsys, now, seconds, expected):
    """Below one a second, the rate is the seconds of a step."""
    compile_then_step(now, seconds)
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_compilation_does_not_count_in_a_terminal(monkeypatch, now):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    compile_then_step(now, 20.0)
    assert "6/10" in terminal.getvalue() and terminal.getvalue().rstrip().endswith("20.00s/steps]")
    assert "[01:40<01:20" in terminal.getvalue()


def test_work_that_is_done_at_once_has_a_rate(capsys, now):
    with Progress("read", 100, unit="rows") as progress:
        now[0] += 10.0
        progress.advance(100)
    assert capsys.readouterr().err.splitlines()[-1] == "read: 100/100 100% 10.00rows/s 00:00 left"


class Terminal(io.StringIO):
    """Standard error in a terminal. `written` is set by each write."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def isatty(self):
        return True

    def write(self, text):
        count = super().write(text)
        self.written.set()
        return count


def test_a_terminal_shows_how_long_it_has_been_waiting(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "WAITING_SECONDS", 0.01)
    with waiting("compiling") as end:
        assert terminal.written.wait(30)
        assert terminal.getvalue().startswith("\rcompiling: 0 s")
        end()
        assert terminal.getvalue().endswith("\r\033[K")
        written = terminal.getvalue()
    assert terminal.getvalue() == written


def test_waiting_is_silent_if_it_is_short_or_nobody_watches(monkeypatch, capsys):
    with waiting("compiling"):
        pass
    monkeypatch.setattr(progress_module, "WAITING_SECONDS", 0.0)
    with waiting("compiling"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "WAITING_SECONDS", 30.0)
    with pytest.raises(KeyError), waiting("compiling"):
        raise KeyError
    assert terminal.getvalue() == ""
