"""`llama3_8b_math` at 70 billion parameters. Its stage "weak_to_strong" selects with the 8-billion reference."""

import ml_collections

from rho1_jax.configs import llama3_8b_math
from rho1_jax.configs.models import LLAMA3_70B


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage of `default.STAGES`, or "weak_to_strong"."""
    weak = stage == "weak_to_strong"
    config = llama3_8b_math.get_config("slm" if weak else stage)
    config.model.update(LLAMA3_70B)
    config.init.checkpoint = "models/llama3_70b"
    if not weak:
        config.reference.checkpoint = config.reference.checkpoint.replace("llama3_8b", "llama3_70b")
    config.mesh.tensor = 2  # ours: a step has only 256 rows, fewer than there are chips
    return config
