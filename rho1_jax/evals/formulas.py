r"""Compare formulas. `Grader` runs this module in a process of its own, since sympy may never return.

latex2sympy2_extended (the parser of math-verify) reads the formulas. Values are compared at points; the rest, such as
sets and inequalities, by math-verify. The order of the two formulas makes no difference.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.logic import And
from math_verify import verify
from sympy import Eq, Expr, MatrixBase
from sympy.core.function import AppliedUndef

TOLERANCE = 1e-4  # relative, for numbers of which one is a decimal
DIGITS = 30  # precision of values
EXACT = sympy.Float(10, DIGITS) ** (10 - DIGITS)  # relative difference that rounding explains
NOTHING = sympy.Float(10, DIGITS) ** -20  # a smaller value may be a rounded zero
POINTS = 16  # at which formulas with variables are compared
ENOUGH = 3  # points at which both must have a value

_PRODUCT = re.compile(r"(?<=[\d)])\(")  # 10(26) is a product, not a function call
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off


def formulas_equal(first: str, second: str) -> bool:
    """True if two formulas in LaTeX have the same value, are the same equation, or are equal sets."""
    return _same(_parse(first), _parse(second))


def _parse(text: str) -> Any:
    formula = latex2sympy(
        _PRODUCT.sub(r" \\cdot (", text), is_real=True, convert_degrees=False, normalization_config=_NORMALIZATION
    )
    replaced = {symbol: sympy.I for symbol in formula.free_symbols if symbol.name == "i"}
    functions = {call: sympy.Symbol(str(call), real=True) for call in formula.atoms(AppliedUndef)}
    return formula.xreplace(replaced | functions) if replaced or functions else formula


def _same(first: Any, second: Any) -> bool:
    first, second = _as_equation(first), _as_equation(second)
    if isinstance(first, Eq) and isinstance(second, Eq):
        return _same_equation(first, second)
    if isinstance(first, Eq) or isinstance(second, Eq):
        equation, other = (first, second) if isinstance(first, Eq) else (second, first)
        return _defines_value(equation) and _same(equation.rhs, other)
    if isinstance(first, Expr) and isinstance(second, Expr):
        return _same_value(first, second)
    if isinstance(first, MatrixBase) and isinstance(second, MatrixBase):
        return first.shape == second.shape and all(map(_same, first.flat(), second.flat()))
    if isinstance(first, sympy.FiniteSet) and isinstance(second, sympy.FiniteSet):
        return _same_elements(first.args, second.args)
    # math-verify's answer depends on which of the two is the right one.
    options = {"timeout_seconds": None, "float_rounding": 6}
    return bool(verify(first, second, **options) or verify(second, first, **options))


def _as_equation(formula: Any) -> Any:
    """A chain a = b = c as the equation a = c; anything else as it is."""
    if isinstance(formula, And) and all(isinstance(part, Eq) for part in formula._unsorted_args):
        parts = formula._unsorted_args
        return Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
    return formula


def _defines_value(equation: Eq) -> bool:
    """True for x = ..., and for a calculation that is right, such as 30 - 16 = 14."""
    left, right = equation.args
    if isinstance(left, sympy.Symbol):
        return True
    return not equation.free_symbols and isinstance(left, Expr) and _same(left, right)


def _same_equation(first: Eq, second: Eq) -> bool:
    """True if one equation is a multiple of the other, or if both have the same solutions."""
    if not all(isinstance(side, Expr) for side in (*first.args, *second.args)):
        return _same(first.lhs, second.lhs) and _same(first.rhs, second.rhs)
    if not first.free_symbols and not second.free_symbols:
        return _same_value(first.rhs, second.rhs) and _same_value(first.lhs, second.lhs)
    zeros = [(side.lhs - side.rhs).doit() for side in (first, second)]
    values = [(a, b) for a, b in _values(*zeros) if a is not None and b is not None]
    if len(values) >= ENOUGH and any(a != 0 for a, _ in values):
        a0, b0 = next((a, b) for a, b in values if a != 0)
        if b0 != 0 and all(_close(a * b0, b * a0, EXACT) for a, b in values):
            return True
    symbols = sorted(first.free_symbols | second.free_symbols, key=lambda symbol: symbol.name)
    solutions = [sympy.solve(zero, symbols[-1]) for zero in zeros]
    return bool(solutions[0]) and _same_elements(*solutions)


def _same_elements(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """True if the elements are the same, in any order."""
    left = list(second)
    for element in first:
        match = next((n for n, other in enumerate(left) if _same(element, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _same_value(first: Expr, second: Expr) -> bool:
    first, second = first.doit(), second.doit()
    if first == second:
        return not first.has(sympy.zoo, sympy.nan)
    if not first.free_symbols and not second.free_symbols:
        return _same_constant(first, second)
    exact_first, exact_second = (_without_decimals(formula) for formula in (first, second))
    agreed = 0
    for a, b in _values(exact_first, exact_second):
        if (a is None and b is None) or all(value is not None and abs(value) < NOTHING for value in (a, b)):
            continue
        if a is None or b is None or not _close(a, b, EXACT):
            return False
        agreed += 1
    return agreed >= ENOUGH or sympy.simplify(exact_first - exact_second) == 0


def _same_constant(first: Expr, second: Expr) -> bool:
    tolerance = TOLERANCE if first.has(sympy.Float) or second.has(sympy.Float) else EXACT
    if first.is_Rational and second.is_Rational:
        return first == second
    if first.is_zero or second.is_zero:
        return sympy.simplify(first - second) == 0
    a, b = (_finite(formula.evalf(DIGITS)) for formula in (first, second))
    return a is not None and b is not None and _close(a, b, tolerance)


def _without_decimals(formula: Expr) -> Expr:
    """The formula with each decimal as a fraction, so that 0.5x is exactly x/2."""
    return formula.xreplace({number: sympy.Rational(str(number)) for number in formula.atoms(sympy.Float)})


def _values(first: Expr, second: Expr) -> Iterator[tuple[Any, Any]]:
    """The values of two formulas at points, None where one has none. Reals only, unless i occurs in a formula."""
    symbols = sorted(first.free_symbols | second.free_symbols, key=lambda symbol: symbol.name)
    draws, is_complex = random.Random(0), first.has(sympy.I) or second.has(sympy.I)
    for n in range(POINTS):
        point = {}
        for symbol in symbols:
            if n % 4 == 3:  # for factorials
                point[symbol] = sympy.Integer(draws.randrange(2, 12))
                continue
            limit, sign = (1 if n % 4 == 0 else 5), {2: -1, 6: draws.choice((-1, 1))}.get(n % 8, 1)
            point[symbol] = sympy.Rational(sign * draws.randrange(1, 1000 * limit), 1009)
        a, b = (_finite(formula.evalf(DIGITS, subs=point)) for formula in (first, second))
        yield tuple(value if value is None or is_complex or value.is_real else None for value in (a, b))  # type: ignore


def _finite(value: Any) -> Any:
    """The value, or None if it is not a finite number."""
    return value if value.is_number and value.is_finite else None


def _close(a: Any, b: Any, tolerance: Any) -> bool:
    return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))
