"""Run the programs of transcripts again, and list those whose output differs from the transcript.

python -m tools.replay_programs --input=FILE.jsonl [--json]

Each record holds its transcript under "generation", or under "code" as in the published Rho-1 outputs. A transcript has
```python blocks, each followed by an ```output block. Programs of one transcript share their variables.
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
    """Run every program of a file and return its line number, recorded output and new output.

    Raises:
      UserError: a record has no transcript, or the file has no programs.
    """
    programs = []
    for line, _, text in generations("replay", path):
        with Sandbox() as box:
            for program, output in BLOCKS.findall(text):
                programs.append({"line": line, "recorded": output.strip(), "now": shown(box.run(program))})
    if not programs:
        raise UserError(
            f"{path}: no programs with their output; expected ```python blocks, each with an ```output block"
        )
    return programs


def main() -> None:
    """Define the flags, run `replay` and report the differences."""
    path = flags.DEFINE_string("input", None, "JSON lines file of transcripts.", required=True)
    as_json = flags.DEFINE_bool("json", False, "Print the figures as JSON.")

    def command() -> None:
        programs = replay(pathlib.Path(path.value))
        differ = [program for program in programs if program["recorded"] != program["now"]]
        share = 1 - len(differ) / len(programs)
        if as_json.value:
            json.dump({"programs": len(programs), "same_output": share, "differ": differ}, sys.stdout, indent=2)
            print()
            return
        print(f"{len(programs)} programs, {share:.2%} with the same output")
        for program in differ:
            print(f"line {program['line']}: recorded {program['recorded']!r}, now {program['now']!r}")

    run(command)


if __name__ == "__main__":
    main()
