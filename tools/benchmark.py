"""Speeds, measured side by side in one run.

python -m tools.benchmark --tokenizer=FILE --input=FILES [--text_template=...] [--repeats=3]

Tokens a second of preparing a data set on one core and on all, against the bare library on the same documents.
"""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import sentencepiece
import tokenizers
from absl import flags

from rho1_jax.config import run
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


def main() -> None:
    """The command: its flags, then `tokenizing`."""
    tokenizer = flags.DEFINE_string("tokenizer", None, "A tokenizer's file or folder.", required=True)
    inputs = flags.DEFINE_list("input", None, "Files or globs, divided by commas.", required=True)
    text_templates = flags.DEFINE_multi_string("text_template", [], "As in prepare_data.")
    repeats = flags.DEFINE_integer("repeats", 3, "Rounds.", lower_bound=1)

    def command() -> None:
        templates = records.parse_templates("text", text_templates.value)
        tokenizing(Tokenizer(tokenizer.value), records.expand(inputs.value), templates, repeats.value)

    run(command)


if __name__ == "__main__":
    main()
