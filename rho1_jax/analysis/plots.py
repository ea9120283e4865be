"""Plot training curves and token dynamics."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Curve:
    """The evaluations of one run, over the tokens it has seen."""

    label: str
    tokens: Sequence[float]
    loss: Sequence[float]  # nats per token
    accuracy: Sequence[float]  # in [0, 1]


STYLES = {"color": ("#1b6ca8", "#8a8a8a", "#c8512b", "#5d8a3a"), "marker": ("o", "s", "^", "D")}


def plot_curves(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Writes a PNG: accuracy and held-out loss against tokens seen, with one line for each run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for number, curve in enumerate(curves):
        style = {name: values[number % len(values)] for name, values in STYLES.items()}
        millions = [tokens / 1e6 for tokens in curve.tokens]
        left.plot(millions, [100 * value for value in curve.accuracy], label=curve.label, markersize=4, **style)
        right.plot(millions, curve.loss, label=curve.label, markersize=4, **style)
    left.set_ylabel("right answers, %")
    left.set_ylim(bottom=0)
    right.set_ylabel("loss on clean text, nats per token")
    for axes in (left, right):
        axes.set_xlabel("tokens seen, millions")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_dynamics(summary: dict[str, Any], colours: dict[str, str], path: pathlib.Path) -> None:
    """Writes a PNG: the mean loss of each class over training, and of selected and unselected tokens if it is known.

    Args:
      summary: "steps", "shares" and "class_loss"; "selected_loss" and "unselected_loss" are optional.
      colours: class -> colour.
      path: the file to write.
    """
    both = "selected_loss" in summary
    figure, panels = plt.subplots(1, 1 + both, figsize=(11 if both else 6, 4.2), constrained_layout=True, squeeze=False)
    for name, losses in summary["class_loss"].items():
        if losses is not None:
            label = f"{name}, {summary['shares'][name]:.0%}"
            panels[0, 0].plot(summary["steps"], losses, label=label, color=colours[name], marker="o", markersize=4)
    panels[0, 0].set_title("token classes")
    if both:
        for name, style in (("selected", "-"), ("unselected", "--")):
            panels[0, 1].plot(summary["steps"], summary[f"{name}_loss"], style, label=name, color="#444444", marker="o")
        panels[0, 1].set_title("selected by excess loss at the first checkpoint")
    for axes in panels[0]:
        axes.set(xlabel="step", ylabel="mean loss, nats")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, columnspacing=1.0)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def plot_gradient_noise(rows: Sequence[dict[str, Any]], noise: float, path: pathlib.Path) -> None:
    """Writes a PNG: the error of the gradient against the share of tokens it is computed from, for each choice.

    Args:
      rows: each with "tokens", "choice", "error" and "systematic"; the last two relative to the gradient's energy.
      noise: of a batch's exact gradient, in the same unit.
      path: the file to write.
    """
    figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    for number, choice in enumerate(dict.fromkeys(row["choice"] for row in rows)):
        colour, marker = (STYLES[name][number] for name in ("color", "marker"))
        chosen = sorted((row for row in rows if row["choice"] == choice), key=lambda row: row["tokens"])
        shares = [100 * row["tokens"] for row in chosen]
        for part, style in (("error", "-"), ("systematic", ":")):
            label = choice if part == "error" else f"{choice}, systematic part"
            axes.plot(shares, [row[part] for row in chosen], style, color=colour, marker=marker, ms=4, label=label)
    axes.axhline(noise, color="#444444", linestyle="--", label="noise of a batch")
    axes.set(xlabel="tokens in the backward pass, %", ylabel="squared norm, relative to the gradient's", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
