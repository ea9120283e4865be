"""The math tasks of Rho-1 (arXiv 2404.07965, section 3.1): how to read their items and build prompts from them.

The files have the layout of the public math-evaluation-harness: DIR/TASK/test.jsonl.

Add a task of your own to `TASKS`, for example in a config file. See `Task` for the fields:

    tasks.TASKS["mine"] = tasks.Task(
        file="mine/test.jsonl", kind="math", item=lambda record: tasks.Item(record["q"], record["a"]), shots=4
    )
"""

import ast
import dataclasses
import importlib
import importlib.resources
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rho1_jax.evals.extraction import last_boxed
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.schema import parse_json

Record = dict[str, Any]
LETTERS = "ABCDE"
STOPS = ("</s>", "\n\nQuestion:", "\n\nProblem:")


class Item(NamedTuple):
    """A question as the prompt shows it, and its right answer."""

    question: str
    answer: str


class Exemplar(NamedTuple):
    """A question with a worked solution, which ends in the form that the model's answer should have."""

    question: str
    solution: str


class PromptForm(NamedTuple):
    """The text around each question of a prompt: before the question, and between the question and its solution."""

    head: str
    middle: str


QUESTION_ANSWER = PromptForm("Question: ", "\nAnswer: ")
PROBLEM_SOLUTION = PromptForm("Problem:\n", "\n\nSolution:\n")  # Minerva's prompt for MATH


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions with right answers, and how to ask and grade them.

    Attributes:
      file: path of the items, relative to config.eval.data_dir. Either JSON lines, one record per line; or, if the name
        ends in .json, one JSON object {id: record}.
      kind: how answers are extracted and compared. "choice": a letter from A to E. "math": a formula, a number or a
        short text. See `extraction.extract` and `Grader.equal`.
      item: turns a record into an Item. It may raise any Exception for a bad record; the user then sees the file, the
        line and the error.
      shots: number of exemplars in a prompt; 0: none.
      exemplars: the set they come from. "gsm8k" and "math" are the sets in lm-eval; any other name stands for the file
        exemplars/NAME.jsonl in this package. "": the task has no set, and needs --exemplars=TASK=FILE if `shots` > 0.
      form: the text around each question in a prompt.
    """

    file: str
    kind: str
    item: Callable[[Record], Item]
    shots: int
    exemplars: str = ""
    form: PromptForm = QUESTION_ANSWER

    def prompt(self, question: str, exemplars: list[Exemplar]) -> str:
        """A few-shot prompt: the exemplars, then the question. It does not end in a space."""
        head, middle = self.form
        shots = "".join(f"{head}{exemplar.question}{middle}{exemplar.solution}\n\n" for exemplar in exemplars)
        return f"{shots}{head}{question}{middle}".rstrip(" ")


def _gsm8k(record: Record) -> Item:
    return Item(record["question"], record["answer"].rsplit("####", 1)[1].strip().replace(",", ""))


def _math(record: Record) -> Item:
    boxed = record["answer"] if "answer" in record else last_boxed(record["solution"])
    if boxed is None:
        raise ValueError("the solution has no boxed answer")
    return Item(record["problem"], boxed)


def _svamp(record: Record) -> Item:
    body = record["Body"].strip()
    return Item(
        f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {record['Question']}", _number(record["Answer"])
    )


def _asdiv(record: Record) -> Item:
    return Item(f"{record['body']} {record['question']}", re.sub(r"\s+\(.*?\)", "", record["answer"]))


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
    if len(choices) > len(LETTERS) or right not in tuple(LETTERS[: len(choices)]):
        raise ValueError(f"the right answer is {right!r}, of {len(choices)} choices")
    return Item(f"{question}\nAnswer Choices: {listed}", right)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else repr(value)


TASKS = {
    "gsm8k": Task("gsm8k/test.jsonl", "math", _gsm8k, 8, "gsm8k"),
    "math": Task("math/test.jsonl", "math", _math, 4, "math", PROBLEM_SOLUTION),
    "math_oai": Task("math_oai/test.jsonl", "math", _math, 4, "math", PROBLEM_SOLUTION),
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
      UserError: the file is missing or empty, or a record does not fit the task (the message names file and line).
    """
    task, items = TASKS[name], []
    path = local_path(data_dir, "config.eval.data_dir") / task.file
    if not path.is_file():
        raise UserError(f"{path}: no such file; task {name} reads its items from it (see config.eval.data_dir)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    if path.suffix == ".json":
        records = [(f"{path}: {key}", record) for key, record in parse_json(content, dict[str, Record], path).items()]
    else:
        lines = [
            (f"{path}:{number}", line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()
        ]
        records = [(where, parse_json(line, Record, f"{where}: not a record of task {name}")) for where, line in lines]
    for where, record in records:
        try:
            item = task.item(record)
            if not all(isinstance(text, str) for text in item):
                raise TypeError("its question and answer must be text")
        except Exception as error:  # the task's own function may raise anything
            raise UserError(f"{where}: not a record of task {name}: {error!r}") from None
        items.append(item)
    if not items:
        raise UserError(f"{path}: holds no records for task {name}")
    return items


def read_exemplars(name: str, file: str | None) -> list[Exemplar]:
    """The exemplars of a task.

    Args:
      name: a key of `TASKS`.
      file: JSON lines of {"question", "solution"} to use instead of the task's own exemplars; None: the task's own.

    Raises:
      UserError: the task has no exemplars of its own, they need lm-eval and it is not installed, or the file is
        missing, bad or too short.
    """
    task, option = TASKS[name], f"--exemplars={name}=FILE"
    if not file and not task.exemplars:
        if task.shots:
            raise UserError(f"task {name} has no exemplars of its own and needs {task.shots}; give {option}")
        return []
    try:
        if file:
            path = local_path(file, f"config.eval.exemplars: {name}")
            exemplars = _parse_exemplars(path.read_bytes(), f"--exemplars={name}={file}")
        elif task.exemplars == "gsm8k":
            exemplars = _gsm8k_exemplars()
        elif task.exemplars == "math":
            utils = importlib.import_module("lm_eval.tasks.minerva_math.utils")
            exemplars = [Exemplar(shot["problem"], shot["solution"]) for shot in utils.list_fewshot_samples()]
        else:
            own = importlib.resources.files("rho1_jax.evals") / "exemplars" / f"{task.exemplars}.jsonl"
            exemplars = _parse_exemplars(own.read_bytes(), task.exemplars)
    except ModuleNotFoundError as error:
        raise UserError(f"task {name}: {error}; install the extra `eval`, or give {option}") from None
    except OSError as error:
        if file:
            raise UserError(f"--exemplars={name}={file}: {error}") from None
        raise UserError(f"task {name}: no exemplars {task.exemplars!r}: {error}; give {option}") from None
    if len(exemplars) < task.shots:
        raise UserError(f"task {name} needs {task.shots} exemplars; {file or task.exemplars} has only {len(exemplars)}")
    return exemplars[: task.shots]


def _parse_exemplars(content: bytes, file: str) -> list[Exemplar]:
    lines = enumerate(content.split(b"\n"), start=1)
    return [parse_json(line, Exemplar, f"{file}:{number}") for number, line in lines if line.strip()]


def _gsm8k_exemplars() -> list[Exemplar]:
    import yaml  # installed with lm-eval

    path = importlib.resources.files("lm_eval") / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [Exemplar(sample["question"], sample["target"]) for sample in samples]
