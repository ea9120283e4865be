r"""Compare an answer with the right one: as text, as a number, element by element, or as a formula.

math-verify and sympy compare formulas in a separate process, which is killed after a time limit. No part of a
generation is evaluated as code.
"""

import decimal
import importlib
import math
import multiprocessing
import re
import resource
import time
from decimal import Decimal
from typing import Any, NamedTuple

from rho1_jax.evals.answer_text import half_day, is_percentage, normalize
from rho1_jax.runtime.errors import UserError

SECONDS = 5.0  # time limit for one comparison
MEMORY = 4 << 30  # address space of the process, in bytes
TOLERANCE = Decimal("1e-4")  # relative, for numbers that are not both whole
MAX_LENGTH = 1000  # characters; longer answers are only compared as text

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_FRACTION = re.compile(rf"([-+]?)(?:\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|\(?({_NUMBER})\)?/\(?({_NUMBER})\)?)")
_BRACKETED = re.compile(r"([-+]?)\(([^()]+)\)")
_ASSIGNMENT = re.compile(r"((?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z]\))?)?)=([^=]+)")
_IN_BASE = re.compile(r"(-?)0*([0-9][0-9A-Za-z.]*)_\{?(\d+)\}?")
_COLONS = re.compile(r"[\d.]+(?::[\d.]+)+")  # a ratio or a time
_MATRIX = re.compile(r"\\begin\{([pbvB]?)matrix\}(.*)\\end\{[pbvB]?matrix\}", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SENTENCE = re.compile(r"[A-Za-z]{5,}|^[A-Za-z]{3,}$")
_ARITHMETIC = decimal.Context(prec=MAX_LENGTH, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)


class Parts(NamedTuple):
    """The elements of a tuple, interval, list or matrix.

    Attributes:
      form: the brackets, or the lengths of a matrix's rows; "" for a list without brackets, which has no order.
      elements: the elements.
    """

    form: str
    elements: list[str]


def number(text: str) -> Decimal | None:
    """The value of a normalized number, or of a fraction of numbers (a/b or LaTeX); None for anything else."""
    bracketed = _BRACKETED.fullmatch(text)
    outer_sign, body = bracketed.groups() if bracketed else ("", text)
    fraction = _FRACTION.fullmatch(body)
    sign, *numbers = fraction.groups() if fraction else ("", body if re.fullmatch(_NUMBER, body) else None)
    values = [value for value in numbers if value is not None]
    if not values:
        return None
    try:
        value = _ARITHMETIC.create_decimal(values[0])
        if fraction:
            value = _ARITHMETIC.divide(value, _ARITHMETIC.create_decimal(values[1]))
        return value.copy_negate() if (sign == "-") != (outer_sign == "-") else value
    except ArithmeticError:  # a division by zero, or an exponent out of range
        return None


def _numbers_equal(first: Decimal, second: Decimal) -> bool:
    """True if equal within TOLERANCE; whole numbers must be the same."""
    if all(value == value.to_integral_value(context=_ARITHMETIC) for value in (first, second)):
        return first == second
    difference = abs(_ARITHMETIC.subtract(first, second))
    return difference <= _ARITHMETIC.multiply(TOLERANCE, max(abs(first), abs(second)))


def _parts(text: str) -> Parts | None:
    """The elements of a tuple, interval, list or matrix; None for anything else. Nested brackets are not split."""
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].removesuffix("\\\\").split("\\\\")]
        kind = "determinant" if matrix[1] == "v" else "matrix"
        return Parts(f"{kind} {[len(row) for row in rows]}", [element for row in rows for element in row])
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        elements = _split(text[1:-1])
        if elements:
            return Parts(text[0] + text[-1], elements)
    elements = _split(text)
    return Parts("", elements) if elements else None


def _split(text: str) -> list[str] | None:
    """Splits a text at the commas outside of brackets. None if there are none, or if a bracket closes unopened."""
    depth, commas = 0, [-1]
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            commas.append(at)
    ends = [*commas[1:], len(text)]
    return [text[start + 1 : end] for start, end in zip(commas, ends)] if len(ends) > 1 else None


def _named(text: str) -> tuple[str, str]:
    """The name and the value in "y = 2x"; "" and the text itself if it has no such form."""
    assignment = _ASSIGNMENT.fullmatch(text)
    return (assignment[1].lower(), assignment[2]) if assignment else ("", text)


