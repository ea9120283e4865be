"""Speeds, measured side by side in one run: every way has its turn in each round, and the median is told.

python -m tools.benchmark --what=steps [--size=6m --size=34m] [--peers] [--repeats=5] [--output=FILE.json]
python -m tools.benchmark --what=generation [--peers]      python -m tools.benchmark --what=selection
python -m tools.benchmark --what=loading --data=DIR        python -m tools.benchmark --what=head_memory
python -m tools.benchmark --what=scoring --data=DIR --size=6m
python -m tools.benchmark --what=tokenizing --tokenizer=FILE --input=FILES [--text_template=...]

"steps" are CLM, SLM with the reference in the step (online), SLM whose reference ran before (cached), and scoring, that
is, the reference alone. --peers adds Transformers on PyTorch, eager and compiled (extra `peers`).
"""

import dataclasses
import importlib
import json
import pathlib
import statistics
import time
import types
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data import records
from rho1_jax.data.packing import Batch
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method import selection
from rho1_jax.method.selection import Selection
from rho1_jax.models import decoder
from rho1_jax.models.forward import make_token_losses
from rho1_jax.models.generation import TAIL, Generator
from rho1_jax.models.token_loss import token_losses
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import write_text
from rho1_jax.training.accounting import ForwardFlops, training_flops
from rho1_jax.training.state import TrainState
from rho1_jax.training.train_step import make_train_step
from tools.benchmark_data import loading_ways, scoring_ways, tokenizing_ways

RULE = Selection()
NEW_TOKENS = 64
SPREAD = 0.8  # of the logarithm of continuations' lengths; between the longest and the mean of 16 lies a factor of 3
PAUSE = 0.5  # seconds between two ways: PyTorch's threads go on spinning for a while, at the next way's cost
PRODUCT = 2048  # rows, columns and depth of the matrix product that tells what the machine can do


class Size(NamedTuple):
    """A model and the batch it is timed on."""

    model: dict[str, Any]
    rows: int
    seq_len: int

    def config(self) -> ModelConfig:
        """The model in float32, its loop over layers unrolled."""
        return ModelConfig(**self.model, context_length=self.seq_len, unroll=self.model["layers"])


