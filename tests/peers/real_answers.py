"""Few-shot answers of a real model, beside those of Transformers for the same prompts.

python tests/peers/real_answers.py --folder=models/smollm2 --data_dir=data/eval [--task=gsm8k] [--items=100]

Both decode greedily. Prints the share of equal texts, the accuracies, and for each text that differs the first token
that does, with the two logits that Transformers computes there. A gap near zero is a tie that rounding decided.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import transformers

from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.evals.answers import task_questions
from rho1_jax.evals.grading import Grader
from rho1_jax.generate import generate_text
from rho1_jax.runtime.progress import Progress


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text up to its first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=160)
    options = parser.parse_args()
    grader = Grader()
    questions = task_questions(options.task, options.data_dir, options.items, None, False, grader)
    tokenizer = Tokenizer(options.folder)
    prompts = [tokenizer.encode_prompt(question.prompt) for question in questions.items]

    start = time.monotonic()
    ours = generate_text(options.folder, prompts, max_new_tokens=options.max_new_tokens, stops=questions.stops)
    print(f"ours: {time.monotonic() - start:.0f} s", flush=True)

    start, theirs = time.monotonic(), []
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder).eval()
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    with Progress("Transformers", len(prompts), unit="texts") as progress:
        for number, (ids, continuation) in enumerate(zip(prompts, ours)):
            with torch.no_grad():
                row = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                    max_new_tokens=options.max_new_tokens,
                    do_sample=False,
                    stop_strings=list(questions.stops),
                    tokenizer=peer_tokenizer,
                )[0].tolist()
            new = row[len(ids) :]
            theirs.append(cut(peer_tokenizer.decode(new, skip_special_tokens=True), questions.stops))
            if theirs[-1] != continuation.text:
                print(difference(model, peer_tokenizer, ids, new, continuation.token_ids, number), flush=True)
            progress.advance(1)
    print(f"Transformers: {time.monotonic() - start:.0f} s")

    def accuracy(texts: list[str]) -> float:
        pairs = zip(texts, questions.items)
        return float(np.mean([questions.equal(questions.extract(text), item.answer) for text, item in pairs]))

    same = sum(a.text == b for a, b in zip(ours, theirs))
    print(f"equal texts: {same} of {len(theirs)}")
    print(f"accuracy: ours {accuracy([each.text for each in ours]):.1%}, Transformers {accuracy(theirs):.1%}")


def difference(model, tokenizer, ids: list[int], theirs: list[int], ours: list[int], number: int) -> str:
    """Where two continuations differ first, and how close the two tokens are there."""
    where = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if where is None:
        return f"item {number}: the texts end at different places, after {len(ours)} and {len(theirs)} tokens"
    with torch.no_grad():
        logits = model(torch.tensor([ids + theirs[:where]])).logits[0, -1].float()
    a, b = theirs[where], ours[where]
    tokens = f"{tokenizer.decode([a])!r} ({logits[a]:.5f}) there, {tokenizer.decode([b])!r} ({logits[b]:.5f}) here"
    return f"item {number}, token {where}: {tokens}, {abs(logits[a] - logits[b]):.1e} apart"


if __name__ == "__main__":
    main()
