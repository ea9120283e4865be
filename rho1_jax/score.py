"""Scores the training rows of data sets once, for any number of runs: losses (and entropies) of a reference.

python -m rho1_jax.score --config=FILE:slm --config.reference.scores=NAME [--dtype=float32] [--entropies]

The config is that of the runs that will read them. For each data set of config.data.train, what
config.reference.checkpoint makes of its rows is stored in DATA/scores/NAME. Interrupted and started again, it goes on.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rho1_jax.data.loader import eval_batches, open_mixture, to_devices
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import DTYPES, SPLIT, ScoreWriter, describe
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_reference_signals
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import define_config_flag, run
from rho1_jax.runtime.processes import define_distributed_flag, is_first, say, start
from rho1_jax.runtime.progress import Progress
from rho1_jax.train import check, check_batch_size, resolve
from rho1_jax.training import accounting
from rho1_jax.training.reference import load_frozen


def score(config: ml_collections.ConfigDict, dtype: str, entropies: bool) -> None:
    """Stores what the reference makes of each data set of the mixture. What is stored already is kept.

    Raises:
      UserError: config, data or reference do not fit, or something else is stored under the name.
    """
    check(config)
    mesh = sharding.make_mesh(**config.mesh)
    check_batch_size(config, mesh)
    stores, _ = open_mixture(config.data.train)
    config = resolve(config, stores, stores[0].tokenizer())
    with jax.set_mesh(mesh):
        reference, params, description = load_frozen(config, stores[0], mesh)
        signals = make_reference_signals(decoder.build(reference), config.data.document_mask, entropies)
        jitted = functools.partial(jax.jit(signals, out_shardings=sharding.replicated(mesh)), params)
        for store in stores:
            described = describe(store, description, config.data.document_mask)
            writer = ScoreWriter(store, config.reference.scores, described, dtype, entropies)
            if writer.finished:
                say(f"{store.path}: is scored already")
                continue
            flops = accounting.ForwardFlops.of(reference, store.seq_len).total
            score_rows(store, writer, jitted, config.batch_size // config.microbatches, mesh, flops)


def score_rows(
    store: Store,
    writer: ScoreWriter,
    signals: Callable[[Any], tuple],
    batch_size: int,
    mesh: Mesh,
    flops_per_token: float,
) -> None:
    """Scores the shards of a data set that are not on the disk yet, and finishes its scores."""
    if is_first():
        writer.start()
    shards = writer.shards()
    # All processes score the same shards, whatever each of them sees of the first one's disk.
    done = multihost_utils.broadcast_one_to_all(np.array([writer.has(number) for number in range(len(shards))]))
    left = [(number, rows) for number, rows in enumerate(shards) if not done[number]]
    start_time, tokens = time.monotonic(), store.seq_len * sum(len(rows) for _, rows in left)
    rows_of_all = store.rows(SPLIT)
    with Progress(f"score {store.path.name}", tokens, unit="tokens") as progress:
        for number, rows in left:
            found, waiting = [], None
            for batch in eval_batches(rows_of_all, batch_size, sharding.local_rows(mesh, batch_size), rows):
                started = signals(to_devices(batch, mesh, batch_size))
                if waiting is not None:  # the next one runs meanwhile
                    found.append(jax.device_get(waiting))
                    progress.advance(batch_size * store.seq_len)
                waiting = started
            found.append(jax.device_get(waiting))
            progress.advance(len(rows) * store.seq_len - (len(found) - 1) * batch_size * store.seq_len)
            if is_first():
                arrays = {name: np.concatenate(part)[: len(rows)] for name, part in zip(writer.names, zip(*found))}
                writer.write(number, arrays)
    rate = tokens / (time.monotonic() - start_time)
    if is_first():
        writer.finish({"flops": flops_per_token * store.seq_len * len(rows_of_all)})
    say(f"{store.path}: {tokens:,} tokens scored, {rate:,.0f} a second, {writer.bytes_per_token} bytes a token")


def main() -> None:
    """The command: its flags, then `score`."""
    config = define_config_flag()
    dtype = flags.DEFINE_enum("dtype", "float16", list(DTYPES), "Of what is stored.")
    entropies = flags.DEFINE_bool("entropies", False, "Store entropies, too.")
    distributed_flag = define_distributed_flag()

    def command() -> None:
        start(distributed_flag.value)
        score(config.value, dtype.value, entropies.value)

    run(command)


if __name__ == "__main__":
    main()
