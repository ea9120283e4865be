"""Scoring the rows of a data set with a reference, shard by shard."""

import contextlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rho1_jax.data.loader import eval_batches, to_devices
from rho1_jax.data.packing import Batch
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import SPLIT, ScoreWriter
from rho1_jax.runtime import sharding, stopping
from rho1_jax.runtime.lock import locked
from rho1_jax.runtime.processes import is_first, say
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.stopping import Stopped


def score_rows(
    store: Store,
    writer: ScoreWriter,
    signals: Callable[[Batch], tuple[jax.Array, jax.Array | None]],
    batch_size: int,
    mesh: Mesh,
    flops_per_token: float,
) -> None:
    """Scores the shards of a data set that are not on disk yet, and finishes its scores.

    Args:
      store: the data set.
      writer: stores the scores.
      signals: losses and entropies [B, L] of a batch on the mesh.
      batch_size: rows of a batch, over all devices.
      mesh: the devices.
      flops_per_token: cost of a token's forward pass, for the manifest.

    Raises:
      UserError: another process scores the same rows under the same name.
      Stopped: a process was asked to stop.
    """
    with contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(locked(writer.lock_path, str(store.path)))
            writer.start()
        stopping.save_on_stop()
        _score_rows(store, writer, signals, batch_size, mesh)
        if is_first():
            writer.finish({"flops": flops_per_token * store.seq_len * len(store.rows(SPLIT))})


def _score_rows(
    store: Store,
    writer: ScoreWriter,
    signals: Callable[[Batch], tuple[jax.Array, jax.Array | None]],
    batch_size: int,
    mesh: Mesh,
) -> None:
    """Scores and writes the shards that are not on disk yet."""
    shards = writer.shards()
    # All processes must score the same shards, and only the first one's disk counts.
    done = multihost_utils.broadcast_one_to_all(np.array([writer.has(number) for number in range(len(shards))]))
    left = [(number, rows) for number, rows in enumerate(shards) if not done[number]]
    start_time, tokens = time.monotonic(), store.seq_len * sum(len(rows) for _, rows in left)
    all_rows = store.rows(SPLIT)
    with Progress(f"score {store.path.name}", tokens, unit="tokens") as progress:
        for number, rows in left:
            parts, waiting = [], None
            for batch in eval_batches(all_rows, batch_size, sharding.local_rows(mesh, batch_size), rows):
                vote = stopping.vote()
                running = signals(to_devices(batch, mesh, batch_size))
                if waiting is not None:  # fetched while the next batch runs
                    parts.append(jax.device_get(waiting))
                    progress.advance(batch_size * store.seq_len)
                waiting = running
                if vote():
                    raise Stopped(f"stopped after {number} of {len(shards)} shards; the same command resumes there")
            parts.append(jax.device_get(waiting))
            progress.advance(len(rows) * store.seq_len - (len(parts) - 1) * batch_size * store.seq_len)
            if is_first():
                arrays = {name: np.concatenate(part)[: len(rows)] for name, part in zip(writer.names, zip(*parts))}
                writer.write(number, arrays)
    rate = tokens / (time.monotonic() - start_time)
    say(f"{store.path}: {tokens:,} tokens scored, {rate:,.0f} per second, {writer.bytes_per_token} bytes per token")