_6M = {"vocab_size": 4096, "width": 256, "layers": 6, "heads": 8, "kv_heads": 4, "head_width": 32, "ff_width": 768}
_34M = {"vocab_size": 32_000, "width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "head_width": 64, "ff_width": 1024}
_1M = {"vocab_size": 640, "width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_width": 32, "ff_width": 384}
_TINY = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ff_width": 48}
SIZES = {"1m": Size(_1M, 16, 256), "6m": Size(_6M, 16, 256), "34m": Size(_34M, 8, 512), "tiny": Size(_TINY, 4, 32)}

Ways = dict[str, Callable[[], object]]


def timed(ways: Ways, amount: float, repeats: int) -> dict[str, dict[str, float]]:
    """How much of `amount` each way does in a second: median, lowest and highest of the rounds, after one untold."""
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {
        name: {
            "median": amount / statistics.median(seconds),
            "lowest": amount / max(seconds),
            "highest": amount / min(seconds),
        }
        for name, seconds in taken.items()
    }


def step_ways(size: Size) -> Ways:
    """One step of each arm, and scoring."""
    config = size.config()
    graphdef, tx = decoder.build(config), optax.adamw(1e-3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (size.rows, size.seq_len + 1), dtype=np.int32)
    batch = Batch(jnp.array(tokens), jnp.ones_like(tokens))
    reference = decoder.init_params(config, 1)
    losses = jax.jit(make_token_losses(graphdef, document_mask=True))
    scored = batch._replace(reference_losses=losses(reference, batch)[0])

    def arm(score: str, frozen: Any, rows: Batch) -> Callable[[], object]:
        step = jax.jit(
            make_train_step(
                graphdef,
                graphdef if frozen is not None else None,
                tx,
                rule=dataclasses.replace(RULE, score=score),
                steps=1,
                microbatches=1,
                document_mask=True,
                seed=0,
            ),
            donate_argnums=0,
        )
        params = decoder.init_params(config, 0)
        state = [TrainState(jnp.int32(0), params, tx.init(params))]

        def one() -> None:
            state[0], *_ = step(state[0], frozen, rows)
            jax.block_until_ready(state[0])

        return one

    return {
        "CLM": arm("none", None, batch),
        "SLM online": arm("excess", reference, batch),
        "SLM cached": arm("excess", None, scored),
        "scoring": lambda: jax.block_until_ready(losses(reference, batch)),
    }


class Work(NamedTuple):
    """Prompts [n, L] of half a row, and how many tokens the continuation of each has."""

    prompts: np.ndarray
    lengths: np.ndarray


def generation_work(size: Size) -> dict[str, Work]:
    """As many prompts as rows, continued alike; and four times as many, whose continuations end as answers do."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, size.model["vocab_size"], (4 * size.rows, size.seq_len // 2))
    prompts[:, -1] = np.arange(len(prompts))  # by this the tokenizer knows them
    spread = (NEW_TOKENS // 2 * np.exp(SPREAD * rng.normal(size=len(prompts)))).astype(int).clip(8, 4 * NEW_TOKENS)
    return {
        f"{NEW_TOKENS} tokens each": Work(prompts[: size.rows], np.full(size.rows, NEW_TOKENS)),
        f"{spread.min()} to {spread.max()} tokens, {spread.mean():.0f} on average": Work(prompts, spread),
    }


class _Tokenizer:
    """Stands for one: a prompt is its number, and a continuation ends with a dot when it is as long as it shall be."""

    eos_id = -1

    def __init__(self, work: Work):
        self._work = work

    def encode_prompt(self, prompt: str) -> list[int]:
        return self._work.prompts[int(prompt)].tolist()

    def decode(self, ids: list[int]) -> str:
        length, new = self._work.lengths[ids[TAIL - 1]], len(ids) - TAIL
        return "x" * min(new, length) + ("." if new >= length else "")


def generation_ways(size: Size, work: Work) -> Ways:
    """Greedy continuation of prompts, as many at a time as the size has rows."""
    config = size.config()
    graphdef, params = decoder.build(config), decoder.init_params(config, 0)
    generator = Generator(graphdef, params, _Tokenizer(work), size.rows)  # type: ignore[arg-type]

    def one() -> None:
        requests = deque((number, str(number)) for number in range(len(work.prompts)))
        for number, text, *_ in generator.run(requests, max_new_tokens=int(work.lengths.max()), stops=["."]):
            assert len(text) == work.lengths[number]

    return {"generate": one}


def product_ways() -> Ways:
    """A product of two square matrices in float32."""
    a = jnp.ones((PRODUCT, PRODUCT))
    product = jax.jit(lambda a: a @ a)
    return {"JAX": lambda: jax.block_until_ready(product(a))}


def selection_ways(tokens: int) -> Ways:
    """Both selections of 60 % of so many scores."""
    rng = np.random.default_rng(0)
    score_BL = jnp.array(rng.normal(size=(tokens // 256, 256)), jnp.float32)
    eligible_BL = jnp.array(rng.random(score_BL.shape) < 0.95)

    def way(select: Callable) -> Callable[[], object]:
        units = selection.ratio_units(RULE.ratio)
        jitted = jax.jit(lambda score, eligible: select(score, eligible, units))
        return lambda: jax.block_until_ready(jitted(score_BL, eligible_BL))

    return {"top_k": way(selection.select_by_sort), "bisection": way(selection.select_by_bisection)}


def head_memory(tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """MiB of temporaries of loss and gradient of the output head: ours, and with all logits at once."""
    hidden = jax.ShapeDtypeStruct((tokens // 512, 512, width), jnp.float32)
    output = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens // 512, 512), jnp.int32)

    def plain(hidden: jax.Array, output: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.einsum("BLD,VD->BLV", hidden, output)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    ways: dict[str, Callable] = {"in chunks": lambda h, o, t: token_losses(h, o, t, 512, False)[0], "all logits": plain}
    found = {}
    for name, losses in ways.items():
        gradient = jax.grad(lambda h, o, t, losses=losses: losses(h, o, t).mean(), argnums=(0, 1))
        analysis: Any = jax.jit(gradient).lower(hidden, output, targets).compile().memory_analysis()
        found[name] = analysis.temp_size_in_bytes / 2**20
    return found


def table(title: str, found: dict[str, dict[str, float]], unit: str) -> None:
    """Prints the figures, each against the first."""
    print(f"\n| {title} | {unit} | lowest to highest | of the first |\n| --- | --- | --- | --- |")
    first = next(iter(found.values()))["median"]
    for name, way in found.items():
        spread = f"{way['lowest']:,.0f} to {way['highest']:,.0f}"
        print(f"| {name} | {way['median']:,.0f} | {spread} | {way['median'] / first:.2f} |", flush=True)


def peer_module() -> types.ModuleType:
    """tools/benchmark_peers.py, whose libraries are an extra. Raises UserError where they are not installed."""
    try:
        return importlib.import_module("tools.benchmark_peers")
    except ModuleNotFoundError as error:
        raise UserError(f"--peers: {error}; install the extra `peers`: pip install -e '.[peers]'") from None


def measure(what: str, sizes: list[str], peers: bool, repeats: int, text: tuple[Ways, int] | None) -> dict[str, Any]:
    """Measures and prints; returns the figures by title. `text` are ways to handle text, and how much of it."""
    found: dict[str, Any] = {}
    if what == "selection":
        for tokens in (2**12, 2**14, 2**16, 2**18, 2**20):
            title = f"selection among {tokens:,} scores"
            found[title] = timed(selection_ways(tokens), tokens, repeats)
            table(title, found[title], "scores a second")
    elif what == "head_memory":
        found[what] = head_memory(16_384, 32_000, 384)
        print(", ".join(f"{name}: {size:,.0f} MiB" for name, size in found[what].items()))
    elif text is not None:
        found[what] = timed(*text, repeats)
        table(what, found[what], "tokens a second")
    else:
        for name in sizes:
            if what == "generation":
                for title, work in generation_work(SIZES[name]).items():
                    ways = generation_ways(SIZES[name], work)
                    if peers:
                        ways |= peer_module().generation_ways(SIZES[name], work)
                    found[f"{name}, {title}"] = timed(ways, work.lengths.sum(), repeats)
                    table(f"{name}, {title}", found[f"{name}, {title}"], "tokens a second")
                continue
            size = SIZES[name]
            ways = step_ways(size)
            if peers:
                ways |= peer_module().step_ways(size, RULE.ratio)
            found[name] = timed(ways, size.rows * size.seq_len, repeats)
            table(f"{name} {what}", found[name], "tokens a second")
            tell_products(size, found[name], peers, repeats)
    return found


def tell_products(size: Size, found: dict[str, dict[str, float]], peers: bool, repeats: int) -> None:
    """Prints how fast a matrix product is here, and at what share of that CLM and SLM compute what the model needs."""
    ways = product_ways()
    if peers:
        ways |= peer_module().product_ways(PRODUCT)
    for name, speed in timed(ways, 2 * PRODUCT**3, repeats).items():
        print(f"{name}: matrix products at {speed['median'] / 1e9:,.0f} GFLOP/s")
        if name == "JAX":
            product_flops = speed["median"]
    forward = ForwardFlops.of(size.config(), size.seq_len)
    for name, reference, ratio in (("CLM", None, 1.0), ("SLM online", forward, RULE.ratio)):
        needed = sum(training_flops(forward, reference, 1, ratio).values())
        print(f"{name}: {needed * found[name]['median'] / product_flops:.0%} of that in model FLOPs")


def main() -> None:
    """The command: its flags, then `measure`."""
    kinds = ["steps", "generation", "selection", "head_memory", "loading", "scoring", "tokenizing"]
    what = flags.DEFINE_enum("what", "steps", kinds, "What to measure.")
    sizes = flags.DEFINE_multi_enum("size", ["6m", "34m"], list(SIZES), "Of the model; more than one may be given.")
    peers = flags.DEFINE_bool("peers", False, "Transformers on PyTorch, too.")
    repeats = flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
    data = flags.DEFINE_string("data", None, "A prepared data set, for loading and scoring.")
    tokenizer = flags.DEFINE_string("tokenizer", None, "A tokenizer's file or folder, for tokenizing.")
    inputs = flags.DEFINE_list("input", [], "Files or globs, divided by commas, for tokenizing.")
    text_templates = flags.DEFINE_multi_string("text_template", [], "As in prepare_data.")
    output = flags.DEFINE_string("output", None, "JSON file for all figures.")

    def command() -> None:
        text = None
        if what.value in ("loading", "scoring"):
            if not data.value:
                raise UserError(f"--what={what.value} needs --data=DIR, a prepared data set")
            size = SIZES[sizes.value[0]]
            text = loading_ways(data.value, 64) if what.value == "loading" else scoring_ways(data.value, size.config())
        elif what.value == "tokenizing":
            if not tokenizer.value or not inputs.value:
                raise UserError("--what=tokenizing needs --tokenizer=FILE and --input=FILES")
            templates = records.parse_templates("text", text_templates.value)
            text = tokenizing_ways(Tokenizer(tokenizer.value), records.expand(inputs.value), templates)
        found = measure(what.value, sizes.value, peers.value, repeats.value, text)
        if output.value:
            write_text(pathlib.Path(output.value), json.dumps(found, indent=2) + "\n")

    run(command)


if __name__ == "__main__":
    main()
