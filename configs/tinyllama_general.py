"""Rho-1 general at 1.1 billion parameters: TinyLlama on web text, code and mathematics (arXiv 2404.07965)."""

import ml_collections

from rho1_jax.configs.models import TINYLLAMA_1B
from rho1_jax.configs.recipe import recipe

SEQ_LEN = 2048  # paper


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage of `default.STAGES`."""
    is_reference = stage == "reference"
    # Paper: 1.9 B tokens for the reference (Tulu v2, OpenHermes 2.5 and others), and 80 B tokens of the mixture.
    # Ours: three epochs for the reference; the paper reports this number for math only.
    tokens = 3 * 1.9e9 if is_reference else 80e9
    config = recipe(stage, "tinyllama_general", TINYLLAMA_1B, "tinyllama", SEQ_LEN, tokens)
    mixture = "data/slimpajama:6,data/starcoder:3,data/openwebmath:1"  # paper
    config.data.train = "data/general_reference" if is_reference else mixture
    config.optimizer.learning_rate = 5e-5 if is_reference else 1e-4  # paper
    config.selection.ratio = 0.6  # paper; the stages "reference" and "clm" ignore it
    return config
