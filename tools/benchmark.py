"""Measure speeds side by side: every way runs once per round, and the table shows the median over the rounds.

python -m tools.benchmark --what=steps [--size=6m --size=34m] [--ratio=0.6] [--tokens=0.6] [--peers]
python -m tools.benchmark --what=generation [--peers]      python -m tools.benchmark --what=selection
python -m tools.benchmark --what=loading --data=DIR        python -m tools.benchmark --what=head_memory
python -m tools.benchmark --what=scoring --data=DIR --size=6m
python -m tools.benchmark --what=tokenizing --tokenizer=FILE --input=FILES [--text_template=...]

"steps" times CLM, SLM with the reference in the step (online), SLM with stored reference losses (cached), both again
with config.backward.tokens=TOKENS, and scoring, which runs the reference alone. --peers adds Transformers on PyTorch,
eager and compiled (extra `peers`).
"""

import importlib
import json
import pathlib
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from rho1_jax.configs.default import BackwardConfig
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
from tools.benchmark_cases import SIZES, Size, Speeds, Ways, Work, generation_work, timed
from tools.benchmark_data import loading_ways, scoring_ways, tokenizing_ways

RULE = Selection()
PRODUCT = 2048  # rows, columns and depth of the matrix product whose speed stands for the machine's peak


def step_ways(size: Size, ratio: float, few: float) -> Ways:
    """One train step of each arm, and one forward pass of the reference.

    Args:
      size: the model and its batch.
      ratio: share of the tokens that SLM selects.
      few: `config.backward.tokens` of the arms that have it.
    """
    config = size.config()
    graphdef, tx = decoder.build(config), optax.adamw(1e-3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (size.rows, size.seq_len + 1), dtype=np.int32)
    batch = Batch(jnp.array(tokens), jnp.ones_like(tokens))
    reference = decoder.init_params(config, 1)
    losses = jax.jit(make_token_losses(graphdef, document_mask=True))
    scored = batch._replace(columns={"reference_loss_BL": losses(reference, batch)[0]})

    def arm(score: str, frozen: Any, rows: Batch, backward: float = 1.0) -> Callable[[], object]:
        step = jax.jit(
            make_train_step(
                graphdef,
                graphdef if frozen is not None else None,
                tx,
                rule=Selection(score=score, ratio=ratio),
                steps=1,
                microbatches=1,
                document_mask=True,
                seed=0,
                backward=BackwardConfig(backward),
            ),
            donate_argnums=0,
        )
        params = decoder.init_params(config, 0)
        state = [TrainState(jnp.int32(0), params, tx.init(params))]

        def run_step() -> None:
            state[0], *_ = step(state[0], frozen, rows)
            jax.block_until_ready(state[0])

        return run_step

    return {
        "CLM": arm("none", None, batch),
        "SLM online": arm("excess", reference, batch),
        "SLM cached": arm("excess", None, scored),
        f"SLM online, {few:.0%} backward": arm("excess", reference, batch, few),
        f"SLM cached, {few:.0%} backward": arm("excess", None, scored, few),
        "scoring": lambda: jax.block_until_ready(losses(reference, batch)),
    }


class _Tokenizer:
    """A tokenizer for `Work`: a prompt is its number as text, and a continuation of the right length ends in a dot."""

    eos_ids = (-1,)

    def __init__(self, work: Work):
        self._work = work

    def encode_prompt(self, prompt: str) -> list[int]:
        return self._work.prompts[int(prompt)].tolist()

    def decode(self, ids: list[int]) -> str:
        length, new = self._work.lengths[ids[TAIL - 1]], len(ids) - TAIL
        return "x" * min(new, length) + ("." if new >= length else "")


def generation_ways(size: Size, work: Work) -> Ways:
    """Greedy generation for the prompts of `work`, `size.rows` at a time."""
    config = size.config()
    graphdef, params = decoder.build(config), decoder.init_params(config, 0)
    generator = Generator(graphdef, params, _Tokenizer(work), size.rows)  # type: ignore[arg-type]

    def generate() -> None:
        requests = deque((number, str(number)) for number in range(len(work.prompts)))
        for number, text, *_ in generator.run(requests, max_new_tokens=int(work.lengths.max()), stops=["."]):
            assert len(text) == work.lengths[number]

    return {"generate": generate}


