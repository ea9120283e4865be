"""Ask a model questions, extract its answers and grade them."""

import dataclasses
import functools
import json
import operator
import pathlib
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
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


def last_match(text: str, pattern: str) -> str | None:
    """The group of the pattern's last match in the text, stripped. None if nothing matches."""
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def read_questions(path: str | pathlib.Path, config: EvalConfig) -> Questions:
    """Reads questions from a JSON lines file. Their answers are graded by exact match.

    Raises:
      UserError: a record is bad or has no answer (the message names file and line), or the file has no questions.
    """
    if re.compile(config.answer_pattern).groups != 1:
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
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Answers the questions, except those whose index is in `answered`, and grades each answer.

    Yields:
      One dict for each question, in the order in which the generations end: its index, its prompt, the generation, the
      extracted answer, the right answer, and whether the two are equal.
    """
    items = questions.items
    requests = [(index, item.prompt) for index, item in enumerate(items) if index not in answered]
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": temperature, "seed": seed}
    if questions.tools:
        generations: Iterator[tuple] = run_with_tools(generator, requests, questions.stops, **options)
    else:
        generations = generator.run(deque(requests), stops=questions.stops, **options)
    for index, generation, *_ in generations:
        extracted = questions.extract(generation)
        yield {
            "index": index,
            "prompt": items[index].prompt,
            "generation": generation,
            "extracted": extracted,
            "answer": items[index].answer,
            "correct": questions.equal(extracted, items[index].answer),
        }


def accuracy(results: Sequence[dict[str, Any]]) -> float:
    """The fraction of results that are correct."""
    return sum(result["correct"] for result in results) / len(results)


def read_answered(path: pathlib.Path, questions: Questions) -> list[dict[str, Any]]:
    """The graded items that an interrupted evaluation wrote, without a last line that was cut short.

    Raises:
      UserError: the file holds answers to other questions.
    """
    items = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError:
            break
    prompts = dict(enumerate(question.prompt for question in questions.items))
    if any(prompts.get(item.get("index")) != item["prompt"] for item in items):
        raise UserError(f"{path} holds answers to other questions; choose another --output")
    return items
