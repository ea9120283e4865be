"""Questions with right answers: how they are put, answered, read and graded."""

import dataclasses
import functools
import json
import operator
import pathlib
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from rho1_jax.data import records
from rho1_jax.data.transcripts import ROLE_TEMPLATES
from rho1_jax.evals import extraction
from rho1_jax.evals.grading import Grader
from rho1_jax.evals.tasks import STOPS, TASKS, read_exemplars, read_items
from rho1_jax.evals.tool_use import run_with_tools
from rho1_jax.models.generation import Generator
from rho1_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How questions are put and answers read. Part of the `eval` section of a config.

    Attributes:
      prompt_template: format string over the keys of a question's record.
      answer_pattern: regular expression; the first group of its last match is the answer, in a generation as in the
        record. Where it does not match there is no answer, and the item counts as wrong.
      answer_key: the record's key that holds the right answer, or a text with it.
      stops: strings that end a generation.
      max_new_tokens: longest generation; with tools, between two programs.
      generate_batch: prompts decoded together.
      tool_use: tasks are put without exemplars, as in fine-tuning on transcripts, and programs are run.
    """

    prompt_template: str
    answer_pattern: str
    answer_key: str
    stops: tuple[str, ...]
    max_new_tokens: int
    generate_batch: int
    tool_use: bool


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and the right answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """Some questions of one kind.

    Attributes:
      items: the questions.
      stops: strings that end a generation.
      extract: the answer in a generation, None where there is none.
      equal: whether an extracted answer is the right one.
      tools: whether programs in the generation are run.
    """

    items: list[Question]
    stops: tuple[str, ...]
    extract: Callable[[str], str | None]
    equal: Callable[[str | None, str], bool]
    tools: bool = False


def extract(text: str, pattern: str) -> str | None:
    """The group of the pattern's last match in a text, None where there is none."""
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def read_questions(path: str | pathlib.Path, config: AnswerConfig) -> Questions:
    """Reads a JSON lines file, to be graded by exact match.

    Raises:
      UserError: with file and line, where a record is bad or holds no answer; or the file has none.
    """
    if re.compile(config.answer_pattern).groups != 1:
        raise UserError(f"config.eval.answer_pattern={config.answer_pattern!r} must hold exactly one group")
    questions = []
    for file in records.expand([str(path)]):
        for line, record, _ in records.read(file):
            try:
                parsed = records.parse(file, record)
                prompt = records.document(parsed, [config.prompt_template])
                answer_text = records.document(parsed, ["{" + config.answer_key + "}"])
            except records.BadRecord as error:
                raise UserError(f"{file}:{line}: {error}") from None
            answer = extract(answer_text, config.answer_pattern)
            if answer is None:
                raise UserError(f"{file}:{line}: {config.answer_pattern!r} finds no answer in {answer_text[-80:]!r}")
            questions.append(Question(prompt, answer))
    if not questions:
        raise UserError(f"{path}: no questions")
    return Questions(questions, config.stops, functools.partial(extract, pattern=config.answer_pattern), operator.eq)


def task_questions(
    name: str, data_dir: str, most: int, exemplars: str | None, tool_use: bool, grader: Grader
) -> Questions:
    """A task of `tasks.TASKS`: few-shot, or with tools and no exemplars.

    Args:
      name: of the task.
      data_dir: where the tasks' files lie.
      most: items to take, the first ones; 0: all.
      exemplars: file of exemplars in place of the task's own.
      tool_use: see AnswerConfig.
      grader: that compares answers.

    Raises:
      UserError: a file is missing or bad.
    """
    if name not in TASKS:
        raise UserError(f"config.eval.tasks: {name!r} is none of {', '.join(TASKS)}")
    task = TASKS[name]
    items = read_items(name, data_dir)[: most or None]
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
    config: AnswerConfig,
    *,
    answered: Collection[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Answers questions, but for those whose index is in `answered`, in the order in which the answers end.

    Yields:
      For each question its index, its prompt, the generation, the extracted and the right answer, and whether they are
      equal.
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
    """Share of the results that are correct."""
    return sum(result["correct"] for result in results) / len(results)


def read_answered(path: pathlib.Path, questions: Questions) -> list[dict[str, Any]]:
    """The items that an interrupted evaluation wrote. What was cut short is left out.

    Raises:
      UserError: the file is of other questions.
    """
    items = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError:
            break
    prompts = dict(enumerate(question.prompt for question in questions.items))
    if any(prompts.get(item.get("index")) != item["prompt"] for item in items):
        raise UserError(f"{path} is of other questions; choose another --output")
    return items
