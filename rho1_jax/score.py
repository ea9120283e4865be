"""Scores the training rows of data sets with a reference, once for any number of runs.

rho1 score --config=CONFIG:slm --config.reference.scores=NAME [--dtype=float32] [--entropies]

Use the config of the runs that will read the scores. For each data set of config.data.train, the losses (and entropies)
of config.reference.checkpoint are stored in DATA/scores/NAME. The same command again resumes after an interruption.
"""

import functools

import jax
import ml_collections
from absl import flags

from rho1_jax.data.stored_scores import DTYPES, ScoreWriter, describe
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_reference_signals
from rho1_jax.runtime import sharding, stopping
from rho1_jax.runtime.command_line import define_config_flag, run
from rho1_jax.runtime.processes import define_distributed_flag, say, start
from rho1_jax.training.accounting import ForwardFlops
from rho1_jax.training.reference import load_frozen
from rho1_jax.training.scoring import score_rows
from rho1_jax.training.setup import open_data


def score_data(config: ml_collections.ConfigDict, dtype: str = "float16", entropies: bool = False) -> None:
    """Stores the reference's losses for each data set of the mixture. Scores that are stored already are kept.

    Args:
      config: the config of the runs that will read the scores; `config.reference.scores` names them.
      dtype: dtype of the stored numbers, "float16" or "float32".
      entropies: store entropies as well.

    Raises:
      UserError: config, data or reference do not fit, or something else is stored under the name.
    """
    mesh, data = open_data(config)
    with jax.set_mesh(mesh):
        reference, params, description = load_frozen(config, data.stores[0], mesh)
        signals = make_reference_signals(decoder.build(reference), config.data.document_mask, entropies)
        jitted = functools.partial(jax.jit(signals, out_shardings=sharding.replicated(mesh)), params)
        for store in data.stores:
            described = describe(store, description, config.data.document_mask)
            writer = ScoreWriter(store, config.reference.scores, described, dtype, entropies)
            if writer.finished:
                say(f"{store.path}: already scored")
                continue
            flops = ForwardFlops.of(reference, store.seq_len).total
            score_rows(store, writer, jitted, config.batch_size // config.microbatches, mesh, flops)


def main() -> None:
    """The command `rho1 score`."""
    config = define_config_flag()
    dtype = flags.DEFINE_enum("dtype", "float16", list(DTYPES), "Type of the stored numbers.")
    entropies = flags.DEFINE_bool("entropies", False, "Store entropies as well.")
    distributed_flag = define_distributed_flag()

    def command() -> None:
        stopping.listen()
        start(distributed_flag.value)
        score_data(config.value, dtype.value, entropies.value)

    run(command)


if __name__ == "__main__":
    main()
