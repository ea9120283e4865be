"""What the benchmarks share: models, generation workloads, and timing."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rho1_jax.configs.default import ModelConfig
from rho1_jax.runtime.progress import Progress

NEW_TOKENS = 64
# Standard deviation of the log of the continuation lengths. The longest of 16 is then about three times the mean.
SPREAD = 0.8
PAUSE = 0.5  # seconds before each timing: PyTorch's threads spin for a while after a run and would slow the next one

Ways = dict[str, Callable[[], object]]
Speeds = dict[str, dict[str, float]]


class Size(NamedTuple):
    """A model and the shape of its batch."""

    model: dict[str, Any]
    rows: int
    seq_len: int

    def config(self) -> ModelConfig:
        """The model in float32, with its loop over layers unrolled and its logits kept, as PyTorch does."""
        return ModelConfig(**self.model, context_length=self.seq_len, unroll=self.model["layers"], logits_gib=1.0)


_6M = {"vocab_size": 4096, "width": 256, "layers": 6, "heads": 8, "kv_heads": 4, "head_width": 32, "ff_width": 768}
_34M = {"vocab_size": 32_000, "width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "head_width": 64, "ff_width": 1024}
_1M = {"vocab_size": 640, "width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_width": 32, "ff_width": 384}
_TINY = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ff_width": 48}
SIZES = {"1m": Size(_1M, 16, 256), "6m": Size(_6M, 16, 256), "34m": Size(_34M, 8, 512), "tiny": Size(_TINY, 4, 32)}


class Work(NamedTuple):
    """Prompts [n, L] of half a row each, and the number of tokens [n] to generate for each."""

    prompts: np.ndarray
    lengths: np.ndarray


def generation_work(size: Size) -> dict[str, Work]:
    """Workloads by title: `rows` prompts with equal lengths, and four times as many with varied lengths."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, size.model["vocab_size"], (4 * size.rows, size.seq_len // 2))
    prompts[:, -1] = np.arange(len(prompts))  # by the last token, the benchmark's tokenizer knows the prompt
    lengths = (NEW_TOKENS // 2 * np.exp(SPREAD * rng.normal(size=len(prompts)))).astype(int).clip(8, 4 * NEW_TOKENS)
    return {
        f"{NEW_TOKENS} tokens each": Work(prompts[: size.rows], np.full(size.rows, NEW_TOKENS)),
        f"{lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average": Work(prompts, lengths),
    }


def timed(title: str, ways: Ways, amount: float, repeats: int) -> Speeds:
    """Time every way once per round, and report progress under `title`.

    Returns:
      For each way, how much of `amount` it does per second: median, lowest and highest over `repeats` rounds. A first
      round, which compiles, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(title, (1 + repeats) * len(ways), unit="runs") as progress:
        for _ in range(1 + repeats):
            for name, way in ways.items():
                time.sleep(PAUSE)
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
                progress.advance(1, note=name)
    return {
        name: {
            "median": amount / statistics.median(counted),
            "lowest": amount / max(counted),
            "highest": amount / min(counted),
        }
        for name, (_, *counted) in seconds.items()
    }
