"""What training changes from step to step."""

from typing import NamedTuple

import jax
import optax

from rho1_jax.models.decoder import Params


class TrainState(NamedTuple):
    """What a step takes and gives: everything that training changes."""

    step: jax.Array  # updates done so far
    params: Params  # float32 master weights
    opt_state: optax.OptState
    reference: Params | None = None  # float32, of a reference that moves
