"""Curves of several runs side by side."""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's evaluations over its tokens."""

    label: str
    tokens: Sequence[float]
    loss: Sequence[float]  # nats a token
    accuracy: Sequence[float]  # in [0, 1]


STYLES = {"color": ("#1b6ca8", "#8a8a8a", "#c8512b", "#5d8a3a"), "marker": ("o", "s", "^", "D")}


def plot_curves(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Writes a PNG: accuracy and held-out loss over tokens seen, a line for each run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for number, curve in enumerate(curves):
        style = {name: values[number % len(values)] for name, values in STYLES.items()}
        millions = [tokens / 1e6 for tokens in curve.tokens]
        left.plot(millions, [100 * value for value in curve.accuracy], label=curve.label, markersize=4, **style)
        right.plot(millions, curve.loss, label=curve.label, markersize=4, **style)
    left.set_ylabel("answers right, %")
    left.set_ylim(bottom=0)
    right.set_ylabel("loss on clean text, nats a token")
    for axes in (left, right):
        axes.set_xlabel("tokens seen, millions")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
