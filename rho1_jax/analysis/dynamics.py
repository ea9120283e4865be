"""How the loss of each token moves through training (Rho-1, arXiv 2404.07965, section 2.1 and appendix D.1).

Shapes: n checkpoints, T tokens.
"""

from typing import NamedTuple

import numpy as np

# From a high or low loss at first to a high or low one at the end, as the paper draws them.
CLASSES = ("H->H", "L->H", "H->L", "L->L")
CHANGE = 0.2  # nats, along the fitted line, from which a loss counts as moved


class Dynamics(NamedTuple):
    """What became of each token.

    Attributes:
      change_T: nats by which the fitted line rises over all checkpoints.
      class_T: index into CLASSES.
    """

    change_T: np.ndarray
    class_T: np.ndarray


def classify(loss_nT: np.ndarray) -> Dynamics:
    """The class of each token from its losses, in nats, at n >= 2 checkpoints that lie equally far apart.

    A line is fitted to each token's losses by least squares; its slope times n is the change. Below -0.2 the loss fell
    (H->L), above 0.2 it rose (L->H). Otherwise it stayed: low (L->L) where the last one is at most the mean of all
    tokens' last ones, high (H->H) elsewhere.
    """
    n = len(loss_nT)
    if n < 2:
        raise ValueError(f"a line needs at least two checkpoints, not {n}")
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
    """The share of each class."""
    return {name: float((class_T == number).mean()) for number, name in enumerate(CLASSES)}
