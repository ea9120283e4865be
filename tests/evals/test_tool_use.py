"""Generate with tools: how many sandboxes live at a time, and in which order prompts are continued."""

import pathlib
import resource
import threading
import time

import pytest

from rho1_jax.evals import sandbox
from rho1_jax.evals.tool_use import run_with_tools

PROGRAM = "```python\nprint(1)\n```\n"


class Rows:
    """A stand-in for a generator with a few rows. Each prompt gets two programs and then an answer."""

    def __init__(self, rows, on_end=lambda: None):
        self.rows, self.on_end, self.prompts = rows, on_end, []

    def run(self, requests, *, stops):
        while requests:
            for number, prompt in [requests.popleft() for _ in range(min(self.rows, len(requests)))]:
                self.on_end()
                self.prompts.append(prompt)
                yield number, PROGRAM if prompt.count("```output") < 2 else "The answer is 1."


class Live(set):
    """The sandboxes that run now, and the most that ran at once."""

    highest = 0


@pytest.fixture
def live(monkeypatch):
    boxes, lock = Live(), threading.Lock()

    class Counted(sandbox.Sandbox):
        def _start(self):
            with lock:
                boxes.add(self)
                boxes.highest = max(boxes.highest, len(boxes))
            super()._start()

        def close(self):
            super().close()
            with lock:
                boxes.discard(self)

    monkeypatch.setattr("rho1_jax.evals.tool_use.Sandbox", Counted)
    return boxes


REQUESTS = [(number, f"{number}?") for number in range(24)]


def test_there_are_no_more_sandboxes_than_rows(live):
    transcripts = dict(run_with_tools(Rows(3), REQUESTS, (), sandboxes=3))
    assert transcripts.keys() == dict(REQUESTS).keys()
    assert set(transcripts.values()) == {f"{PROGRAM}```output\n1\n```\n" * 2 + "The answer is 1."}
    assert 1 < live.highest <= 3 and not live


def test_continued_prompts_go_first(monkeypatch):
    """A transcript that has a sandbox ends before most new ones begin."""
    monkeypatch.setattr(sandbox.Sandbox, "run", lambda self, program: "1\n")
    generator = Rows(4, on_end=lambda: time.sleep(0.002))
    ended = [number for number, _ in run_with_tools(generator, REQUESTS, (), sandboxes=4)]
    first_end = next(n for n, prompt in enumerate(generator.prompts) if prompt.count("```output") == 2)
    assert first_end < len(REQUESTS) and sorted(ended) == list(range(24))


def test_few_open_files_are_enough(live):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 32, limits[1]))
    try:
        assert len(list(run_with_tools(Rows(24), REQUESTS, (), sandboxes=24))) == 24
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not live


def test_no_sandbox_lives_after_an_interruption_or_an_abandoned_iteration(live):
    def interrupt():
        if len(live) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_with_tools(Rows(3, interrupt), REQUESTS, (), sandboxes=3))
    assert live.highest >= 2 and not live
    transcripts = run_with_tools(Rows(3), REQUESTS, (), sandboxes=3)
    next(transcripts)
    transcripts.close()
    assert not live
