"""A chat on standard input, with a generator whose answers are known."""

import io
import os
import signal
import sys

import pytest

from rho1_jax.data.records import BadRecord
from rho1_jax.models import terminal as terminal_module
from rho1_jax.models.generation import Continuation
from rho1_jax.runtime.errors import UserError

CTRL_C = "Ctrl-C"


class Answers:
    """In place of a generator: gives texts in pieces, or Ctrl-C, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.numbers, self.limits = list(answers), [], [], []

    def run(self, requests, on_text, on_tokens, max_new_tokens, **options):
        number, prompt = requests.popleft()
        self.asked.append(prompt)
        self.numbers.append(number)
        self.limits.append(max_new_tokens)
        pieces = self.answers.pop(0)
        for piece in pieces:
            if piece == CTRL_C:
                os.kill(os.getpid(), signal.SIGINT)
            on_tokens(1)
            on_text(number, piece)
        yield Continuation(number, "".join(pieces), [0] * len(pieces), [0.0] * len(pieces))


def chat(monkeypatch, lines, answers, terminal=False, context=1000, encode=None):
    """Chats with `answers`, with contents of messages as the prompts."""
    stdin = io.StringIO(lines)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    encode = encode or (lambda messages: [message["content"] for message in messages])
    terminal_module.chat(answers, encode, context, 50, stops=())


def test_each_turn_sees_the_conversation_and_draws_anew(monkeypatch, capsys):
    answers = Answers(["A", "B"], [], ["C"], ["D"])
    chat(monkeypatch, "one\ntwo\nthree\n /clear \nfour", answers)
    # The second answer is empty, so it and its question are forgotten.
    assert answers.asked == [["one"], ["one", "AB", "two"], ["one", "AB", "three"], ["four"]]
    assert len(set(answers.numbers)) == 4
    assert capsys.readouterr().out == "AB\n\nC\nD\n"


def test_a_terminal_gets_escaped_control_characters_and_the_model_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answers = Answers(["\x1b[2J"], ["B"])
    chat(monkeypatch, "one\ntwo\n", answers)
    assert capsys.readouterr().out == "\\x1b[2J\nB\n"
    assert answers.asked[1] == ["one", "\x1b[2J", "two"]


def test_ctrl_c_stops_an_answer_in_a_terminal(monkeypatch, capsys):
    answers = Answers(["half", CTRL_C], [CTRL_C], ["C"])
    chat(monkeypatch, "one\ntwo\nthree\n", answers, terminal=True)
    assert answers.asked == [["one"], ["one", "half", "two"], ["one", "half", "three"]]
    printed = capsys.readouterr()
    assert printed.out == "> half\n> \n> C\n> \n" and printed.err.count("(stopped)") == 2
    assert "/clear forgets" in printed.err
    with pytest.raises(KeyboardInterrupt):
        chat(monkeypatch, "one\n", Answers([CTRL_C]))


def test_a_conversation_that_is_too_long_is_not_sent(monkeypatch, capsys):
    answers, lines = Answers(["A", "A"], ["B"]), "one\ntwo\n/clear\nthree"
    chat(monkeypatch, lines, answers, context=3, terminal=True)
    assert answers.asked == [["one"], ["three"]] and answers.limits == [2, 2]
    notes = capsys.readouterr().err.splitlines()
    problem = "--chat: 3 tokens do not fit into the model's context of 3; /clear starts again"
    assert notes[1:3] == ["(cut off after 2 tokens)", f"({problem})"]
    with pytest.raises(UserError, match=problem):
        chat(monkeypatch, lines, Answers(["A"]), context=3)


def test_a_message_that_the_template_refuses(monkeypatch, capsys):
    def encode(messages):
        if messages[-1]["content"] == "bad":
            raise BadRecord("the chat template refuses it")
        return [message["content"] for message in messages]

    answers = Answers(["A"])
    chat(monkeypatch, "bad\ngood\n", answers, terminal=True, encode=encode)
    assert answers.asked == [["good"]] and "(--chat: the chat template refuses it)" in capsys.readouterr().err
    with pytest.raises(UserError, match="--chat: the chat template refuses it"):
        chat(monkeypatch, "bad\ngood\n", answers, encode=encode)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
