"""Generate with tools: the model writes programs, and sees what they print (ToRA, arXiv 2309.17452)."""

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from rho1_jax.evals.sandbox import Sandbox, shown
from rho1_jax.models.generation import Generator, Request

ROUNDS = 4  # most programs that are run for one answer
OUTPUT = "```output"
_PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)


def program_at_end(text: str) -> str | None:
    """The program in the code block at the end of a text; None if the text does not end in one."""
    programs = _PROGRAM.findall(text)
    return programs[-1] if programs and text.rstrip().endswith("```") else None


class _Transcript:
    """A prompt, the text generated after it, and the sandbox that its programs share."""

    def __init__(self, prompt: str):
        self.prompt, self.text, self.programs, self.box = prompt, "", 0, Sandbox()

    def run(self, program: str) -> None:
        """Runs a program and appends its output to the text."""
        self.programs += 1
        ending = "" if self.text.endswith("\n") else "\n"
        self.text += f"{ending}{OUTPUT}\n{shown(self.box.run(program))}\n```\n"


def run_with_tools(
    generator: Generator, requests: Sequence[Request], stops: Sequence[str], **options: Any
) -> Iterator[Request]:
    """Continues prompts and runs the programs that the model writes, at most ROUNDS for each prompt.

    A program runs in the background while the generator works on other prompts. The programs of one transcript share
    their variables.

    Args:
      generator: continues prompts; a stop string is not part of the continuation.
      requests: (number, prompt) pairs.
      stops: strings that end an answer.
      options: further arguments of `Generator.run`.

    Yields:
      (number, transcript) as each one ends. A transcript holds the model's text, its programs and their output, but
      not the prompt.

    Raises:
      UserError: this machine cannot confine a process.
    """
    transcripts = {number: _Transcript(prompt) for number, prompt in requests}
    waiting: deque[Request] = deque(requests)
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read_outputs(done: set[Future]) -> None:
            for future in done:
                number = running.pop(future)
                future.result()  # raises the error of the program's thread, if any
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
