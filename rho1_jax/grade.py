"""Grades generations: extracts each answer, compares it with the right one, and tells the accuracy.

python -m tools.grade --input=FILE.jsonl --task=gsm8k [--json] [--output=FILE.jsonl]

Records have the generation under "generation" (or "code", as Rho-1 published them: a list of one) and the right answer
under "gt" or "answer". Where a record has a "score" of its own, the verdicts that differ are listed.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from rho1_jax.data import records
from rho1_jax.evals.extraction import extract
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, write_text
from rho1_jax.runtime.progress import Progress


def generations(title: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line, record and generation of each record of a JSON lines file, with progress under a title.

    Raises:
      UserError: with file and line, where the file is missing or a record is bad.
    """
    if not path.is_file():
        raise UserError(f"--input={path}: no such file")
    with Progress(title, path.stat().st_size, unit="B") as progress:
        for line, raw, position in records.read(path):
            try:
                record = records.parse(path, raw)
            except records.BadRecord as error:
                raise UserError(f"{path}:{line}: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{line}: not a JSON object")
            yield line, record, field(record, ("generation", "code"), f"{path}:{line}")
            progress.advance_to(position)


def field(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of some keys that a record has, or of the list there. Raises UserError where it has none."""
    found = next((record[name] for name in names if name in record), None)
    if isinstance(found, list):
        found = found[0] if found else None
    if found is None:
        raise UserError(f"{where}: none of the keys {', '.join(names)}")
    return str(found)


def grade(path: pathlib.Path, task: str) -> list[dict[str, Any]]:
    """Each record's extracted answer, the right one, whether it is correct, and the verdict that it came with.

    Raises:
      UserError: with file and line, where a record is bad.
    """
    kind, graded = TASKS[task].kind, []
    with Grader() as grader:
        for line, record, text in generations("grade", path):
            right = field(record, ("gt", "answer"), f"{path}:{line}")
            answer, verdict = extract(text, kind), record.get("score")
            graded.append(
                {
                    "line": line,
                    "extracted": answer,
                    "answer": right,
                    "correct": grader.equal(answer, right, kind),
                    "published": verdict[0] if isinstance(verdict, list) else verdict,
                }
            )
    if not graded:
        raise UserError(f"{path}: no records")
    return graded


def main() -> None:
    """The command: its flags, then `grade`."""
    path = flags.DEFINE_string("input", None, "JSON lines file of generations.", required=True)
    task = flags.DEFINE_enum("task", None, list(TASKS), "Says how answers are read.", required=True)
    as_json = flags.DEFINE_bool("json", False, "Print the figures as JSON.")
    output = flags.DEFINE_string("output", None, "JSON lines file for the graded items.")

    def command() -> None:
        graded = grade(pathlib.Path(path.value), task.value)
        found: dict[str, Any] = {
            "items": len(graded),
            "accuracy": sum(item["correct"] for item in graded) / len(graded),
        }
        told = [item for item in graded if item["published"] is not None]
        differ = [item for item in told if item["correct"] != item["published"]]
        if told:
            found["published_accuracy"] = sum(item["published"] for item in told) / len(told)
            found["same_verdict"] = 1 - len(differ) / len(told)
        if output.value:
            write_text(pathlib.Path(output.value), json_lines(graded))
        if as_json.value:
            json.dump(found | {"differ": differ}, sys.stdout, indent=2)
            print()
            return
        print(
            ", ".join(f"{name} {value:.2%}" if name != "items" else f"{value} items" for name, value in found.items())
        )
        for item in differ:
            ours, theirs = ("right" if verdict else "wrong" for verdict in (item["correct"], item["published"]))
            print(f"line {item['line']}: {item['extracted']!r} for {item['answer']!r} is {ours} here, {theirs} there")

    run(command)


if __name__ == "__main__":
    main()
