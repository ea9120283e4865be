"""Generate the demo's corpora: worked problems, and a web-like corpus that hides some of them in noise.

reasoning-gym generates the problems. This module writes the worked solutions from each item's metadata.
"""

import pathlib
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from rho1_jax.runtime.files import json_lines, write_text

WORD_SHARE = 0.7  # of the problems; the rest are arithmetic
PROBLEM_SHARE = 0.15  # of the noisy corpus's characters
WRONG_SHARE = 0.4  # of the noisy corpus's problems
PROBLEMS_A_PAGE = 4

WORDS = (
    "river stone market window letter garden engine silver morning travel music yellow corner bottle planet summer "
    "castle forest ticket mirror copper winter bridge simple finger carpet velvet rocket paper candle little orange "
    "sudden basket kitchen doctor island shadow circle pocket harbor thunder blanket meadow lantern magnet pepper"
).split()
FURNITURE = (
    "Home | News | About us | Contact",
    "Sign in to leave a comment",
    "Accept all cookies",
    "Share this page: mail, print, link",
    "All rights reserved",
    "Read more »",
    "You are here: start > archive > page",
)


class Problem(NamedTuple):
    question: str
    steps: list[str]
    answer: str

    def text(self) -> str:
        return f"Q: {self.question}?\nS: {', '.join(self.steps)}\nA: {self.answer}\n"


def arithmetic(seed: int, count: int) -> Iterator[Problem]:
    """Sums and differences of two numbers with one or two digits, solved tens first, then ones."""
    items = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=count, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    for item in items:
        left, sign, right = item["metadata"]["expression"].split()
        tens, ones = divmod(int(right), 10)
        steps = [f"{left}{sign}{ones}={item['answer']}"]
        if tens:
            partial = int(left) + (10 * tens if sign == "+" else -10 * tens)
            steps = [f"{left}{sign}{10 * tens}={partial}", f"{partial}{sign}{ones}={item['answer']}"]
        yield Problem(f"{left}{sign}{right}", steps, item["answer"])


def word_problems(seed: int, count: int) -> Iterator[Problem]:
    """Problems that count the legs of one or two kinds of animals."""
    items = reasoning_gym.create_dataset(
        "leg_counting", seed=seed, size=count, min_animals=1, max_animals=2, min_instances=1, max_instances=5
    )
    for item in items:
        animals = item["metadata"]["animals"]
        legs = [str(number * ANIMALS[name]) for name, number in animals.items()]
        steps = [f"{number}*{ANIMALS[name]}={sum_}" for (name, number), sum_ in zip(animals.items(), legs)]
        if len(legs) > 1:
            steps.append(f"{'+'.join(legs)}={item['answer']}")
        herd = " and ".join(f"{number} {name}" for name, number in animals.items())
        yield Problem(f"legs of {herd}", steps, item["answer"])


def problems(seed: int, count: int) -> list[Problem]:
    """`count` arithmetic and word problems, shuffled."""
    words = round(WORD_SHARE * count)
    mixed = [*arithmetic(seed, count - words), *word_problems(seed, words)]
    random.Random(seed).shuffle(mixed)
    return mixed


def corrupted(problem: Problem, rng: random.Random) -> Problem:
    """The problem with every result and the answer replaced by random numbers."""

    def wrong(number: str) -> str:
        return str(rng.randrange(max(10, 2 * abs(int(number)))))

    steps = [re.sub(r"=(-?\d+)", lambda match: "=" + wrong(match[1]), step) for step in problem.steps]
    return Problem(problem.question, steps, wrong(problem.answer))


def noise(rng: random.Random) -> str:
    """A line with nothing to learn: page furniture, random words, an identifier or numbers."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(FURNITURE) + "\n"
    if kind < 3:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, 12))) + ".\n"
    if kind < 5:
        return f"id {rng.getrandbits(64):x} ref {rng.randrange(10**8)}\n"
    return f"tel {rng.randrange(10**9)}, {rng.choice(WORDS)} {rng.randrange(1000)}-{rng.randrange(10**4)}\n"


def clean_pages(worked: list[Problem]) -> Iterator[str]:
    """Pages of worked problems."""
    for start in range(0, len(worked), PROBLEMS_A_PAGE):
        yield "".join(problem.text() for problem in worked[start : start + PROBLEMS_A_PAGE])


def noisy_pages(worked: list[Problem], seed: int) -> Iterator[str]:
    """Pages of problems in the same format, some with wrong solutions, shuffled with lines of noise."""
    rng = random.Random(seed)
    for start in range(0, len(worked), PROBLEMS_A_PAGE):
        page = worked[start : start + PROBLEMS_A_PAGE]
        lines = [(corrupted(problem, rng) if rng.random() < WRONG_SHARE else problem).text() for problem in page]
        missing = sum(map(len, lines)) * (1 - PROBLEM_SHARE) / PROBLEM_SHARE
        while missing > 0:
            lines.append(noise(rng))
            missing -= len(lines[-1])
        rng.shuffle(lines)
        yield "".join(lines)


def write_corpora(directory: pathlib.Path, seed: int, clean: int, noisy: int, questions: int) -> None:
    """Write clean.jsonl, noisy.jsonl and questions.jsonl, with the given numbers of problems.

    The questions in questions.jsonl are distinct, and none of them occurs in a corpus. A corpus may therefore have
    slightly fewer problems than asked for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    held_out = list({problem.question: problem for problem in problems(3 * seed, 2 * questions)}.values())[:questions]
    held_out_questions = {problem.question for problem in held_out}
    clean_problems, noisy_problems = (
        [problem for problem in problems(3 * seed + number, count) if problem.question not in held_out_questions]
        for number, count in ((1, clean), (2, noisy))
    )
    records = {
        "clean": ({"text": page} for page in clean_pages(clean_problems)),
        "noisy": ({"text": page} for page in noisy_pages(noisy_problems, seed)),
        "questions": ({"question": problem.question, "answer": f"A: {problem.answer}"} for problem in held_out),
    }
    for name, lines in records.items():
        write_text(directory / f"{name}.jsonl", json_lines(lines))
