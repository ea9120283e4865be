"""Grades generations: extracts each answer, compares it with the right one, and prints the accuracy.

rho1 grade --input=FILE.jsonl --task=gsm8k [--json] [--output=FILE.jsonl]

A record holds the generation under "generation" (or under "code" as a list of one, as Rho-1 published them) and the
right answer under "gt" or "answer". If records also hold a verdict ("score" or "correct"), the verdicts that differ
are listed.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pydantic
from absl import flags

from rho1_jax.data import records
from rho1_jax.evals.extraction import extract
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import TASKS
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, local_path, write_text
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.schema import parse_json

Answer = str | int | pydantic.FiniteFloat | None


class Record(pydantic.BaseModel):
    """A line of the input. Other keys are ignored."""

    generation: str | None = None
    code: str | list[str] | None = None
    gt: Answer | list[Answer] = None
    answer: Answer | list[Answer] = None
    score: bool | list[bool] | None = None
    correct: bool | None = None
    index: int | str | None = None
    idx: int | str | None = None


def generations(title: str, path: pathlib.Path) -> Iterator[tuple[int, Record, str]]:
    """Yields line number, record and generation of each record of a JSON lines file. `title` names the progress bar.

    Raises:
      UserError: the file is missing, or a record is bad or repeats an index (the message names file and line).
    """
    if not path.is_file():
        raise UserError(f"--input={path}: no such file")
    lines: dict[int | str, int] = {}
    with Progress(title, path.stat().st_size, unit="B") as progress:
        for line, raw, position in records.read(path):
            where = f"{path}:{line}"
            record = parse_json(json.dumps(raw) if isinstance(raw, dict) else raw, Record, where)
            index = record.idx if record.index is None else record.index
            if index is not None and lines.setdefault(index, line) != line:
                raise UserError(f"{where}: index {index!r} is already on line {lines[index]}; remove one of the two")
            yield line, record, field(record, ("generation", "code"), where)
            progress.advance_to(position)


def field(record: Record, names: tuple[str, ...], where: str) -> str:
    """The value of the first of `names` in the record. From a list, it takes the first element.

    Raises:
      UserError: the record has none of them.
    """
    value = next((getattr(record, name) for name in names if name in record.model_fields_set), None)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        raise UserError(f"{where}: none of the keys {', '.join(names)}")
    return str(value)


def grade(path: pathlib.Path, task: str) -> list[dict[str, Any]]:
    """Grades each record: its extracted answer, the right answer, whether they are equal, and the published verdict.

    Raises:
      UserError: a record is bad (with file and line), or the file has none.
    """
    kind, graded = TASKS[task].kind, []
    with Grader() as grader:
        for line, record, text in generations("grade", path):
            right = field(record, ("gt", "answer"), f"{path}:{line}")
            answer, verdict = extract(text, kind), record.correct if record.score is None else record.score
            if isinstance(verdict, list):
                verdict = verdict[0] if verdict else None
            graded.append(
                {
                    "line": line,
                    "extracted": answer,
                    "answer": right,
                    "correct": grader.equal(answer, right, kind),
                    "published": verdict,
                }
            )
    if not graded:
        raise UserError(f"{path}: no records")
    return graded


def main() -> None:
    """The command: parses the flags and calls `grade`."""
    path = flags.DEFINE_string("input", None, "JSON lines file of generations.", required=True)
    task = flags.DEFINE_string("task", None, "Task, which decides how answers are read.", required=True)
    as_json = flags.DEFINE_bool("json", False, "Print the figures as JSON.")
    output = flags.DEFINE_string("output", None, "JSON lines file to write the graded items to.")

    def command() -> None:
        output_path = local_path(output.value, "--output") if output.value else None
        if task.value not in TASKS:  # which a plugin may have extended
            raise UserError(f"--task={task.value!r} is not one of {', '.join(TASKS)}")
        graded = grade(local_path(path.value, "--input"), task.value)
        figures: dict[str, Any] = {
            "items": len(graded),
            "accuracy": sum(item["correct"] for item in graded) / len(graded),
        }
        published = [item for item in graded if item["published"] is not None]
        differ = [item for item in published if item["correct"] != item["published"]]
        if published:
            figures["published_accuracy"] = sum(item["published"] for item in published) / len(published)
            figures["same_verdict"] = 1 - len(differ) / len(published)
        if output_path:
            write_text(output_path, json_lines(graded))
        if as_json.value:
            json.dump(figures | {"differ": differ}, sys.stdout, indent=2)
            print()
            return
        print(
            ", ".join(f"{name} {value:.2%}" if name != "items" else f"{value} items" for name, value in figures.items())
        )
        for item in differ:
            here, there = ("right" if verdict else "wrong" for verdict in (item["correct"], item["published"]))
            print(f"line {item['line']}: {item['extracted']!r} for {item['answer']!r} is {here} here, {there} there")

    run(command)


if __name__ == "__main__":
    main()
