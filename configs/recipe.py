"""What the paper's runs have in common. Each value is marked "paper" (arXiv 2404.07965), or "ours" with the reason.

The directories are those that docs/guides/recipes.md has the user make.
"""

from typing import Any

import ml_collections

from rho1_jax.configs import default

STEP_TOKENS = 2**20  # paper: a batch of 1 M tokens


def recipe(
    stage: str, name: str, model: dict[str, Any], folder: str, seq_len: int, tokens: float
) -> ml_collections.ConfigDict:
    """A stage of continued pre-training.

    Args:
      stage: one of `default.STAGES`.
      name: of the recipe; references are looked for in runs/NAME/reference and runs/NAME/self_reference.
      model: its `model` section.
      folder: the Hugging Face folder in models/ that all stages start from.
      seq_len: targets in a row, as the data were prepared.
      tokens: to train on, passes over the same ones counted anew.
    """
    config = default.get_config(stage)
    config.model.update(model)
    config.model.compute_dtype = "bfloat16"  # ours: the paper does not tell its precision; master weights are float32
    config.model.remat = "full"  # ours: memory
    config.init.checkpoint = f"models/{folder}"  # paper: all stages start from the base model
    trained = "self_reference" if stage.startswith("self_") else "reference"
    config.reference.checkpoint = f"runs/{name}/{trained}"
    config.batch_size = STEP_TOKENS // seq_len
    config.steps = int(tokens) // STEP_TOKENS
    config.mesh.update(data=1, fsdp=-1)  # ours: parameters and optimizer state spread over all chips
    config.optimizer.update(
        warmup_fraction=0.03,  # ours: the paper tells none; that of ToRA's script
        decay="cosine",  # paper
        final_learning_rate_fraction=0.1,  # ours: the paper tells none; usual in pre-training
        b1=0.9,  # ours, these five: the paper tells none; they are Llama 2's
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.eval.every = 250  # ours: every quarter of a billion tokens
    config.checkpoint.update(every=250, keep=2)  # ours: what an interruption may cost
    return config
