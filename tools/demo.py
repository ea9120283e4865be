"""Run the method end to end on a generated corpus: text, tokenizer, packed rows, reference, three arms, report.

python -m tools.demo [--output=runs/demo] [--seed=0] [--cached]

An interrupted run resumes when the same command is run again. Everything is written under --output. --cached adds an
arm that trains SLM from stored reference losses.
"""

import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import ml_collections
from absl import flags

from rho1_jax.analysis.token_report import TokenScores
from rho1_jax.configs import demo as demo_config
from rho1_jax.data import preparation
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.report import compare
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.files import write_text
from rho1_jax.score import score_data
from rho1_jax.train import train_model
from rho1_jax.train_tokenizer import train_tokenizer
from rho1_jax.training import checkpoint
from tools.demo_corpus import write_corpora
from tools.demo_report import SHOWN_ROWS, arm_summary, token_speedup, write_report

ARMS = ("reference", "clm", "random", "slm")
CACHED = "slm_cached"
SCORES = "reference"  # name of the stored reference losses
CLEAN_PROBLEMS, NOISY_PROBLEMS, QUESTIONS = 40_000, 12_000, 288
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "sentencepiece")


def announce(text: str) -> None:
    print(f"== {text}", flush=True)


def make_data(output: pathlib.Path, seed: int) -> None:
    """Write corpora, tokenizer and packed rows to `output`/data. Keep the ones that exist."""
    data = output / "data"
    corpora = [data / "clean.jsonl", data / "noisy.jsonl"]
    if not (data / "questions.jsonl").exists():
        announce("writing the corpora")
        write_corpora(data, seed, CLEAN_PROBLEMS, NOISY_PROBLEMS, QUESTIONS)
    if not (data / "tokenizer.model").exists():
        announce("training the tokenizer")
        train_tokenizer(corpora, data / "tokenizer.model", demo_config.VOCAB_SIZE, ["{text}"], max_sentences=50_000)
    for corpus in corpora:
        announce(f"preparing {corpus.name}")
        options = preparation.Options(("{text}",), None, demo_config.SEQ_LEN, eval_fraction=0.02, max_bad_fraction=0.0)
        preparation.prepare([corpus], Tokenizer(data / "tokenizer.model"), data / corpus.stem, options, workers=2)


def arm_config(arm: str, output: pathlib.Path, seed: int) -> ml_collections.ConfigDict:
    """The config of an arm, with its directories under `output`."""
    config = demo_config.get_config("slm" if arm == CACHED else arm)
    data = output / "data"
    config.seed = seed
    config.data.train = str(data / ("clean" if arm == "reference" else "noisy"))
    config.reference.checkpoint = str(output / "reference")
    config.reference.scores = SCORES if arm == CACHED else ""
    config.eval.data = f"clean={data / 'clean'}"
    config.eval.questions = f"problems={data / 'questions.jsonl'}"
    config.lock()
    return config


def half_way_scores(output: pathlib.Path, config: ml_collections.ConfigDict) -> TokenScores:
    """Score held-out noisy rows with the half-trained SLM model and its reference."""
    half_way = min(checkpoint.steps(output / "slm"), key=lambda step: abs(step - config.steps / 2))
    policy, store = checkpoint.at(output / "slm", half_way), Store(output / "data" / "noisy")
    return compare(policy, output / "reference", store, 4 * SHOWN_ROWS, config.selection.ratio)[0]


def demo(output: pathlib.Path, seed: int, cached: bool = False) -> dict[str, Any]:
    """Run everything, write summary.json, curves.png and report.html, and return the summary."""
    start = time.monotonic()
    make_data(output, seed)
    seconds_file = output / "seconds.json"  # totals over all starts of an interrupted run
    names = (*ARMS, CACHED) if cached else ARMS
    seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    for arm in names:
        config = arm_config(arm, output, seed)
        arm_start = time.monotonic()
        if arm == CACHED:
            score_data(config, "float32", entropies=False)
        announce(f"{arm}: {config.steps} steps of {config.batch_size * demo_config.SEQ_LEN:,} tokens")
        train_model(config, output / arm)
        seconds[arm] = seconds.get(arm, 0.0) + time.monotonic() - arm_start
        seconds["total"] = seconds.get("total", 0.0) + time.monotonic() - start
        start = time.monotonic()
        write_text(seconds_file, json.dumps(seconds))
    arms = {arm: {**arm_summary(output / arm), "seconds": seconds[arm]} for arm in names}
    summary = {
        "arms": arms,
        "token_speedup": token_speedup(arms["clm"]["curve"], arms["slm"]["curve"]),
        "seconds": seconds["total"],
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }
    tokenizer = Tokenizer(output / "data" / "tokenizer.model")
    write_report(output, summary, half_way_scores(output, config), tokenizer, config.selection.ratio)
    return summary


def main() -> None:
    """Define the flags, run `demo` and print its summary."""
    output = flags.DEFINE_string("output", "runs/demo", "Directory for everything the demo writes.")
    seed = flags.DEFINE_integer("seed", 0, "Seed of corpus, initial weights and data order.")
    cached = flags.DEFINE_bool("cached", False, "Also train SLM from stored reference losses.")

    def command() -> None:
        summary = demo(pathlib.Path(output.value), seed.value, cached.value)
        widths = {
            "tokens seen": 13,
            "trained on": 13,
            "clean loss": 12,
            "accuracy": 15,
            "tokens/s": 10,
            "seconds": 9,
        }
        print(f"{'arm':<12}" + "".join(f"{title:>{width}}" for title, width in widths.items()))
        for arm, values in summary["arms"].items():
            final = values["final"]
            print(
                f"{arm:<12}{values['tokens_seen']:>13,}{values['tokens_selected']:>13,}{final['loss']:>12.3f}"
                f"{final['accuracy']:>15.1%}{values['tokens_per_second']:>10,.0f}{values['seconds']:>9.0f}"
            )
        print(f"token_speedup {summary['token_speedup']}, seconds {summary['seconds']:.0f}")
        print(f"report: {output.value}/report.html")

    run(command)


if __name__ == "__main__":
    main()
