"""Every selection rule on the demonstration's corpus: answers right, tokens trained on, FLOPs with all that it needs.

python -m tools.study [--output=runs/study] [--seed=0 --seed=1 --seed=2] [--arm=excess ...]

Each arm is tried with each of RATES on the first seed; the other seeds take the better one. Runs that are finished are
kept, so that two commands with different seeds, after the first seed is done, can share the work.
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
from rho1_jax.runtime.files import read_json, replacing, write_text
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.score import score_data
from rho1_jax.train import train_model
from rho1_jax.training import checkpoint
from rho1_jax.training.accounting import LEDGER_FILE
from rho1_jax.training.config import selection_rule
from tools.demo import SCORES, arm_config, make_data, say

RATES = (7e-4, 1.5e-3)
PROBLEM = re.compile(r"Q: [^\n]*\nS: [^\n]*\nA: [^\n]*\n")

# What each arm changes in the demonstration's SLM.
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
    """A finished run."""

    rate: float
    accuracy: float
    loss: float  # nats a token, on clean text
    trained: int  # tokens
    flops: float  # with those of the reference's training and scoring


def problem_mask(store: Store, tokenizer: Tokenizer) -> np.ndarray:
    """Which targets lie in a whole problem of their row, right or wrong: bool [rows, seq_len]."""
    rows = store.rows(SPLIT)
    mask = np.zeros((len(rows), store.seq_len), bool)
    for number in range(len(rows)):
        pieces = tokenizer.pieces(rows[number]["tokens"].tolist())
        ends = np.cumsum([len(piece) for piece in pieces])
        for match in PROBLEM.finditer("".join(pieces)):
            mask[number] |= ((ends > match.start()) & (ends <= match.end()))[1:]
    return mask


def prepare(output: pathlib.Path, seed: int) -> None:
    """Data, reference, its scores and the mask of problems, for one seed; what is there is kept."""
    make_data(output, seed)
    reference = arm_config("reference", output, seed)
    reference.eval.every = reference.checkpoint.every = reference.steps
    train_model(reference, output / "reference")
    config = arm_config("slm", output, seed)
    config.reference.scores = SCORES
    score_data(config, "float16", entropies=True)
    if not (output / "problems.npy").exists():
        say("finding the problems")
        tokenizer = Tokenizer(output / "data" / "tokenizer.model")
        with replacing(output / "problems.npy") as beside, beside.open("wb") as file:
            np.save(file, problem_mask(Store(output / "data" / "noisy"), tokenizer))


def study_config(arm: str, output: pathlib.Path, seed: int, rate: float) -> ml_collections.ConfigDict:
    """The config of a run. The reference's part comes from its scores."""
    config = arm_config("slm", output, seed)
    config.eval.every = config.checkpoint.every = config.steps
    config.optimizer.learning_rate = rate
    config.update(ARMS[arm])
    config.data.external = str(output / "problems.npy")
    config.reference.checkpoint = ""
    config.reference.scores = "" if config.reference.moves else SCORES
    return config


def one(arm: str, output: pathlib.Path, seed: int, rate: float) -> Result:
    """A run, or what it told if it is finished."""
    workdir = output / re.sub(r"\W+", "_", arm).strip("_") / f"{rate:g}"
    config = study_config(arm, output, seed, rate)
    if checkpoint.steps(workdir) != [config.steps]:
        say(f"seed {seed}, {arm}, learning rate {rate:g}")
        train_model(config, workdir)
    last = read_metrics(workdir)[-1]
    flops = sum(read_json(workdir / LEDGER_FILE)["flops"].values())
    if selection_rule(config).needs & set(REFERENCE_SIGNALS) and not config.reference.moves:
        flops += sum(read_json(output / "reference" / LEDGER_FILE)["flops"].values())
    return Result(rate, last["eval/problems/accuracy"], last["eval/clean/loss"], int(last["tokens_selected"]), flops)


def study(output: pathlib.Path, seeds: list[int], arms: list[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs what is missing and returns each arm's results, seed after seed, and the trials of the first one."""
    for seed in seeds:
        prepare(output / f"seed{seed}", seed)
    found = {}
    for arm in arms:
        trials = [one(arm, output / "seed0", 0, rate) for rate in RATES]
        best = max(trials, key=lambda trial: (trial.accuracy, -trial.loss))
        runs = [one(arm, output / f"seed{seed}", seed, best.rate) for seed in seeds]
        found[arm] = {"trials": [trial._asdict() for trial in trials], "runs": [result._asdict() for result in runs]}
    return found


def table(found: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| arm | learning rate | answers right, mean (lowest to highest) | clean loss | tokens trained on | FLOPs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, values in found.items():
        runs = values["runs"]
        accuracy, loss = ([result[key] for result in runs] for key in ("accuracy", "loss"))
        tokens, flops = (statistics.mean(result[key] for result in runs) for key in ("trained", "flops"))
        lines.append(
            f"| {arm} | {runs[0]['rate']:g} | {statistics.mean(accuracy):.1%} ({min(accuracy):.1%} to "
            f"{max(accuracy):.1%}) | {statistics.mean(loss):.3f} | {tokens:,.0f} | {flops:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command: its flags, then `study`."""
    output = flags.DEFINE_string("output", "runs/study", "Directory for everything.")
    seeds = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Of corpus, weights and order; more than one may be given.")
    arms = flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "Which to run; more than one may be given.")

    def command() -> None:
        found = study(pathlib.Path(output.value), seeds.value, arms.value)
        write_text(pathlib.Path(output.value) / "study.json", json.dumps(found, indent=2) + "\n")
        print(table(found))

    run(command)


if __name__ == "__main__":
    main()
