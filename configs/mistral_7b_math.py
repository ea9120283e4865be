"""Rho-1 math at 7 billion parameters: Mistral 7B on OpenWebMath (arXiv 2404.07965)."""

import ml_collections

from rho1_jax.configs.models import MISTRAL_7B
from rho1_jax.configs.recipe import recipe

SEQ_LEN = 4096  # paper


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage of `default.STAGES`."""
    is_reference = stage == "reference"
    tokens = 3 * 0.5e9 if is_reference else 15e9  # paper: 3 epochs of 0.5 B tokens; 15 B of OpenWebMath
    config = recipe(stage, "mistral_7b_math", MISTRAL_7B, "mistral_7b", SEQ_LEN, tokens)
    config.data.train = "data/math_reference_4096" if is_reference else "data/openwebmath_4096"
    config.optimizer.learning_rate = 1e-5 if is_reference else 2e-5  # paper
    config.selection.ratio = 0.7  # paper; the stages "reference" and "clm" ignore it
    return config
