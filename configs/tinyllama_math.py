"""Rho-1 math at 1.1 billion parameters: TinyLlama on OpenWebMath (arXiv 2404.07965)."""

import ml_collections

from rho1_jax.configs.models import TINYLLAMA_1B
from rho1_jax.configs.recipe import recipe

SEQ_LEN = 2048  # paper


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage of `default.STAGES`."""
    is_reference = stage == "reference"
    tokens = 3 * 0.5e9 if is_reference else 15e9  # paper: 3 epochs of 0.5 B tokens; 15 B of OpenWebMath
    config = recipe(stage, "tinyllama_math", TINYLLAMA_1B, "tinyllama", SEQ_LEN, tokens)
    config.data.train = "data/math_reference" if is_reference else "data/openwebmath"
    config.optimizer.learning_rate = 5e-5 if is_reference else 8e-5  # paper
    config.selection.ratio = 0.6  # paper; the stages "reference" and "clm" ignore it
    return config