def product_ways() -> Ways:
    """The product of two square float32 matrices."""
    a = jnp.ones((PRODUCT, PRODUCT))
    product = jax.jit(lambda a: a @ a)
    return {"JAX": lambda: jax.block_until_ready(product(a))}


def selection_ways(tokens: int) -> Ways:
    """The two ways to select 60 % of `tokens` scores."""
    rng = np.random.default_rng(0)
    score_BL = jnp.array(rng.normal(size=(tokens // 256, 256)), jnp.float32)
    eligible_BL = jnp.array(rng.random(score_BL.shape) < 0.95)

    def way(select: Callable) -> Callable[[], object]:
        units = selection.ratio_units(RULE.ratio)
        jitted = jax.jit(lambda score, eligible: select(score, eligible, units))
        return lambda: jax.block_until_ready(jitted(score_BL, eligible_BL))

    return {"top_k": way(selection.select_by_sort), "bisection": way(selection.select_by_bisection)}


def head_memory(tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """MiB of temporaries for the output head's loss and gradient: in chunks, and with all logits at once."""
    hidden = jax.ShapeDtypeStruct((tokens // 512, 512, width), jnp.float32)
    output = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens // 512, 512), jnp.int32)

    def plain(hidden: jax.Array, output: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.einsum("BLD,VD->BLV", hidden, output)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    ways: dict[str, Callable] = {"in chunks": lambda h, o, t: token_losses(h, o, t, 512, False)[0], "all logits": plain}
    sizes = {}
    for name, losses in ways.items():
        gradient = jax.grad(lambda h, o, t, losses=losses: losses(h, o, t).mean(), argnums=(0, 1))
        analysis: Any = jax.jit(gradient).lower(hidden, output, targets).compile().memory_analysis()
        sizes[name] = analysis.temp_size_in_bytes / 2**20
    return sizes


def print_table(title: str, speeds: Speeds, unit: str) -> None:
    """Print the speeds in `unit`, and each median relative to the first way's."""
    print(f"\n| {title} | {unit} | lowest to highest | relative to first |\n| --- | --- | --- | --- |")
    first = next(iter(speeds.values()))["median"]
    for name, way in speeds.items():
        spread = f"{way['lowest']:,.0f} to {way['highest']:,.0f}"
        print(f"| {name} | {way['median']:,.0f} | {spread} | {way['median'] / first:.2f} |", flush=True)


def peer_module() -> types.ModuleType:
    """Import tools/benchmark_peers.py. Raises UserError if the libraries of its extra are not installed."""
    try:
        return importlib.import_module("tools.benchmark_peers")
    except ModuleNotFoundError as error:
        raise UserError(f"--peers: {error}; install the extra `peers`: pip install -e '.[peers]'") from None


def measure(
    what: str,
    sizes: list[str],
    peers: bool,
    repeats: int,
    text: tuple[Ways, int] | None,
    ratio: float = RULE.ratio,
    few: float = RULE.ratio,
) -> dict[str, Any]:
    """Measure `what`, print the figures, and return them by title.

    Args:
      what: a value of --what.
      sizes: names in SIZES, for "steps" and "generation".
      peers: whether to measure Transformers on PyTorch too.
      repeats: rounds per measurement.
      text: for "loading", "scoring" and "tokenizing", the ways to measure and the tokens each one processes.
      ratio: for "steps", the share of the tokens that SLM selects.
      few: for "steps", `config.backward.tokens` of the arms that have it.
    """
    figures: dict[str, Any] = {}

    def compare(title: str, ways: Ways, amount: float, unit: str = "tokens/s") -> None:
        figures[title] = timed(title, ways, amount, repeats)
        print_table(title, figures[title], unit)

    if what == "selection":
        for tokens in (2**12, 2**14, 2**16, 2**18, 2**20):
            compare(f"selection among {tokens:,} scores", selection_ways(tokens), tokens, "scores/s")
    elif what == "head_memory":
        figures[what] = head_memory(16_384, 32_000, 384)
        print(", ".join(f"{name}: {size:,.0f} MiB" for name, size in figures[what].items()))
    elif text is not None:
        compare(what, *text)
    elif what == "generation":
        for name in sizes:
            for title, work in generation_work(SIZES[name]).items():
                ways = generation_ways(SIZES[name], work)
                if peers:
                    ways |= peer_module().generation_ways(SIZES[name], work)
                compare(f"{name}, {title}", ways, work.lengths.sum())
    else:
        for name in sizes:
            size = SIZES[name]
            ways = step_ways(size, ratio, few)
            if peers:
                ways |= peer_module().step_ways(size, ratio)
            compare(f"{name} {what}", ways, size.rows * size.seq_len)
            print_utilization(size, figures[f"{name} {what}"], peers, repeats, ratio)
    return figures


def print_utilization(size: Size, speeds: Speeds, peers: bool, repeats: int, ratio: float) -> None:
    """Print the speed of a matrix product, and the model FLOPs of CLM and SLM as a share of it."""
    ways = product_ways()
    if peers:
        ways |= peer_module().product_ways(PRODUCT)
    products = timed("matrix products", ways, 2 * PRODUCT**3, repeats)
    for name, speed in products.items():
        print(f"{name}: matrix products at {speed['median'] / 1e9:,.0f} GFLOP/s")
    forward = ForwardFlops.of(size.config(), size.seq_len)
    for name, reference, selected in (("CLM", None, 1.0), ("SLM online", forward, ratio)):
        needed = sum(training_flops(forward, reference, 1, selected).values())
        share = needed * speeds[name]["median"] / products["JAX"]["median"]
        print(f"{name}: {share:.0%} of the JAX matrix product's speed, in model FLOPs")


def main() -> None:
    """Define the flags and run `measure`."""
    kinds = ["steps", "generation", "selection", "head_memory", "loading", "scoring", "tokenizing"]
    what = flags.DEFINE_enum("what", "steps", kinds, "What to measure.")
    sizes = flags.DEFINE_multi_enum("size", ["6m", "34m"], list(SIZES), "Model size. Repeatable.")
    peers = flags.DEFINE_bool("peers", False, "Also measure Transformers on PyTorch.")
    repeats = flags.DEFINE_integer("repeats", 5, "Rounds per measurement.", lower_bound=1)
    ratio = flags.DEFINE_float("ratio", RULE.ratio, "Share of the tokens that SLM selects.", 0.0, 1.0)
    few = flags.DEFINE_float("tokens", RULE.ratio, "config.backward.tokens of the arms that have it.", 0.0, 1.0)
    data = flags.DEFINE_string("data", None, "Prepared data set, for loading and scoring.")
    tokenizer = flags.DEFINE_string("tokenizer", None, "Tokenizer file or folder, for tokenizing.")
    inputs = flags.DEFINE_list("input", [], "Comma-separated files or globs, for tokenizing.")
    text_templates = flags.DEFINE_multi_string(
        "text_template", [], "Template of a document, as in `rho1 prepare`. Repeatable."
    )
    output = flags.DEFINE_string("output", None, "JSON file to write the figures to.")

    def command() -> None:
        text = None
        if what.value in ("loading", "scoring"):
            if not data.value:
                raise UserError(f"--what={what.value} needs a prepared data set: pass --data=DIR")
            size = SIZES[sizes.value[0]]
            text = loading_ways(data.value, 64) if what.value == "loading" else scoring_ways(data.value, size.config())
        elif what.value == "tokenizing":
            if not tokenizer.value or not inputs.value:
                raise UserError("--what=tokenizing needs --tokenizer=FILE and --input=FILES")
            templates = records.parse_templates("text", text_templates.value)
            text = tokenizing_ways(Tokenizer(tokenizer.value), records.expand(inputs.value), templates)
        figures = measure(what.value, sizes.value, peers.value, repeats.value, text, ratio.value, few.value)
        if output.value:
            write_text(pathlib.Path(output.value), json.dumps(figures, indent=2) + "\n")

    run(command)


if __name__ == "__main__":
    main()
