"""Extract and compare arbitrary answers: nothing raises or hangs, and the order of two answers makes no difference."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rho1_jax.evals.answer_text import normalize
from rho1_jax.evals.extraction import extract
from rho1_jax.evals.grading import Grader

PIECES = (
    r"\frac \sqrt \text{ \boxed{ \pi \infty \le \cup \pm \begin{pmatrix} \end{pmatrix} \\ \left( \right) ^ _ { } ( ) "
    r"[ ] , . : ; = < > + - * / % \% $ \$ ! | & 0 1 2 10 1/2 0.5 1,000 1e999 x y k i e cm m "
    r"apples percent a.m. p.m. ** answer is the answer : I hope and base approximately (A) b"
).split(" ")
LATEX = st.lists(st.sampled_from([*PIECES, " ", "\n"]), max_size=12).map("".join)
SPACED = st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join)
TEXT = st.one_of(LATEX, SPACED, st.text(max_size=60))
# Valid formulas, so that many pairs are compared as values.
ATOM = st.sampled_from(["x", "y", "n", "2", "3", "0.5", r"\pi", "i"])
FORMULA = st.recursive(
    ATOM,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-"), inner).map(lambda parts: "({}{}{})".format(*parts)),
        st.tuples(inner, ATOM).map(lambda parts: r"\frac{{{}}}{{{}}}".format(*parts)),  # x/(x-x) equals nothing
        inner.map(lambda formula: rf"\sqrt{{{formula}}}"),
        inner.map(lambda formula: f"{formula}^{{2}}"),
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=2.0) as grader:
        yield grader


@given(text=st.one_of(TEXT, st.text(), TEXT.map(lambda text: f"The answer is {text}")))
def test_extraction_gives_text_or_nothing(text):
    answer, letter = extract(text, "math"), extract(text, "choice")
    assert answer is None or answer in text.replace(",", "") or answer in text
    assert letter is None or letter in "ABCDE"


@settings(deadline=None)  # the first comparison starts a process
@given(answer=TEXT, right=TEXT)
def test_any_two_answers(grader, answer, right):
    start = time.monotonic()
    verdict = grader.equal(answer, right)
    assert isinstance(verdict, bool) and isinstance(normalize(answer), str)
    assert verdict == grader.equal(right, answer)
    assert time.monotonic() - start < 20
    assert grader.equal(answer, answer)


@settings(deadline=None)
@given(first=FORMULA, second=FORMULA)
def test_any_two_formulas(grader, first, second):
    assert grader.equal(first, second) == grader.equal(second, first)
    assert grader.equal(f"({first})-({second})", f"-({second})+({first})")
    assert not grader.equal(f"{first}+1", first)
