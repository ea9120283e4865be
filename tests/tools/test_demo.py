"""The demo's corpora, and the speed-up in its report."""

import json
import random
import re

import pytest

from tools import demo_corpus
from tools.demo_report import token_speedup


def is_correct(problem):
    """True if every equation of the solution holds and the last result is the answer."""
    results = []
    for step in problem.steps:
        left, _, result = step.partition("=")
        assert re.fullmatch(r"-?\d+([-+*]\d+)*", left), step
        results.append(result)
        if eval(left, {"__builtins__": {}}) != int(result):
            return False
    return results[-1] == problem.answer


@pytest.mark.parametrize("seed", [0, 1])
def test_solutions_are_correct_and_corrupted_ones_mostly_wrong(seed):
    problems = demo_corpus.problems(seed, 400)
    assert all(map(is_correct, problems))
    assert sum(problem.question.startswith("legs") for problem in problems) == round(400 * demo_corpus.WORD_SHARE)
    rng = random.Random(seed)
    corrupted = [demo_corpus.corrupted(problem, rng) for problem in problems]
    assert [problem.question for problem in corrupted] == [problem.question for problem in problems]
    assert sum(map(is_correct, corrupted)) < 20


def test_the_noisy_corpus_has_the_stated_shares():
    problems = demo_corpus.problems(0, 2000)
    text = "".join(demo_corpus.noisy_pages(problems, 0))
    lines = text.splitlines(keepends=True)
    share = sum(len(line) for line in lines if line[:3] in ("Q: ", "S: ", "A: ")) / len(text)
    assert share == pytest.approx(demo_corpus.PROBLEM_SHARE, abs=0.03)
    written = re.findall(r"Q: .*\nS: .*\nA: .*\n", text)
    solutions = {problem.text() for problem in problems}
    kept = sum(block in solutions for block in written)
    assert len(written) == len(problems)
    assert kept / len(problems) == pytest.approx(1 - demo_corpus.WRONG_SHARE, abs=0.05)


def test_no_held_out_question_occurs_in_a_corpus_and_seeds_differ(tmp_path):
    for seed in (0, 1):
        demo_corpus.write_corpora(tmp_path / str(seed), seed, clean=300, noisy=300, questions=50)
    questions = [json.loads(line)["question"] for line in (tmp_path / "0" / "questions.jsonl").open()]
    assert len(questions) == len(set(questions)) == 50
    for name in ("clean", "noisy"):
        text = (tmp_path / "0" / f"{name}.jsonl").read_text()
        assert not [question for question in questions if f"Q: {question}?" in text]
        assert text != (tmp_path / "1" / f"{name}.jsonl").read_text()


def test_token_speedup():
    clm = [{"tokens": 10, "accuracy": 0.1}, {"tokens": 20, "accuracy": 0.3}, {"tokens": 30, "accuracy": 0.3}]
    slm = [{"tokens": 5, "accuracy": 0.2}, {"tokens": 8, "accuracy": 0.4}, {"tokens": 30, "accuracy": 0.1}]
    assert token_speedup(clm, slm) == pytest.approx(20 / 6.5)  # halfway between 0.2 at 5 tokens and 0.4 at 8
    assert token_speedup(clm, clm) == 1.0
    assert token_speedup(slm, clm) is None
    assert token_speedup([{"tokens": 10, "accuracy": 0.0}], slm) is None
