"""Compare every selection rule on the demo's corpus: accuracy, tokens trained on, and total FLOPs.

python -m tools.study [--output=runs/study] [--seed=0 --seed=1 --seed=2] [--arm=excess ...]

Seed 0 tries each arm with every learning rate in RATES, and all seeds use the better one. Finished runs are kept. Once
seed 0 is done, several commands can share the work, each with its own seeds.
"""

import json
import pathlib
import re
import statistics
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags

from rho1_jax.data.store import Store
from rho1_jax.data.stored_scores import SPLIT
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method.signals import REFERENCE_SIGNALS
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.files import replacing, write_text
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.runtime.schema import read_json
from rho1_jax.score import score_data
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint
from rho1_jax.training.accounting import LEDGER_FILE
from rho1_jax.training.config import selection_rule
from tools.demo import SCORES, announce, arm_config, make_data

RATES = (7e-4, 1.5e-3)
PROBLEM = re.compile(r"Q: [^\n]*\nS: [^\n]*\nA: [^\n]*\n")

# What each arm changes in the demo's SLM config.
ARMS: dict[str, dict[str, Any]] = {
    "CLM": {"selection": {"score": "none"}},
    "random": {"selection": {"score": "random"}},
    "excess (SLM)": {},
    "reference_loss": {"selection": {"score": "reference_loss"}},
    "reference_entropy": {"selection": {"score": "reference_entropy"}},
    "policy_loss": {"selection": {"score": "policy_loss"}},
    "policy_entropy": {"selection": {"score": "policy_entropy"}},
    "reference loss and entropy": {"selection": {"score": "reference_loss:0.2 & reference_entropy:0.2"}},
    "reference loss or entropy": {"selection": {"score": "reference_loss:0.06 | reference_entropy:0.06"}},
    "excess, threshold": {"selection": {"rule": "threshold", "threshold": 0.5}},
    "excess, soft": {"selection": {"rule": "soft", "threshold": 0.5, "temperature": 0.25}},
    "excess, ratio falls": {"selection": {"schedule": "linear", "first_ratio": 0.5}},
    "excess, average": {"reference": {"moves": "average", "decay": 0.99}, "selection": {"dense_fraction": 0.1}},
    "problems only": {"selection": {"score": "external", "rule": "threshold", "threshold": 0.5}},
}


class Result(NamedTuple):
    """The final figures of a run."""

    rate: float  # learning rate
    accuracy: float
    loss: float  # nats per token, on clean text
    trained: int  # selected tokens
    flops: float  # includes training the reference and scoring with it


def problem_mask(store: Store, tokenizer: Tokenizer) -> np.ndarray:
    """Bool mask [rows, seq_len] of the targets that belong to a complete problem, correct or not."""
    rows = store.rows(SPLIT)
    mask = np.zeros((len(rows), store.seq_len), bool)
    for number in range(len(rows)):
        pieces = tokenizer.pieces(rows[number]["tokens"].tolist())
        ends = np.cumsum([len(piece) for piece in pieces])
        for match in PROBLEM.finditer("".join(pieces)):
            mask[number] |= ((ends > match.start()) & (ends <= match.end()))[1:]
    return mask


def prepare(output: pathlib.Path, seed: int) -> None:
    """Make data, reference, its scores and the mask of problems for one seed. Keep the ones that exist."""
    make_data(output, seed)
    reference = arm_config("reference", output, seed)
    reference.eval.every = reference.checkpoint.every = reference.steps
    train_model(reference, output / "reference")
    config = arm_config("slm", output, seed)
    config.reference.scores = SCORES
    score_data(config, "float16", entropies=True)
    if not (output / "problems.npy").exists():
        announce("finding the problems")
        tokenizer = Tokenizer(output / "data" / "tokenizer.model")
        with replacing(output / "problems.npy") as beside, beside.open("wb") as file:
            np.save(file, problem_mask(Store(output / "data" / "noisy"), tokenizer))


def study_config(arm: str, output: pathlib.Path, seed: int, rate: float) -> ml_collections.ConfigDict:
    """The config of a run. It reads stored reference scores unless its reference is a moving average."""
    config = arm_config("slm", output, seed)
    config.eval.every = config.checkpoint.every = config.steps
    config.optimizer.learning_rate = rate
    config.update(ARMS[arm])
    config.data.external = str(output / "problems.npy")
    config.reference.checkpoint = ""
    config.reference.scores = "" if config.reference.moves else SCORES
    return config


def run_arm(arm: str, output: pathlib.Path, seed: int, rate: float) -> Result:
    """Train one arm unless its run is finished, and return its result."""
    workdir = output / re.sub(r"\W+", "_", arm).strip("_") / f"{rate:g}"
    config = study_config(arm, output, seed, rate)
    if checkpoint.steps(workdir) != [config.steps]:
        announce(f"seed {seed}, {arm}, learning rate {rate:g}")
        train_model(config, workdir)
    last = read_metrics(workdir)[-1]
    flops = sum(read_json(workdir / LEDGER_FILE, dict[str, Any])["flops"].values())
    if selection_rule(config).needs & set(REFERENCE_SIGNALS) and not config.reference.moves:
        flops += sum(read_json(output / "reference" / LEDGER_FILE, dict[str, Any])["flops"].values())
    return Result(rate, last["eval/problems/accuracy"], last["eval/clean/loss"], int(last["tokens_selected"]), flops)


def study(output: pathlib.Path, seeds: list[int], arms: list[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Train every missing run. Returns, for each arm, the results by seed and the learning-rate trials of seed 0."""
    for seed in seeds:
        prepare(output / f"seed{seed}", seed)
    results = {}
    for arm in arms:
        trials = [run_arm(arm, output / "seed0", 0, rate) for rate in RATES]
        best = max(trials, key=lambda trial: (trial.accuracy, -trial.loss))
        runs = [run_arm(arm, output / f"seed{seed}", seed, best.rate) for seed in seeds]
        results[arm] = {"trials": [trial._asdict() for trial in trials], "runs": [result._asdict() for result in runs]}
    return results


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| arm | learning rate | accuracy, mean (lowest to highest) | clean loss | tokens trained on | FLOPs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, values in results.items():
        runs = values["runs"]
        accuracy, loss = ([result[key] for result in runs] for key in ("accuracy", "loss"))
        tokens, flops = (statistics.mean(result[key] for result in runs) for key in ("trained", "flops"))
        lines.append(
            f"| {arm} | {runs[0]['rate']:g} | {statistics.mean(accuracy):.1%} ({min(accuracy):.1%} to "
            f"{max(accuracy):.1%}) | {statistics.mean(loss):.3f} | {tokens:,.0f} | {flops:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Define the flags, run `study` and print its table."""
    output = flags.DEFINE_string("output", "runs/study", "Directory for everything.")
    seeds = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seed of corpus, initial weights and data order. Repeatable.")
    arms = flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "Arm to run. Repeatable; all by default.")

    def command() -> None:
        results = study(pathlib.Path(output.value), seeds.value, arms.value)
        write_text(pathlib.Path(output.value) / "study.json", json.dumps(results, indent=2) + "\n")
        print(table(results))

    run(command)


if __name__ == "__main__":
    main()
