"""Tokenizing, loading and scoring, for tools/benchmark.py. Tokenizing and scoring come with an upper bound."""

import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
import sentencepiece
import tokenizers

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data import records
from rho1_jax.data.loader import batches, eval_batches, open_mixture, to_devices
from rho1_jax.data.preparation import Options, prepare
from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import SPLIT, ScoreWriter, describe
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.models.decoder import build, init_params
from rho1_jax.models.forward import make_reference_signals
from rho1_jax.runtime.sharding import make_mesh, replicated
from rho1_jax.training.scoring import score_rows
from tools.benchmark_cases import Ways

SCORED_ROWS = 16  # per batch and device


def bare_encoder(tokenizer: Tokenizer) -> Callable[[str], Sequence[int]]:
    """The tokenizer library's own encoder, without our wrapper."""
    if tokenizer.path.suffix == ".json":
        library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        return lambda text: library.encode(text, add_special_tokens=False).ids
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode


def tokenizing_ways(tokenizer: Tokenizer, files: list[pathlib.Path], templates: tuple[str, ...]) -> tuple[Ways, int]:
    """The bare library and `rho1 prepare`, which also reads, packs and writes. Also returns their number of tokens."""
    texts = [
        records.document(records.parse(file, record), templates)
        for file in files
        for _, record, _ in records.read(file)
    ]
    encode = bare_encoder(tokenizer)
    tokens = sum(len(encode(text)) for text in texts)
    cores = sorted(os.sched_getaffinity(0))
    options = Options(templates, None, seq_len=2048, eval_fraction=0.0, max_bad_fraction=0.0)

    def prepared(count: int) -> None:
        os.sched_setaffinity(0, cores[:count])
        with tempfile.TemporaryDirectory() as scratch:
            prepare(files, tokenizer, pathlib.Path(scratch) / "rows", options, workers=count)
        os.sched_setaffinity(0, cores)

    ways: Ways = {
        "bare library, 1 core": lambda: [encode(text) for text in texts],
        "rho1 prepare, 1 core": lambda: prepared(1),
        f"rho1 prepare, {len(cores)} cores": lambda: prepared(len(cores)),
    }
    return ways, tokens


def loading_ways(data: str, rows: int) -> tuple[Ways, int]:
    """Loading ten batches of a prepared data set. Also returns their number of tokens."""
    stores, weights = open_mixture(data)
    stream = batches(
        stores, weights, batch_size=rows, seed=0, first_step=0, rows=np.arange(rows), prefetch=4, permute=True
    )
    return {"batches": lambda: list(itertools.islice(stream, 10))}, 10 * rows * stores[0].seq_len


def scoring_ways(data: str, config: ModelConfig) -> tuple[Ways, int]:
    """The forward pass over rows in memory, and all of `rho1 score`. Also returns their number of tokens."""
    store, mesh = Store(data), make_mesh(-1, 1, 1)
    rows, size = store.rows(SPLIT), SCORED_ROWS * mesh.size
    params = init_params(dataclasses.replace(config, context_length=store.seq_len), 0)
    signals = make_reference_signals(build(config), document_mask=True, entropies=False)
    jitted = functools.partial(jax.jit(signals, out_shardings=replicated(mesh)), params)
    ready = [to_devices(batch, mesh, size) for batch in eval_batches(rows, size, np.arange(size))]

    def scored() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for child in store.path.iterdir():
                (pathlib.Path(scratch) / child.name).symlink_to(child.absolute())
            description = describe(Store(scratch), {"path": "", "fingerprint": ""}, document_mask=True)
            writer = ScoreWriter(Store(scratch), "benchmark", description, "float16", entropies=False)
            score_rows(Store(scratch), writer, jitted, size, mesh, 0.0)

    ways: Ways = {"forward pass": lambda: jax.block_until_ready([jitted(batch) for batch in ready]), "score": scored}
    return ways, len(rows) * store.seq_len
