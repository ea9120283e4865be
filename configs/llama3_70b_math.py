"""As `llama3_8b_math`, at 70 billion parameters."""

import ml_collections

from configs import llama3_8b_math
from configs.models import LLAMA3_70B


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """The stage "reference", "clm", "random" or "slm"."""
    config = llama3_8b_math.get_config(stage)
    config.model.update(LLAMA3_70B)
    config.init.checkpoint = "models/llama3_70b"
    config.reference.checkpoint = "runs/llama3_70b_math/reference"
    config.mesh.tensor = 2  # ours: 256 rows a step are fewer than the chips
    return config
