"""How fast `prepare_data` tokenizes, against the bare library on the same documents. A part of tools/benchmark.py."""

import os
import pathlib
import statistics
import tempfile
import time
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


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tokenizing(tokenizer: Tokenizer, files: list[pathlib.Path], templates: tuple[str, ...], repeats: int) -> None:
    """Prints tokens a second, the median of `repeats` rounds in which each way has its turn."""
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
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    print(f"{tokens:,} tokens in {len(texts):,} documents; prepare_data also reads, packs and writes")
    first = statistics.median(taken["bare library, 1 core"] for taken in rounds)
    for name in ways:
        took = [taken[name] for taken in rounds]
        middle = statistics.median(took)
        spread = f"{tokens / max(took):,.0f} to {tokens / min(took):,.0f}"
        print(f"{name:<26}{tokens / middle:>12,.0f} tokens a second ({spread}), {first / middle:.2f} of the first")
