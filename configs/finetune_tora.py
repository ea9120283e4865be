"""Fine-tuning on transcripts with tool use, with the loss on the responses only (ToRA, arXiv 2309.17452).

Prepare the data with --transcripts --seq_len=2048. Values marked "ToRA" come from its published script.
"""

import ml_collections

from rho1_jax.configs import default
from rho1_jax.configs.models import MISTRAL_7B, TINYLLAMA_1B
from rho1_jax.runtime.errors import UserError

MODELS = {"": ("tinyllama_math", TINYLLAMA_1B), "_7b": ("mistral_7b_math", MISTRAL_7B)}
SCORES = {"sft": "clm", "slm": "slm"}


def get_config(stage: str = "sft") -> ml_collections.ConfigDict:
    """The stage "sft" (all response tokens) or "slm" (selected tokens); "sft_7b" and "slm_7b" are for Mistral 7B."""
    kind, size = stage[:3], stage[3:]
    if kind not in SCORES or size not in MODELS:
        stages = ", ".join(kind + size for size in MODELS for kind in SCORES)
        raise UserError(f"unknown stage {stage!r}; this config has the stages {stages}")
    run, model = MODELS[size]
    config = default.get_config(SCORES[kind])
    config.model.update(model)
    config.model.compute_dtype = "bfloat16"  # ToRA
    config.model.remat = "full"  # ours: memory
    config.init.checkpoint = f"runs/{run}/slm"
    config.reference.checkpoint = f"runs/{run}/tora_reference"  # ours: fine-tuned on the best transcripts
    config.data.train = "data/tora" + size
    config.batch_size = 128  # ToRA, whose rows hold one transcript each; ours hold as many as fit
    config.epochs = 3.0  # ToRA
    config.mesh.update(data=1, fsdp=-1)  # ours: shards parameters and optimizer state over all chips
    config.optimizer.update(
        learning_rate=2e-5,  # ToRA
        warmup_fraction=0.03,  # ToRA
        decay="linear",  # ToRA
        final_learning_rate_fraction=0.0,  # ToRA
        b1=0.9,  # ours, as the next two: defaults of the library that ToRA's script uses
        b2=0.999,
        clip_norm=1.0,
        weight_decay=0.0,  # ToRA
    )
    config.selection.ratio = 0.6  # ours: the Rho-1 paper's ratio for pre-training
    return config
