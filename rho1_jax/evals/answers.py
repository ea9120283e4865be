"""Exact-match accuracy on files of questions and answers."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from rho1_jax.data import records
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.errors import UserError
from rho1_jax.files import write_text
from rho1_jax.generate import generate
from rho1_jax.model import Params


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How questions are put and answers read. Part of the `eval` section of a config.

    Attributes:
      prompt_template: format string over the keys of a question's record.
      answer_pattern: regular expression; the first group of its last match is the answer, in a generation as in the
        record. Where it does not match there is no answer, and the item counts as wrong.
      answer_key: the record's key that holds the right answer, or a text with it.
      stops: strings that end a generation.
      max_new_tokens: longest generation.
      generate_batch: prompts decoded together.
    """

    prompt_template: str
    answer_pattern: str
    answer_key: str
    stops: tuple[str, ...]
    max_new_tokens: int
    generate_batch: int


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and the right answer as `extract` gives it."""

    prompt: str
    answer: str


def extract(text: str, pattern: str) -> str | None:
    """The answer in a text, None where there is none."""
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def read_questions(path: str | pathlib.Path, config: AnswerConfig) -> list[Question]:
    """Reads a JSON lines file.

    Raises:
      UserError: with file and line, where a record is bad or holds no answer.
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
    return questions


def answer_all(
    graphdef: nnx.GraphDef,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: AnswerConfig,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Answers questions a batch at a time.

    Yields:
      For each question its prompt, the generation, the extracted and the right answer, and whether they are equal.
    """
    for start in range(0, len(questions), config.generate_batch):
        batch = questions[start : start + config.generate_batch]
        # The last batch is filled up, so that one shape is compiled.
        prompts = [question.prompt for question in batch]
        prompts += prompts[-1:] * (config.generate_batch - len(prompts))
        generations = generate(
            graphdef,
            params,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            stops=config.stops,
            temperature=temperature,
            seed=seed + start,
        )
        for question, generation in zip(batch, generations):
            extracted = extract(generation, config.answer_pattern)
            yield {
                "prompt": question.prompt,
                "generation": generation,
                "extracted": extracted,
                "answer": question.answer,
                "correct": extracted == question.answer,
            }


def accuracy(results: Sequence[dict[str, Any]]) -> float:
    """Share of the results that are correct."""
    return sum(result["correct"] for result in results) / len(results)


def write_results(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_text(path, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
