"""The math tasks of Rho-1 (arXiv 2404.07965, section 3.1): where each one's items are, and how a prompt is made of one.

The files are laid out as the public math-evaluation-harness has them: DIR/TASK/test.jsonl.
"""

import ast
import dataclasses
import importlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rho1_jax.evals.extraction import last_boxed
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

Record = dict[str, Any]
LETTERS = "ABCDE"
STOPS = ("</s>", "\n\nQuestion:", "\n\nProblem:")


class Item(NamedTuple):
    """A question as it is put, and its right answer."""

    question: str
    answer: str


class Exemplar(NamedTuple):
    """A question with a worked solution, which ends as an answer is expected to."""

    question: str
    solution: str


@dataclasses.dataclass(frozen=True)
class Task:
    """Attributes:
    file: under the data directory; JSON lines, or JSON of {id: record}.
    kind: how an answer is read, see `extraction.extract`.
    item: a record as an item.
    shots: exemplars in a prompt.
    exemplars: name of the set they come from.
    """

    file: str
    kind: str
    item: Callable[[Record], Item]
    shots: int
    exemplars: str

    def prompt(self, question: str, exemplars: list[Exemplar]) -> str:
        """The exemplars, then the question."""
        head, middle = ("Problem:\n", "\n\nSolution:\n") if self.exemplars == "math" else ("Question: ", "\nAnswer: ")
        shown = "".join(f"{head}{exemplar.question}{middle}{exemplar.solution}\n\n" for exemplar in exemplars)
        return f"{shown}{head}{question}{middle}".rstrip(" ")


def _gsm8k(record: Record) -> Item:
    return Item(record["question"], record["answer"].rsplit("####", 1)[1].strip().replace(",", ""))


def _math(record: Record) -> Item:
    boxed = record["answer"] if "answer" in record else last_boxed(record["solution"])
    if boxed is None:
        raise ValueError("the solution has no box")
    return Item(record["problem"], boxed)


def _svamp(record: Record) -> Item:
    body = record["Body"].strip()
    return Item(
        f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {record['Question']}", _number(record["Answer"])
    )


def _asdiv(record: Record) -> Item:
    return Item(f"{record['body']} {record['question']}", re.sub(r"\s*\(.*?\)", "", record["answer"]))


def _with_target(record: Record) -> Item:
    return Item(record["input"], _number(record["target"]))


def _tabmwp(record: Record) -> Item:
    title = f'regarding "{record["table_title"]}" ' if record["table_title"] else ""
    question = f"Read the following table {title}and answer a question:\n{record['table']}\n{record['question']}"
    if record["unit"]:
        question += f" (Unit: {record['unit']})"
    if record["choices"]:
        question += f" Please select from the following options: {', '.join(record['choices'])}"
    return Item(question, record["answer"])


def _mathqa(record: Record) -> Item:
    options = record["options"]  # "a ) 12 , b ) 16" or "['a ) 12', 'b ) 16']"
    parts = ast.literal_eval(options) if options.startswith("[") else re.split(r"\s*,\s*(?=[a-e] \) )", options)
    choices = [re.sub(r"^(?:[a-e] \) ?)+", "", part).strip() for part in parts]
    return _choices(record["problem"], choices, record["correct"].upper())


def _mmlu_stem(record: Record) -> Item:
    return _choices(record["question"], record["choices"], LETTERS[record["answer"]])


def _sat_math(record: Record) -> Item:
    _, *parts = re.split(r"(?:^|\s)([A-D])[).]\s*", record["options"])
    return _choices(record["question"], [part.strip() for part in parts[1::2]], record["Answer"])


def _choices(question: str, choices: list[str], right: str) -> Item:
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return Item(f"{question}\nAnswer Choices: {listed}", right)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else repr(value)


TASKS = {
    "gsm8k": Task("gsm8k/test.jsonl", "math", _gsm8k, 8, "gsm8k"),
    "math": Task("math/test.jsonl", "math", _math, 4, "math"),
    "math_oai": Task("math_oai/test.jsonl", "math", _math, 4, "math"),
    "svamp": Task("svamp/test.jsonl", "math", _svamp, 8, "gsm8k"),
    "asdiv": Task("asdiv/test.jsonl", "math", _asdiv, 8, "gsm8k"),
    "mawps": Task("mawps/test.jsonl", "math", _with_target, 8, "gsm8k"),
    "tabmwp": Task("tabmwp/problems_test1k.json", "math", _tabmwp, 8, "tabmwp"),
    "mathqa": Task("mathqa/test.jsonl", "choice", _mathqa, 4, "mathqa"),
    "mmlu_stem": Task("mmlu_stem/test.jsonl", "choice", _mmlu_stem, 4, "mmlu_stem"),
    "sat_math": Task("sat_math/test.jsonl", "choice", _sat_math, 4, "sat_math"),
    "gsm_hard": Task("gsm_hard/test.jsonl", "math", _with_target, 8, "gsm8k"),
}


def read_items(name: str, data_dir: str | pathlib.Path) -> list[Item]:
    """All items of a task.

    Raises:
      UserError: with file and line, where the file is missing or empty or a record is not of the task's form.
    """
    task, items = TASKS[name], []
    path = local_path(data_dir, "config.eval.data_dir") / task.file
    if not path.is_file():
        raise UserError(f"{path}: no such file; task {name} is read from there")
    text = path.read_text(encoding="utf-8")
    try:
        records = list(json.loads(text).values()) if path.suffix == ".json" else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not JSON of {{id: record}}: {error}") from None
    lines = text.split("\n") if records is None else records
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                items.append(task.item(json.loads(line) if records is None else line))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise UserError(f"{path}:{number}: no record of task {name}: {error!r}") from None
    if not items:
        raise UserError(f"{path}: no records of task {name}")
    return items


def read_exemplars(name: str, file: str | None) -> list[Exemplar]:
    """A task's exemplars: those of a file of {"question", "solution"} lines, of lm-eval, or of this package.

    Raises:
      UserError: lm-eval is not installed where it has them, or the file is bad or too short.
    """
    task = TASKS[name]
    try:
        if file:
            lines = local_path(file, f"config.eval.exemplars: {name}").read_text(encoding="utf-8").split("\n")
            found = [Exemplar(**json.loads(line)) for line in lines if line]
        elif task.exemplars == "gsm8k":
            found = _gsm8k_exemplars()
        elif task.exemplars == "math":
            utils = importlib.import_module("lm_eval.tasks.minerva_math.utils")
            found = [Exemplar(shot["problem"], shot["solution"]) for shot in utils.list_fewshot_samples()]
        else:
            ours = importlib.resources.files("rho1_jax.evals") / "exemplars" / f"{task.exemplars}.jsonl"
            found = [Exemplar(**json.loads(line)) for line in ours.read_text(encoding="utf-8").split("\n") if line]
    except ModuleNotFoundError as error:
        raise UserError(f"task {name}: {error}; install the extra `eval`, or give --exemplars={name}=FILE") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--exemplars={name}={file}: {error}") from None
    if len(found) < task.shots:
        raise UserError(f"task {name} needs {task.shots} exemplars; {file or task.exemplars} has {len(found)}")
    return found[: task.shots]


def _gsm8k_exemplars() -> list[Exemplar]:
    import yaml  # comes with lm-eval

    path = importlib.resources.files("lm_eval") / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [Exemplar(sample["question"], sample["target"]) for sample in samples]
