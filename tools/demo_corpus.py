"""The demonstration's corpora: worked problems, and a model of the web that hides some of them among noise.

Problems come from reasoning-gym's generators; the worked solutions are written here from the items' metadata.
"""

import random
import re
from collections.abc import Iterator

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

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


def arithmetic(seed: int, count: int) -> Iterator[tuple[str, list[str], str]]:
    """Sums and differences of two numbers: (question, steps of the solution, answer)."""
    items = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=count, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    for item in items:
        left, sign, right = item["metadata"]["expression"].split()
        a, b = int(left), int(right)
        tens = b // 10 * 10
        partial = a + tens if sign == "+" else a - tens
        steps = [f"{a}{sign}{tens}={partial}", f"{partial}{sign}{b % 10}={item['answer']}"] if tens else [f"{a}{sign}{b}={item['answer']}"]
        yield f"{a}{sign}{b}", steps, item["answer"]


def word_problems(seed: int, count: int) -> Iterator[tuple[str, list[str], str]]:
    """How many legs some animals have together: (question, steps of the solution, answer)."""
    items = reasoning_gym.create_dataset(
        "leg_counting", seed=seed, size=count, min_animals=1, max_animals=2, min_instances=1, max_instances=5
    )
    for item in items:
        animals = item["metadata"]["animals"]
        steps = [f"{n}*{ANIMALS[name]}={n * ANIMALS[name]}" for name, n in animals.items()]
        if len(animals)>1: steps.append("+".join(str(n * ANIMALS[name]) for name, n in animals.items())+"="+item["answer"])
        asked = " and ".join(f"{n} {name}" for name, n in animals.items())
        yield f"legs of {asked}", steps, item["answer"]


def solved(question: str, steps: list[str], answer: str) -> str:
    return f"Q: {question}?\nS: {', '.join(steps)}\nA: {answer}\n"

def corrupt(rng, steps, answer):
    def wrong(number: re.Match) -> str:
        return "=" + str(rng.randrange(10 ** (len(number.group()) - 1)))
    def w2(s): 
        n=int(s); 
        return str(rng.randrange(max(10,2*abs(n))))
    return [re.sub(r"=-?\d+", wrong, step) for step in steps], w2(answer)

def junk(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(FURNITURE)+"\n"
    if kind == 1:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 12))) + ".\n"
    if kind == 2:
        return f"id {rng.getrandbits(64):x} ref {rng.randrange(10**8)}\n"
    return f"tel {rng.randrange(10**9)}, {rng.choice(WORDS)} {rng.randrange(1000)}-{rng.randrange(10**4)}\n"
