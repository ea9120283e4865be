"""Ask a model questions, extract its answers and grade them."""

import contextlib
import dataclasses
import functools
import operator
import pathlib
import re
from collections import abc, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from rho1_jax.configs.default import EvalConfig
from rho1_jax.data import records
from rho1_jax.data.transcripts import ROLE_TEMPLATES
from rho1_jax.evals import extraction
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import STOPS, TASKS, read_exemplars, read_items
from rho1_jax.evals.tool_use import run_with_tools
from rho1_jax.models.generation import Generator
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.schema import parse_json


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its right answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions that are answered and graded in the same way.

    Attributes:
      items: the questions.
      stops: strings that end a generation.
      extract: returns the answer in a generation, or None if it has none.
      equal: returns True if an extracted answer matches the right one.
      tools: run the programs in a generation.
    """

    items: list[Question]
    stops: tuple[str, ...]
    extract: Callable[[str], str | None]
    equal: Callable[[str | None, str], bool]
    tools: bool = False


@dataclasses.dataclass(frozen=True)
class GradedItem:
    """A graded answer: one line of an evaluation's NAME.jsonl.

    Attributes:
      index: index of the question, from 0.
      prompt: the question's prompt.
      generation: what the model wrote after it.
      extracted: the answer in the generation; None if it has none.
      answer: the right answer.
      correct: True if the two are equal.
    """

    index: int
    prompt: str
    generation: str
    extracted: str | None
    answer: str
    correct: bool


def last_match(text: str, pattern: str) -> str | None:
    """The group of the pattern's last match in the text, stripped. None if nothing matches."""
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def read_questions(path: str | pathlib.Path, config: EvalConfig) -> Questions:
    """Reads questions from a JSON lines file. Their answers are graded by exact match.

    Raises:
      UserError: a record is bad or has no answer (the message names file and line), the file has no questions, or
        `config.answer_pattern` is not a regular expression with one group.
    """
    try:
        groups = re.compile(config.answer_pattern).groups
    except re.error as error:
        raise UserError(f"config.eval.answer_pattern={config.answer_pattern!r}: {error}") from None
    if groups != 1:
        raise UserError(f"config.eval.answer_pattern={config.answer_pattern!r} must have exactly one group")
    questions = []
    for file in records.expand([str(local_path(path, "config.eval.questions"))]):
        for line, record, _ in records.read(file):
            try:
                parsed = records.parse(file, record)
                prompt = records.document(parsed, [config.prompt_template])
                answer_text = records.document(parsed, ["{" + config.answer_key + "}"])
            except records.BadRecord as error:
                raise UserError(f"{file}:{line}: {error}") from None
            answer = last_match(answer_text, config.answer_pattern)
            if answer is None:
                pattern = f"config.eval.answer_pattern={config.answer_pattern!r}"
                raise UserError(f"{file}:{line}: {pattern} finds no answer in {answer_text[-80:]!r}")
            questions.append(Question(prompt, answer))
    if not questions:
        raise UserError(f"{path}: no questions")
    return Questions(questions, config.stops, functools.partial(last_match, pattern=config.answer_pattern), operator.eq)


def task_questions(
    name: str, data_dir: str, limit: int, exemplars: str | None, tool_use: bool, grader: Grader
) -> Questions:
    """The questions of a task in `tasks.TASKS`: few-shot, or with tools and no exemplars.

    Args:
      name: a key of `tasks.TASKS`.
      data_dir: folder of the tasks' files.
      limit: number of items to take from the start; 0: all.
      exemplars: file of exemplars to use instead of the task's own; None: the task's own.
      tool_use: ask without exemplars, in the form of the transcripts, and run the model's programs.
      grader: compares the answers.

    Raises:
      UserError: the task is unknown, or a file is missing or bad.
    """
    if name not in TASKS:
        raise UserError(f"config.eval.tasks: {name!r} is not one of {', '.join(TASKS)}")
    task = TASKS[name]
    items = read_items(name, data_dir)[: limit or None]
    if tool_use:
        prompts = [ROLE_TEMPLATES["user"].format(content=item.question) for item in items]
    else:
        shots = read_exemplars(name, exemplars)
        prompts = [task.prompt(item.question, shots) for item in items]
    return Questions(
        [Question(prompt, item.answer) for prompt, item in zip(prompts, items)],
        STOPS,
        functools.partial(extraction.extract, kind=task.kind),
        functools.partial(grader.equal, kind=task.kind),
        tool_use,
    )


def answer_all(
    generator: Generator,
    questions: Questions,
    config: EvalConfig,
    *,
    answered: Collection[int] = (),
    **options: Any,
) -> abc.Generator[GradedItem, None, None]:
    """Answers the questions, except those whose index is in `answered`, and grades each answer.

    Args:
      generator: continues prompts.
      questions: what to ask.
      config: `max_new_tokens`, and `generate_batch` as the maximum number of sandboxes.
      answered: indices to leave out.
      options: further arguments of `Generator.run`, such as `temperature`.

    Yields:
      One item for each question, in the order in which the generations end. Its text is valid Unicode.
    """
    items = questions.items
    requests = [(index, item.prompt) for index, item in enumerate(items) if index not in answered]
    options |= {"stops": questions.stops, "max_new_tokens": config.max_new_tokens}
    generations: Any
    if questions.tools:
        generations = run_with_tools(generator, requests, sandboxes=config.generate_batch, **options)
    else:
        generations = generator.run(deque(requests), **options)
    with contextlib.closing(generations):
        for index, text, *_ in generations:
            generation = text.encode("utf-8", "replace").decode()  # a tokenizer may produce lone surrogates
            extracted, answer = questions.extract(generation), items[index].answer
            correct = questions.equal(extracted, answer)
            yield GradedItem(index, items[index].prompt, generation, extracted, answer, correct)


def accuracy(items: Sequence[GradedItem]) -> float:
    """The fraction of items that are correct."""
    return sum(item.correct for item in items) / len(items)


def read_answered(path: pathlib.Path, questions: Questions) -> list[GradedItem]:
    """The graded items that an interrupted evaluation wrote, without a last line that was cut short.

    Raises:
      UserError: another line is bad or repeats an index (the message names file and line), or the file holds answers
        to other questions.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    items: dict[int, GradedItem] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            item = parse_json(line, GradedItem, where)
        except UserError:
            if number == len(lines):  # empty, or cut short
                break
            raise
        if item.index in items:
            raise UserError(
                f"{where}: a second answer to the question with index {item.index}; delete one of the lines"
            )
        if not 0 <= item.index < len(questions.items) or questions.items[item.index] != Question(
            item.prompt, item.answer
        ):
            raise UserError(f"{path} holds answers to other questions (line {number}); choose another --output")
        items[item.index] = item
    return list(items.values())
