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

from rho1_jax.config import run
from rho1_jax.data import records
from rho1_jax.errors import UserError
from rho1_jax.evals.sandbox import Sandbox, shown
from rho1_jax.metrics import Progress

BLOCKS = re.compile(r"```python\n(.*?)```\n```output\n(.*?)```", re.DOTALL)


def replay(path: pathlib.Path) -> list[dict[str, Any]]:
    """Each program's line, recorded and new output. Raises UserError where the file is not one of transcripts."""
    found = []
    with Progress("replay", path.stat().st_size, unit="B") as progress:
        for line, raw, position in records.read(path):
            record = records.parse(path, raw)
            text = record.get("generation", record.get("code")) if isinstance(record, dict) else None
            text = text[0] if isinstance(text, list) and text else text
            if not isinstance(text, str):
                raise UserError(f"{path}:{line}: none of the keys generation, code")
            with Sandbox() as box:
                for program, output in BLOCKS.findall(text):
                    found.append({"line": line, "recorded": output.strip(), "now": shown(box.run(program))})
            progress.advance_to(position)
    if not found:
        raise UserError(f"{path}: no programs with their output")
    return found


def main() -> None:
    """The command: its flags, then `replay`."""
    path = flags.DEFINE_string("input", None, "JSON lines file of transcripts.", required=True)
    as_json = flags.DEFINE_bool("json", False, "Print the figures as JSON.")

    def command() -> None:
        file = pathlib.Path(path.value)
        if not file.is_file():
            raise UserError(f"--input={path.value}: no such file")
        found = replay(file)
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
