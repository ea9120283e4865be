"""Generation in which the model writes programs, has them run, and reads their output (ToRA, arXiv 2309.17452)."""

import contextlib
import re
from collections.abc import Callable, Sequence

from rho1_jax.evals.sandbox import Sandbox, shown

ROUNDS = 4  # programs of one answer, at most
OUTPUT = "```output"
_PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)


def program_at_end(text: str) -> str | None:
    """The program of a block that a text ends with, None where it ends otherwise."""
    programs = _PROGRAM.findall(text)
    return programs[-1] if programs and text.rstrip().endswith("```") else None


def generate_with_tools(
    continued: Callable[[list[str], Sequence[str]], list[str]], prompts: Sequence[str], stops: Sequence[str]
) -> list[str]:
    """Continues prompts, running the programs on the way, ROUNDS of each at most.

    Args:
      continued: continues prompts until one of some stop strings, which is not part of what it returns.
      prompts: texts to continue.
      stops: strings that end an answer.

    Returns:
      The transcripts without their prompts: text, programs and their outputs. Programs of one transcript see the names
      of those before.
    """
    transcripts = [""] * len(prompts)
    going_on = list(range(len(prompts)))
    with contextlib.ExitStack() as stack:
        boxes = [stack.enter_context(Sandbox()) for _ in prompts]
        for number in range(ROUNDS + 1):
            texts = continued([prompts[index] + transcripts[index] for index in going_on], [*stops, OUTPUT])
            for index, text in zip(list(going_on), texts):
                transcripts[index] += text
                program = program_at_end(text)
                if program is None or number == ROUNDS:
                    going_on.remove(index)
                    continue
                ending = "" if transcripts[index].endswith("\n") else "\n"
                transcripts[index] += f"{ending}{OUTPUT}\n{shown(boxes[index].run(program))}\n```\n"
            if not going_on:
                break
    return transcripts
