"""Runs the programs of transcripts again, and lists those whose output is another one than the transcript has.

python -m tools.replay_programs --input=FILE.jsonl [--json]

Records have the transcript under "generation", or "code" as Rho-1 published them: blocks of ```python, each followed by
one of ```output. Programs of one transcript see each other's names.
"""

import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

from rho1_jax.evals.sandbox import Sandbox, shown
from rho1_jax.grade import generations
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError

BLOCKS = re.compile(r"```python\n(.*?)```\n```output\n(.*?)```", re.DOTALL)


def replay(path: pathlib.Path) -> list[dict[str, Any]]:
    """Each program's line, recorded and new output. Raises UserError where the file is not one of transcripts."""
    found = []
    for line, _, text in generations("replay", path):
        with Sandbox() as box:
            for program, output in BLOCKS.findall(text):
                found.append({"line": line, "recorded": output.strip(), "now": shown(box.run(program))})
    if not found:
        raise UserError(f"{path}: no programs with their output")
    return found


def main() -> None:
    """The command: its flags, then `replay`."""
    path = flags.DEFINE_string("input", None, "JSON lines file of transcripts.", required=True)
    as_json = flags.DEFINE_bool("json", False, "Print the figures as JSON.")

    def command() -> None:
        found = replay(pathlib.Path(path.value))
        differ = [program for program in found if program["recorded"] != program["now"]]
        share = 1 - len(differ) / len(found)
        if as_json.value:
            json.dump({"programs": len(found), "same_output": share, "differ": differ}, sys.stdout, indent=2)
            print()
            return
        print(f"{len(found)} programs, the same output {share:.2%}")
        for program in differ:
            print(f"line {program['line']}: {program['recorded']!r} then, {program['now']!r} now")

    run(command)


if __name__ == "__main__":
    main()
