"""Estimate what a run will cost: steps, FLOPs, chip-hours, memory and disk.

python -m tools.recipe_cost --config=configs/tinyllama_math.py:slm --seq_len=2048 [--utilization=0.4]

Nothing is measured. The chip-hours depend on the assumed utilization.
"""

import ml_collections
from absl import flags

from rho1_jax.method.signals import REFERENCE_SIGNALS
from rho1_jax.method.token_scores import NO_SCORE
from rho1_jax.models.decoder import param_count
from rho1_jax.runtime.command_line import define_config_flag, overridden_keys, run
from rho1_jax.training.accounting import ForwardFlops, training_flops
from rho1_jax.training.config import model_config, selection_rule
from rho1_jax.training.pretrained import with_first_model

MASTER_BYTES = 4  # float32 parameters, and each of the optimizer's two moments
REFERENCE_BYTES = 2  # bfloat16


def lines(config: ml_collections.ConfigDict, seq_len: int, peak_tflops: float, utilization: float) -> list[str]:
    """The estimates as lines of text, for a reference of the policy's size."""
    model = model_config(config)
    tokens = config.steps * config.batch_size * seq_len
    forward, rule = ForwardFlops.of(model, seq_len), selection_rule(config)
    online = bool(rule.needs & set(REFERENCE_SIGNALS))
    ratio = 1.0 if rule.score == NO_SCORE else rule.ratio
    reference = forward if online else None
    flops = sum(training_flops(forward, reference, tokens, ratio * tokens, config.backward.tokens).values())
    hours = flops / (peak_tflops * 1e12 * utilization) / 3600
    parameters = param_count(model)
    state = parameters * (3 * MASTER_BYTES)
    memory = state + parameters * (MASTER_BYTES + (REFERENCE_BYTES if online else 0))
    return [
        f"{parameters:,} parameters, {tokens:,} tokens in {config.steps:,} steps of {config.batch_size * seq_len:,}",
        f"{flops:.2e} model FLOPs, {'with' if online else 'without'} a reference",
        f"{hours:,.0f} chip-hours at {utilization:.0%} of {peak_tflops:.0f} TFLOP/s",
        f"{memory / 2**30:,.0f} GiB of parameters, optimizer state, gradients and reference over all chips",
        f"{state / 2**30:,.0f} GiB per checkpoint, {config.checkpoint.keep} kept",
    ]


def main() -> None:
    """Define the flags and print `lines`."""
    config = define_config_flag()
    seq_len = flags.DEFINE_integer("seq_len", 2048, "Targets per row.", lower_bound=1)
    peak = flags.DEFINE_float("peak_tflops", 197, "Peak of one chip in bfloat16 TFLOP/s: 197 for TPU v5e, 459 for v5p.")
    utilization = flags.DEFINE_float("utilization", 0.4, "Assumed share of the peak that training reaches.")

    def command() -> None:
        resolved = with_first_model(config.value, overridden_keys(), seq_len.value)
        for line in lines(resolved, seq_len.value, peak.value, utilization.value):
            print(line)

    run(command)


if __name__ == "__main__":
    main()
