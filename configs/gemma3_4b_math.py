"""The math recipe applied to a model the paper did not train: Gemma 3 4B on OpenWebMath."""

import ml_collections

from rho1_jax.configs.models import GEMMA3_4B
from rho1_jax.configs.recipe import recipe

SEQ_LEN = 4096  # ours: as for Mistral 7B; the model supports 131,072


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage of `default.STAGES`."""
    is_reference = stage == "reference"
    tokens = 3 * 0.5e9 if is_reference else 15e9  # paper, for its own models
    config = recipe(stage, "gemma3_4b_math", GEMMA3_4B, "gemma3_4b", SEQ_LEN, tokens)
    config.data.train = "data/math_reference_gemma3" if is_reference else "data/openwebmath_gemma3"
    config.optimizer.learning_rate = 1e-5 if is_reference else 2e-5  # ours: as for Mistral 7B, the nearest in size
    config.selection.ratio = 0.7  # ours: as for Mistral 7B
    return config
