"""Generation in the terminal: text that is printed while it is generated, and a chat on standard input."""

import contextlib
import importlib
import io
import itertools
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rho1_jax.data import records
from rho1_jax.data.chat_template import Message
from rho1_jax.models.generation import Continuation, Generator, Prompt
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.progress import waiting

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab and the line break


def for_terminal(text: str) -> str:
    """The text for standard output. Control characters are escaped for a terminal, which would obey them."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text) if sys.stdout.isatty() else text


def chat(
    generator: Generator,
    encode: Callable[[list[Message]], list[int]],
    context_length: int,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Answers the messages on standard input, as one conversation, until its end or /exit.

    Args:
      generator: has one row.
      encode: returns the token ids of a conversation for the assistant to continue, or raises BadRecord.
      context_length: maximum tokens of a conversation, its answer included.
      max_new_tokens: maximum tokens of an answer.
      options: further arguments of `Generator.run`. The request's number is that of the turn, which seeds its draws.

    Raises:
      UserError: a message is refused or does not fit. In a terminal, this is printed instead.
    """
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if terminal:
        with contextlib.suppress(ImportError):  # some builds of Python lack it
            importlib.import_module("readline")  # lets `input` edit a line
        _note("/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer")
    messages: list[Message] = []
    for number in itertools.count():
        try:
            text = _read_message(terminal)
            if text is None:
                return
            if text == "/clear":
                messages = []
                continue
            asked: list[Message] = [*messages, {"role": "user", "content": text}]
            ids, limit = _checked_prompt(encode, asked, context_length, max_new_tokens)
            answer = _answer(generator, number, ids, limit, **options)
            if answer:
                messages = [*asked, {"role": "assistant", "content": answer}]
        except KeyboardInterrupt:  # at the prompt, Ctrl-C drops the line
            if not terminal:
                raise
            print(file=sys.stderr)
        except UserError as error:
            if not terminal:
                raise
            _note(str(error))


def _checked_prompt(
    encode: Callable[[list[Message]], list[int]], messages: list[Message], context_length: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """The token ids of a conversation, and the longest answer. Raises UserError if they are refused or too long."""
    try:
        ids = encode(messages)
    except records.BadRecord as error:
        raise UserError(f"--chat: {error}") from None
    if len(ids) >= context_length:
        raise UserError(
            f"--chat: {len(ids):,} tokens do not fit into the model's context of {context_length:,}; "
            "/clear starts again"
        )
    return ids, min(max_new_tokens, context_length - len(ids))


def _answer(generator: Generator, number: int, prompt: Prompt, max_new_tokens: int, **options: Any) -> str:
    """Prints an answer while it is generated, and returns it. In a terminal, Ctrl-C cuts it off."""
    pieces: list[str] = []
    cut = ""

    def show(text: str) -> None:
        pieces.append(text)
        print(for_terminal(text), end="", flush=True)

    options |= {"max_new_tokens": max_new_tokens}
    try:
        with _interrupted_between_stretches() as check:
            continuation = stream(generator, number, prompt, show, on_tokens=check, **options)
        if len(continuation.token_ids) == max_new_tokens:
            cut = f"cut off after {max_new_tokens:,} tokens"
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        cut = "stopped"
    print(flush=True)
    if cut:
        _note(cut)
    return "".join(pieces)


@contextlib.contextmanager
def _interrupted_between_stretches() -> Iterator[Callable[[int], None]]:
    """Yields an `on_tokens` that raises KeyboardInterrupt after Ctrl-C.

    If Ctrl-C interrupted JAX while it compiles, Python could crash on exit.
    """
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())

    def check(_: int) -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _read_message(terminal: bool) -> str | None:
    """The next line on standard input that is not empty; None at its end or after /exit."""
    text = ""
    while not text:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return None
    return None if text == "/exit" else text


def stream(
    generator: Generator, number: int, prompt: Prompt, show: Callable[[str], None], **options: Any
) -> Continuation:
    """Continues one prompt, and calls `show` with each new piece of text. A terminal shows the wait for the first.

    Args:
      generator: has one row.
      number: number of the request.
      prompt: text or token ids.
      show: prints a piece.
      options: further arguments of `Generator.run`.
    """
    with waiting("reading the prompt (compiles first)") as end_waiting:

        def on_text(_: int, text: str) -> None:
            end_waiting()
            show(text)

        (continuation,) = generator.run(deque([(number, prompt)]), on_text=on_text, **options)
    return continuation
