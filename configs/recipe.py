"""What the paper's runs share. Each value is marked "paper" (arXiv 2404.07965), or "ours" with a reason.

docs/guides/recipes.md explains how to create the directories named here.
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
      name: the recipe's name; its references are runs/NAME/reference and runs/NAME/self_reference.
      model: a `model` section from configs/models.py.
      folder: the Hugging Face folder in models/ that all stages start from.
      seq_len: targets in a row of the prepared data.
      tokens: tokens to train on, counting every epoch.
    """
    config = default.get_config(stage)
    config.model.update(model)
    config.model.compute_dtype = "bfloat16"  # ours: not in the paper; master weights are float32
    config.model.remat = "full"  # ours: memory
    config.init.checkpoint = f"models/{folder}"  # paper: all stages start from the base model
    trained = "self_reference" if stage.startswith("self_") else "reference"
    config.reference.checkpoint = f"runs/{name}/{trained}"
    config.batch_size = STEP_TOKENS // seq_len
    config.steps = int(tokens) // STEP_TOKENS
    config.mesh.update(data=1, fsdp=-1)  # ours: shards parameters and optimizer state over all chips
    config.optimizer.update(
        warmup_fraction=0.03,  # ours: the paper does not report warm-up; ToRA's script uses this
        decay="cosine",  # paper
        final_learning_rate_fraction=0.1,  # ours: not in the paper; usual in pre-training
        b1=0.9,  # ours, as the next four: not in the paper; Llama 2's values
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.eval.every = 250  # ours: every quarter of a billion tokens
    config.checkpoint.update(every=250, keep=2)  # ours: limits what an interruption loses
    return config
