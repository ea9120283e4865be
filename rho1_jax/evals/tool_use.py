"""Generate with tools: the model writes programs, and sees what they print (ToRA, arXiv 2309.17452)."""

import os
import re
import resource
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from rho1_jax.evals.sandbox import Sandbox, shown
from rho1_jax.models.generation import Generator, Request

ROUNDS = 4  # maximum number of programs that are run for one answer
DESCRIPTORS = 8  # open files to allow for each sandbox, which itself needs two
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
    generator: Generator, requests: Sequence[Request], stops: Sequence[str], sandboxes: int, **options: Any
) -> Iterator[Request]:
    """Continues prompts and runs the programs that the model writes, at most ROUNDS for each prompt.

    A program runs in the background while the generator works on other prompts. The programs of one transcript share
    their variables in a sandbox, which ends with the transcript. A transcript that has a sandbox is continued before
    new prompts. A program that needs a new sandbox waits while `sandboxes` are in use.

    Args:
      generator: continues prompts; a stop string is not part of the continuation.
      requests: (number, prompt) pairs.
      stops: strings that end an answer.
      sandboxes: maximum number of sandboxes at a time, lowered if this process may open only few files.
      options: further arguments of `Generator.run`.

    Yields:
      (number, transcript) as each one ends. A transcript holds the model's text, its programs and their output, but
      not the prompt.

    Raises:
      UserError: this machine cannot confine a process.
    """
    transcripts = {number: _Transcript(prompt) for number, prompt in requests}
    waiting: deque[Request] = deque(requests)
    programs: deque[tuple[int, str]] = deque()  # programs that wait for a sandbox
    owners: set[int] = set()  # transcripts that have a sandbox
    running: dict[Future, int] = {}
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors != resource.RLIM_INFINITY:
        sandboxes = min(sandboxes, max(1, descriptors // DESCRIPTORS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read_outputs(done: Collection[Future]) -> None:
            for future in done:
                number = running.pop(future)
                future.result()  # raises the error of the program's thread, if any
                waiting.appendleft((number, transcripts[number].prompt + transcripts[number].text))

        def run_program(number: int, program: str) -> None:
            owners.add(number)
            running[pool.submit(transcripts[number].run, program)] = number

        try:
            while waiting or running:
                for number, text, *_ in generator.run(waiting, stops=[*stops, OUTPUT], **options):
                    transcript = transcripts[number]
                    transcript.text += text
                    program = program_at_end(text)
                    if program is None or transcript.programs == ROUNDS:
                        transcripts.pop(number).box.close()
                        owners.discard(number)
                        yield number, transcript.text
                    elif number in owners:
                        run_program(number, program)
                    else:
                        programs.append((number, program))
                    while programs and len(owners) < sandboxes:
                        run_program(*programs.popleft())
                    read_outputs([future for future in running if future.done()])
                read_outputs(wait(running, return_when=FIRST_COMPLETED).done)
        finally:
            for transcript in transcripts.values():
                transcript.box.kill()  # ends the programs that the pool waits for
            pool.shutdown(cancel_futures=True)
            for transcript in transcripts.values():
                transcript.box.close()
