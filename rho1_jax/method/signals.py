"""Signals: what scores and objectives are computed from, and the registries that hold those functions.

A signal is a float32 array [B, L] with one number per target. A function names the signals it needs as its parameters;
a step computes those and no others.

Shapes: B batch rows, L sequence.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping

import jax

# The policy's and the reference's signals are in nats.
POLICY_SIGNALS = ("policy_loss_BL", "policy_entropy_BL")
REFERENCE_SIGNALS = ("reference_loss_BL", "reference_entropy_BL")
RANDOM_SIGNAL = "random_BL"  # uniform noise, drawn again at each step
COMPUTED_SIGNALS = (*POLICY_SIGNALS, *REFERENCE_SIGNALS, RANDOM_SIGNAL)
WEIGHT = "weight_BL"  # for objectives: what each token counts
SUFFIX = "_BL"  # a column NAME that comes with the data is the signal NAME_BL

Signals = Mapping[str, jax.Array]  # name of a signal -> [B, L]


class Registry(dict[str, Callable[..., jax.Array]]):
    """Functions of signals [B, L] to an array [B, L], by name."""

    def __init__(self, kind: str, extra: tuple[str, ...] = ()):
        """`kind` is what errors call an entry, such as "score". `extra` are parameters that are not signals."""
        super().__init__()
        self._kind, self._parameters = kind, (*COMPUTED_SIGNALS, *extra)

    def register(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Adds a function under its own name. Usable as a decorator.

        Raises:
          ValueError: a built-in has that name, or a parameter is not named like a signal.
        """
        name = function.__name__
        if name in self and self[name].__module__.startswith("rho1_jax."):
            raise ValueError(f"{self._kind} {name!r} is built in: give the function another name")
        for parameter in inspect.signature(function).parameters:
            known = self._parameters
            close = difflib.get_close_matches(parameter, [*known, WEIGHT], n=1, cutoff=0.85)
            if parameter not in known and (close or not parameter.endswith(SUFFIX)):
                hint = f"did you mean {close[0]}?" if close else f"a column of the data ends in {SUFFIX}"
                raise ValueError(f"{self._kind} {name!r}: {parameter!r} is not one of {', '.join(known)}; {hint}")
        self[name] = function
        return function

    def needs(self, name: str) -> tuple[str, ...]:
        """The signals that a function needs."""
        return tuple(inspect.signature(self[name]).parameters)

    def evaluate(self, name: str, signals: Signals) -> jax.Array:
        """The function's value [B, L] on the signals it needs."""
        return self[name](**{signal: signals[signal] for signal in self.needs(name)})
