"""The state of training."""

from typing import NamedTuple

import jax
import optax

from rho1_jax.models.decoder import Params


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # updates done so far
    params: Params  # float32 master weights
    opt_state: optax.OptState
    reference: Params | None = None  # float32, of a reference that follows the policy
