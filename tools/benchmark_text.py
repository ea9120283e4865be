"""How fast `prepare_data` tokenizes, against the bare library on the same documents. A part of tools/benchmark.py."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import sentencepiece
import tokenizers

from rho1_jax.data import records
from rho1_jax.data.prepare import Options, prepare
from rho1_jax.data.tokenizer import Tokenizer


def bare(tokenizer: Tokenizer) -> Callable[[str], Sequence[int]]:
    """The library's own encoding, without anything of ours around it."""
    if tokenizer.path.suffix == ".json":
        library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        return lambda text: library.encode(text, add_special_tokens=False).ids
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode


def tokenizing_ways(
    tokenizer: Tokenizer, files: list[pathlib.Path], templates: tuple[str, ...]
) -> tuple[dict[str, Callable[[], object]], int]:
    """The bare library, and `prepare_data`, which also reads, packs and writes; and how many tokens they make."""
    texts = [
        records.document(records.parse(file, record), templates)
        for file in files
        for _, record, _ in records.read(file)
    ]
    encode = bare(tokenizer)
    tokens = sum(len(encode(text)) for text in texts)
    cores = sorted(os.sched_getaffinity(0))
    options = Options(templates, None, seq_len=2048, eval_fraction=0.0, max_bad_fraction=0.0)

    def prepared(count: int) -> None:
        os.sched_setaffinity(0, cores[:count])
        with tempfile.TemporaryDirectory() as scratch:
            prepare(files, tokenizer, pathlib.Path(scratch) / "rows", options, workers=count)
        os.sched_setaffinity(0, cores)

    ways: dict[str, Callable[[], object]] = {
        "bare library, 1 core": lambda: [encode(text) for text in texts],
        "prepare_data, 1 core": lambda: prepared(1),
        f"prepare_data, {len(cores)} cores": lambda: prepared(len(cores)),
    }
    return ways, tokens
