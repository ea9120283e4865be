"""Generation in which the model writes programs, has them run, and reads their output (ToRA, arXiv 2309.17452)."""

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from rho1_jax.evals.sandbox import Sandbox, shown
from rho1_jax.models.generation import Generator, Request

ROUNDS = 4  # programs of one answer, at most
OUTPUT = "```output"
_PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)


def program_at_end(text: str) -> str | None:
    """The program of a block that a text ends with, None where it ends otherwise."""
    programs = _PROGRAM.findall(text)
    return programs[-1] if programs and text.rstrip().endswith("```") else None


class _Transcript:
    """A prompt, what followed, and the sandbox that its programs share."""

    def __init__(self, prompt: str):
        self.prompt, self.text, self.programs, self.box = prompt, "", 0, Sandbox()

    def run(self, program: str) -> None:
        """Runs a program and adds what it showed."""
        self.programs += 1
        ending = "" if self.text.endswith("\n") else "\n"
        self.text += f"{ending}{OUTPUT}\n{shown(self.box.run(program))}\n```\n"


def run_with_tools(
    generator: Generator, requests: Sequence[Request], stops: Sequence[str], **options: Any
) -> Iterator[Request]:
    """Continues prompts, running the programs on the way, ROUNDS of each at most, while others are continued.

    Args:
      generator: continues a prompt until one of some stop strings, which is not part of what it gives.
      requests: numbers and prompts.
      stops: strings that end an answer.
      options: for the generator.

    Yields:
      Number and transcript without its prompt, as each ends: text, programs and their outputs. Programs of one
      transcript see the names of those before.

    Raises:
      UserError: this system cannot confine a process.
    """
    transcripts = {number: _Transcript(prompt) for number, prompt in requests}
    waiting: deque[Request] = deque(requests)
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read_outputs(done: set[Future]) -> None:
            for future in done:
                number = running.pop(future)
                future.result()  # raises what it raised
                waiting.append((number, transcripts[number].prompt + transcripts[number].text))

        try:
            while waiting or running:
                for number, text, *_ in generator.run(waiting, stops=[*stops, OUTPUT], **options):
                    transcript = transcripts[number]
                    transcript.text += text
                    program = program_at_end(text)
                    if program is not None and transcript.programs < ROUNDS:
                        running[pool.submit(transcript.run, program)] = number
                    else:
                        transcripts.pop(number).box.close()
                        yield number, transcript.text
                    read_outputs({future for future in running if future.done()})
                read_outputs(wait(running, return_when=FIRST_COMPLETED).done)
        finally:
            pool.shutdown(cancel_futures=True)
            for transcript in transcripts.values():
                transcript.box.close()
