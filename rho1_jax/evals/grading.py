r"""Compare an answer with the right one: as text, as a number, element by element, or as a formula.

math-verify and sympy compare formulas in a separate process, which is killed after a time limit. No part of a
generation is evaluated as code.
"""

import math
import multiprocessing
import re
import resource
import time
from typing import Any

from rho1_jax.runtime.errors import UserError

SECONDS = 5.0  # time limit for one pair of formulas
MEMORY = 4 << 30  # address space of the process, in bytes
TOLERANCE = 1e-4  # relative, for numbers

_UNITS = re.compile(r"(?<=[\d})])\s*(?:\\(?:text|mbox|mathrm|textbf)\{[^{}]*\})(?:\^\{?\d\}?)?\s*$")
_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit)\{([^{}]*)\}")
_GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|~")
_MATRIX = re.compile(r"\\begin\{[pbvB]?matrix\}(.*)\\end\{[pbvB]?matrix\}", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SENTENCE = re.compile(r"[A-Za-z]{5,}")
_PRODUCT = re.compile(r"(?<=[\d)])\(")  # 10(26) is a product, not a function call
_NUMBER_AND_WORDS = re.compile(r"(-?[\d.,/]*\d)\s*[A-Za-z][A-Za-z\s]*")


def normalize(answer: str) -> str:
    """An answer in canonical form: no spaces, units, dollar, percent or degree signs, and no \\left or \\right."""
    text = answer.strip().replace("\n", "")
    if "\\begin" not in text:
        text = text.replace("\\\\", "\\")  # ends a row in a matrix; elsewhere it is a backslash typed twice
    text = _SPACES.sub("", text)
    text = text.replace("\\left", "").replace("\\right", "").replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°", "", text)
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = _UNITS.sub("", text)
    text = _WRAPPED.sub(r"\1", text).strip().rstrip(".")
    words = _NUMBER_AND_WORDS.fullmatch(text)
    if words:
        text = words[1]
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0].strip()) <= 2:
        text = sides[1]
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return re.sub(r"(\d)\.0+(?!\d)", r"\1", text)


def number(text: str) -> float | None:
    """The value of a normalized number, or of a fraction of numbers (a/b or LaTeX); None for anything else."""
    fraction = re.fullmatch(r"(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}", text) or re.fullmatch(
        r"(-?)(-?[\d.]+)/(-?[\d.]+)", text
    )
    try:
        if fraction:
            return float(fraction[1] + "1") * float(fraction[2]) / float(fraction[3])
        return float(text) if re.fullmatch(r"-?[\d.]+(?:[eE][-+]?\d+)?", text) else None
    except (ValueError, ZeroDivisionError):
        return None


def _numbers_equal(answer: float, right: float) -> bool:
    """True if equal within TOLERANCE, or if one is the other in percent."""
    return any(math.isclose(answer, value, rel_tol=TOLERANCE) for value in (right, right / 100, right * 100))


def _parts(text: str) -> list[str] | None:
    """The elements of a tuple, interval, list or matrix; None for anything else. Nested brackets are not split."""
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return re.split(r"&|\\\\", matrix[1])
    inner = text[1:-1] if text[:1] in "([" and text[-1:] in ")]" else text
    parts, depth = [""], 0
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if len(parts) > 1 else None


class Grader:
    """Compares answers. Runs a process that compares formulas, and restarts it after a time-out."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: Any = None
        self._connection: Any = None

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
        return self._equal(normalize(answer), normalize(right))

    def _equal(self, answer: str, right: str) -> bool:
        if answer.lower() == right.lower():
            return True
        if not answer or not right:
            return False
        value, right_value = number(answer), number(right)
        if value is not None and right_value is not None:
            return _numbers_equal(value, right_value)
        answers, rights = _parts(answer), _parts(right)
        if answers and rights:
            brackets = answer[:1] in "([" and right[:1] in "(["
            same_kind = not brackets or (answer[0], answer[-1]) == (right[0], right[-1])
            return same_kind and len(answers) == len(rights) and all(map(self._equal, answers, rights))
        if any(_SENTENCE.search(_COMMAND.sub("", text)) for text in (answer, right)):
            return False
        return self._formulas_equal(answer, right)

    def _formulas_equal(self, answer: str, right: str) -> bool:
        if self._process is None:
            self._start()
        self._connection.send((answer, right))
        try:
            if self._connection.poll(self._seconds):
                return self._connection.recv()
        except EOFError:  # the process died, for example out of memory
            pass
        self._stop()
        return False

    def _start(self) -> None:
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
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    memory = _capped(resource.RLIMIT_AS, MEMORY)
    hard_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    kinds = (LatexExtractionConfig(), ExprExtractionConfig())
    connection.send(True)
    while True:
        try:
            pair = connection.recv()
        except EOFError:
            return
        cpu_seconds = _capped(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, hard_seconds))
        try:
            # math-verify's own time limits use signals. They are off: the parent kills this process instead.
            products = (_PRODUCT.sub(r" \\cdot (", text) for text in pair)
            answer, right = (parse(f"${text}$", kinds, parsing_timeout=None) for text in products)
            connection.send(bool(verify(right, answer, timeout_seconds=None)))
        except Exception:  # sympy raises many kinds of errors on text that is not a formula
            connection.send(False)