class Grader:
    """Compares answers. Runs a process that compares formulas, and restarts it after a time-out."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: Any = None
        self._connection: Any = None
        self._deadline = math.inf

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def equal(self, answer: str | None, right: str, kind: str = "math") -> bool:
        """True if the answer matches the right one. False for None, and if the comparison times out.

        Args:
          answer: the extracted answer.
          right: the right answer.
          kind: "choice" compares letters, anything else compares formulas and numbers.

        Raises:
          UserError: math-verify is needed but not installed.
        """
        if answer is None:
            return False
        if kind == "choice":
            return answer.strip().upper() == right.strip().upper()
        if max(len(answer), len(right)) > MAX_LENGTH:
            return answer.strip() == right.strip()
        self._deadline = time.monotonic() + self._seconds
        text, right_text = normalize(answer), normalize(right)
        if {half_day(answer), half_day(right)} == {"a", "p"}:
            return False
        if self._equal(text, right_text):
            return True
        if is_percentage(answer) == is_percentage(right):
            return False
        percentage, share = (text, right_text) if is_percentage(answer) else (right_text, text)
        percent, value = number(percentage), number(share)
        return percent is not None and value is not None and _numbers_equal(percent.scaleb(-2, _ARITHMETIC), value)

    def _equal(self, answer: str, right: str) -> bool:
        """True if two normalized answers are equal. Their order makes no difference."""
        if answer.lower() == right.lower():
            return True
        if not answer or not right:
            return False
        (name, value), (right_name, right_value) = _named(answer), _named(right)
        one_is_named = "" in (name, right_name) and "=" not in value + right_value
        if (value, right_value) != (answer, right) and (name == right_name or one_is_named):
            return self._equal(value, right_value)
        numbers = number(answer), number(right)
        if numbers[0] is not None and numbers[1] is not None:
            return _numbers_equal(*numbers)  # type: ignore[arg-type]
        in_base = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(right)
        if any(in_base):  # a number in base 7 equals no other, not even its own value
            return all(in_base) and in_base[0].groups() == in_base[1].groups()  # type: ignore[union-attr]
        if _COLONS.fullmatch(answer) or _COLONS.fullmatch(right):
            return self._all_equal(answer.split(":"), right.split(":"))
        parts, right_parts = _parts(answer), _parts(right)
        if parts and right_parts:
            return self._parts_equal(parts, right_parts)
        if any(_SENTENCE.search(_COMMAND.sub("", text)) for text in (answer, right)):
            return False
        return self._formulas_equal(answer, right)

    def _all_equal(self, answers: list[str], rights: list[str]) -> bool:
        return len(answers) == len(rights) and all(map(self._equal, answers, rights))

    def _parts_equal(self, parts: Parts, right: Parts) -> bool:
        if parts.form and right.form and parts.form != right.form:
            return False
        if parts.form or right.form:
            return self._all_equal(parts.elements, right.elements)
        left = list(right.elements)
        for element in parts.elements:
            match = next((n for n, other in enumerate(left) if self._equal(element, other)), None)
            if match is None:
                return False
            del left[match]
        return not left

    def _formulas_equal(self, answer: str, right: str) -> bool:
        if self._process is None:
            self._start()
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            return False
        self._connection.send((answer, right))
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
        except EOFError:  # the process died, for example out of memory
            pass
        self._stop()
        return False

    def _start(self) -> None:
        start = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self._connection, child_connection = context.Pipe()
        self._process = context.Process(target=_compare_forever, args=(child_connection, self._seconds), daemon=True)
        self._process.start()
        child_connection.close()
        try:
            self._connection.recv()  # the process is ready; importing sympy does not count towards the time limit
        except EOFError:
            self._stop()
            raise UserError("cannot import math-verify, which compares formulas: install the extra `eval`") from None
        self._deadline += time.monotonic() - start

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _capped(kind: int, limit: int) -> int:
    """The limit, lowered to this process's hard limit if it has one."""
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _compare_forever(connection: Any, seconds: float) -> None:
    """The process: receives pairs of formulas and sends back whether they are equal.

    A limit on processor time ends it if a comparison takes too long and the parent is no longer there to kill it.
    """
    formulas = importlib.import_module("rho1_jax.evals.formulas")  # imports sympy, which only this process needs

    memory = _capped(resource.RLIMIT_AS, MEMORY)
    hard_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    connection.send(True)
    while True:
        try:
            pair = connection.recv()
        except EOFError:
            return
        cpu_seconds = _capped(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, hard_seconds))
        try:
            connection.send(formulas.formulas_equal(*pair))
        except Exception:  # sympy raises many kinds of errors on text that is not a formula
            connection.send(False)
