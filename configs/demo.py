"""The demo (tools/demo.py): a model with about a million parameters learns arithmetic from noisy pages.

Sizes, ratio and learning rates were found by trial; docs/results/demonstration.md lists the trials.
"""

import ml_collections

from rho1_jax.configs import default

SEQ_LEN = 64
LEARNING_RATES = {"reference": 3e-3, "clm": 1.5e-3, "random": 1.5e-3, "slm": 7e-4, "self_reference": 1.5e-3}
VOCAB_SIZE = 640


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """A stage at the demo's size. tools/demo.py fills in the directories."""
    config = default.get_config(stage)
    config.steps = 990 if stage == "reference" else 1300
    config.batch_size = 16
    config.log_every = 20
    config.model.update(width=128, layers=4, heads=4, kv_heads=2, head_width=32, ff_width=384)
    config.optimizer.update(
        learning_rate=LEARNING_RATES.get(stage, LEARNING_RATES["slm"]), warmup_fraction=50 / config.steps
    )
    config.selection.ratio = 0.1
    config.eval.update(
        every=config.steps // 10,
        rows=128,
        prompt_template="Q: {question}?\n",
        answer_pattern=r"A: (.*)",
        stops=("\nQ:",),
        max_new_tokens=48,
        generate_batch=144,
    )
    # `rho1 dynamics` needs all checkpoints of these two.
    config.checkpoint.update(every=100, keep=0 if stage in ("clm", "slm") else 2)
    return config
