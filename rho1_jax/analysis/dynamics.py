"""Classify tokens by how their loss changes in training (Rho-1, arXiv 2404.07965, section 2.1 and appendix D.1).

Shapes: n checkpoints, T tokens.
"""

from typing import NamedTuple

import numpy as np

# From a high or low loss early in training to a high or low loss at its end, in the paper's notation.
CLASSES = ("H->H", "L->H", "H->L", "L->L")
CHANGE = 0.2  # nats; a loss has changed if its fitted line rises or falls by more


class Dynamics(NamedTuple):
    """The change and the class of each token.

    Attributes:
      change_T: rise of the fitted line over all checkpoints, in nats.
      class_T: index into CLASSES.
    """

    change_T: np.ndarray
    class_T: np.ndarray


def classify(loss_nT: np.ndarray) -> Dynamics:
    """Classifies each token by its losses at n evenly spaced checkpoints.

    A line is fitted to each token's losses by least squares. The token's change is the line's slope times n. If the
    change is below -0.2, the loss fell (H->L); above 0.2, it rose (L->H). Otherwise the loss stayed low (L->L) if the
    token's last loss is at most the mean of all last losses, and high (H->H) if it is above that mean.

    Args:
      loss_nT: losses in nats, at n >= 2 checkpoints.

    Raises:
      ValueError: there are fewer than two checkpoints.
    """
    n = len(loss_nT)
    if n < 2:
        raise ValueError(f"fitting a line needs at least two checkpoints, not {n}")
    slope_T, _ = np.polyfit(np.arange(n), loss_nT.astype(np.float64), 1)
    change_T = slope_T * n
    last_T = loss_nT[-1]
    stayed_T = np.where(last_T <= last_T.mean(dtype=np.float64), CLASSES.index("L->L"), CLASSES.index("H->H"))
    moved_T = np.where(change_T > 0, CLASSES.index("L->H"), CLASSES.index("H->L"))
    return Dynamics(change_T, np.where(np.abs(change_T) > CHANGE, moved_T, stayed_T))


def class_means(loss_nT: np.ndarray, class_T: np.ndarray) -> dict[str, list[float] | None]:
    """The mean loss of each class at each checkpoint, in nats; None for a class without tokens."""
    return {
        name: loss_nT[:, class_T == number].mean(axis=1, dtype=np.float64).tolist()
        if (class_T == number).any()
        else None
        for number, name in enumerate(CLASSES)
    }


def shares(class_T: np.ndarray) -> dict[str, float]:
    """The fraction of tokens in each class."""
    return {name: float((class_T == number).mean()) for number, name in enumerate(CLASSES)}
