"""Kills and stops commands at random moments, and compares what they leave with an undisturbed run.

python -m tools.faults [--output=runs/faults] [--seed=0] [--kills=20] [--stops=6] [--scenario=train ...]

In each round, a command gets SIGKILL, SIGTERM or SIGINT up to three times, and then runs to its end undisturbed. What
is on disk must be bit-identical: parameters, optimizer state, metrics, scores, rows, items. After SIGTERM and SIGINT,
no step may be repeated. Prints a table of where each signal struck. The exit status is 1 if anything differed.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from rho1_jax.data.store import Store
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.training import checkpoint

DOCUMENTS, STEPS, STRIKES_PER_ROUND = 400, 40, 3
RATES = {"tokens_per_second"}  # of metrics: measured, so they differ
STEP = re.compile(r"(stopped after|resumed from) step (\d+)")
MODEL = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ff_width": 48}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command to strike.

    Attributes:
      module: of the command.
      flags: its flags, given the directory of the round.
      result: what it leaves in that directory: name -> something comparable.
      processes: how many run it together.
    """

    module: str
    flags: Callable[[pathlib.Path], list[str]]
    result: Callable[[pathlib.Path], dict[str, object]]
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal that struck: in which scenario, when, and what was going on."""

    scenario: str
    signal: str
    seconds: float
    where: str


def make_inputs(folder: pathlib.Path) -> None:
    """A corpus, a tokenizer, prepared rows, questions, and a reference."""
    rng = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "questions.jsonl").open("w") as questions:
        for number in range(DOCUMENTS):
            a, b = rng.integers(0, 50, 2).tolist()
            text = f"Document {number}: {a}+{b}={a + b}.\n" + "and so on, " * int(rng.integers(1, 6))
            corpus.write(json.dumps({"text": text}) + "\n")
            if number < 24:
                questions.write(json.dumps({"question": f"{a}+{b}=", "answer": f"#### {a + b}"}) + "\n")
    name = f"{folder}/tokenizer.model"
    execute("rho1_jax.train_tokenizer", [f"--input={folder}/corpus.jsonl", f"--output={name}", "--vocab_size=300"])
    execute("rho1_jax.prepare", prepare_flags(folder, folder / "data"))
    reference = [*training_flags(folder, "reference", folder / "data"), "--config.steps=20"]
    execute("rho1_jax.train", [*reference, f"--workdir={folder}/reference"])


def prepare_flags(inputs: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Flags of `rho1 prepare`."""
    return [
        f"--input={inputs}/corpus.jsonl",
        f"--tokenizer={inputs}/tokenizer.model",
        f"--output={output}",
        "--seq_len=32",
        "--eval_fraction=0.1",
        "--workers=2",
    ]


def training_flags(inputs: pathlib.Path, stage: str, data: pathlib.Path, **changes: object) -> list[str]:
    """Flags of `rho1 train` and `rho1 score`."""
    values = {
        "steps": STEPS,
        "batch_size": 8,
        "log_every": 3,
        "data.train": data,
        "reference.checkpoint": "" if stage == "reference" else inputs / "reference",
        "eval.every": 7,
        "eval.data": f"held_out={inputs / 'data'}",
        "eval.questions": f"sums={inputs / 'questions.jsonl'}",
        "eval.prompt_template": "{question}",
        "eval.answer_pattern": r"(\d+)",
        "eval.max_new_tokens": 8,
        "eval.generate_batch": 8,
        "checkpoint.every": 5,
        "checkpoint.grace_seconds": 55,  # two processes that still compile may need it on a busy machine
        **{f"model.{name}": size for name, size in MODEL.items()},
        **changes,
    }
    return [f"--config=default:{stage}", *(f"--config.{key}={value}" for key, value in values.items())]


def scenarios(inputs: pathlib.Path) -> dict[str, Scenario]:
    """All scenarios. `train` saves and evaluates every few steps, so that signals strike those as well."""

    def train(folder: pathlib.Path) -> list[str]:
        return [*training_flags(inputs, "slm", inputs / "data"), f"--workdir={folder}/run"]

    def score(folder: pathlib.Path) -> list[str]:
        if not (folder / "data").exists():
            shutil.copytree(inputs / "data", folder / "data")
        return [*training_flags(inputs, "slm", folder / "data"), "--config.reference.scores=losses", "--entropies"]

    def evaluate(folder: pathlib.Path) -> list[str]:
        return [f"--checkpoint={inputs}/reference", f"--data=rows={inputs}/data", f"--output={folder}/evaluation"]

    return {
        "train": Scenario("rho1_jax.train", train, trained),
        "two processes": Scenario("rho1_jax.train", train, trained, processes=2),
        "score": Scenario("rho1_jax.score", score, lambda folder: hashes(folder / "data/scores")),
        "prepare": Scenario("rho1_jax.prepare", lambda folder: prepare_flags(inputs, folder / "data"), prepared),
        "evaluate": Scenario("rho1_jax.evaluate", evaluate, lambda folder: hashes(folder / "evaluation")),
    }


def trained(folder: pathlib.Path) -> dict[str, object]:
    """Metrics, and every array of the last checkpoint."""
    workdir = folder / "run"
    lines = [{name: value for name, value in line.items() if name not in RATES} for line in read_metrics(workdir)]
    arrays = {}
    for item in ("params", "opt_state"):
        saved, checkpointer = checkpoint.find(workdir, "run") / item, ocp.PyTreeCheckpointer()
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(saved).item_metadata.tree
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(checkpointer.restore(saved, restore_args=as_numpy))[0]:
            arrays[item + jax.tree_util.keystr(path)] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    return {"metrics": lines, **arrays}


def prepared(folder: pathlib.Path) -> dict[str, object]:
    """Rows, counts and tokenizer. The bytes of shards may differ, since the fields of a row have no fixed order."""
    store = Store(folder / "data")
    result: dict[str, object] = {"fingerprint": store.fingerprint, "splits": store.manifest["splits"]}
    for split in ("train", "eval"):
        for number, row in enumerate(store.rows(split)):
            result[f"row {number} of {split}"] = {name: values.tolist() for name, values in row.items()}
    return result | hashes(folder / "data/tokenizer")


def hashes(folder: pathlib.Path) -> dict[str, object]:
    """A hash of each file under a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(module: str, arguments: list[str], log: pathlib.Path, processes: int = 1) -> list[subprocess.Popen]:
    """Starts a command, in one process or in several that run it together. Appends to the log."""
    address = ""
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]},{processes}"
    with log.open("a") as output:
        return [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *([f"--distributed={address},{index}"] if address else [])],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            for index in range(processes)
        ]


def execute(module: str, arguments: list[str]) -> None:
    """Runs a command to its end. Raises UserError if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{module}: {done.stderr[-500:]}")


def finish(scenario: Scenario, folder: pathlib.Path) -> float:
    """Runs a scenario to its end. Returns its seconds. Raises UserError if it fails."""
    log, begin = folder / "log.txt", time.monotonic()
    processes = start(scenario.module, scenario.flags(folder), log, scenario.processes)
    if any(process.wait() for process in processes):
        raise UserError(f"{log}: {log.read_text()[-500:]}")
    return time.monotonic() - begin


def strike(scenario: Scenario, folder: pathlib.Path, number: signal.Signals, after: float) -> str | None:
    """Starts a scenario and sends each of its processes a signal.

    Args:
      scenario: what to strike.
      folder: its directory.
      number: the signal.
      after: when to strike, in seconds.

    Returns:
      What was going on; None if it had ended before.

    Raises:
      UserError: it did not end within a minute or not with the right status.
    """
    log = folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    processes = start(scenario.module, scenario.flags(folder), log, scenario.processes)
    time.sleep(after)
    if any(process.poll() is not None for process in processes):
        if any(process.wait() for process in processes):
            raise UserError(f"{log}: {log.read_text()[-500:]}")
        return None
    where = describe(folder)
    for process in processes:
        process.send_signal(number)
    try:
        statuses = [process.wait(60) for process in processes]
    except subprocess.TimeoutExpired:
        raise UserError(f"{log}: did not end within a minute of {number.name}") from None
    output = log.read_bytes()[before:].decode()
    if number == signal.SIGKILL or f"{number.name}: " not in output:
        allowed = {0, -number}  # while Python is still importing a command, a signal ends it like any other program
    else:
        # Of two processes, the one that has joined the other already ends because that one is gone.
        early = {128 + number} | ({1} if scenario.processes > 1 else set())
        allowed = early if "with nothing to save" in output else {0}
    if set(statuses) - allowed:
        raise UserError(f"{log}: ended with {statuses} after {number.name}: {log.read_text()[-500:]}")
    return where


def describe(folder: pathlib.Path) -> str:
    """Describes what a running command has on disk."""
    parts = []
    if (folder / "run/metrics.jsonl").exists():
        lines = read_metrics(folder / "run")
        parts.append(f"step {lines[-1]['step']:.0f}" if lines else "before a metric")
    writing = [path.name for path in folder.rglob("*") if "orbax-checkpoint-tmp" in path.name or ".tmp" in path.suffix]
    partial = [f"{path.name} with {len(list(path.iterdir()))} files" for path in folder.rglob("*.partial")]
    items = [f"{len(path.read_text().splitlines())} items" for path in folder.glob("evaluation/*.jsonl")]
    return ", ".join([*parts, *(f"writing {name}" for name in writing[:1]), *partial, *items]) or "starting"


def repeated_steps(log: str) -> list[str]:
    """The stops after which a run did not resume at the step where it stopped."""
    events = STEP.findall(log)
    pairs = itertools.pairwise(events)
    return [f"{a[1]} -> {b[1]}" for a, b in pairs if a[0] == "stopped after" and b != ("resumed from", a[1])]


def main() -> None:
    """The command."""
    output = flags.DEFINE_string("output", "runs/faults", "Directory for the runs; it is removed first.")
    seed = flags.DEFINE_integer("seed", 0, "Seed for the moments of the signals.")
    kills = flags.DEFINE_integer("kills", 20, "Number of SIGKILLs.")
    stops = flags.DEFINE_integer("stops", 6, "Number of SIGTERMs and SIGINTs.")
    wanted = flags.DEFINE_multi_string("scenario", [], "Scenarios to run. Default: all.")

    def command() -> None:
        folder = local_path(output.value, "--output").absolute()
        inputs = new_folder(new_folder(folder) / "inputs")
        make_inputs(inputs)
        chosen = {name: s for name, s in scenarios(inputs).items() if name in (wanted.value or [name])}
        rounds = Rounds(folder, chosen, seed.value)
        rounds.run(kills.value, stops.value)
        report(rounds.strikes, rounds.failures)
        if rounds.failures:
            sys.exit(1)

    run(command)


class Rounds:
    """Strikes scenarios in turn, and compares what they leave.

    Attributes:
      strikes: the signals that struck.
      failures: what differed.
    """

    def __init__(self, folder: pathlib.Path, chosen: dict[str, Scenario], seed: int):
        """Runs each scenario undisturbed: once to compile, and once more to be timed."""
        self.strikes: list[Strike] = []
        self.failures: list[str] = []
        self._folder, self._chosen, self._rng = folder, chosen, np.random.default_rng(seed)
        self._expected, self._seconds = {}, {}
        for name, scenario in chosen.items():
            for _ in range(2):
                place = new_folder(folder / name)
                self._seconds[name] = finish(scenario, place)
            self._expected[name] = scenario.result(place)

    def run(self, kills: int, stops: int) -> None:
        """Strikes until all signals are used up."""
        half = stops // 2
        signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * (stops - half) + [signal.SIGINT] * half
        left = [signals[i] for i in self._rng.permutation(len(signals))]
        names = itertools.cycle(self._chosen)
        for number in itertools.count():
            if not left:
                return
            name = next(names)
            place = new_folder(self._folder / f"{name} {number}")
            try:
                failures = self._round(name, place, left)
            except UserError as error:
                failures = [str(error)]
            self.failures += [f"{place}: {failure}" for failure in failures]
            if not failures:
                shutil.rmtree(place)

    def _round(self, name: str, place: pathlib.Path, left: list[signal.Signals]) -> list[str]:
        """Strikes one scenario a few times and finishes it. Returns what differs."""
        scenario, expected = self._chosen[name], self._expected[name]
        for _ in range(min(STRIKES_PER_ROUND, len(left))):
            after = float(self._rng.uniform(0, self._seconds[name]))
            where = strike(scenario, place, left[-1], after)
            if where is None:
                break
            self.strikes.append(Strike(name, left.pop().name, after, where))
            print(f"{len(self.strikes):4d}  {name:14} {self.strikes[-1].signal:8} {after:5.1f} s  {where}", flush=True)
        finish(scenario, place)
        result = scenario.result(place)
        differing = [key for key in expected.keys() | result.keys() if expected.get(key) != result.get(key)]
        repeated = repeated_steps((place / "log.txt").read_text())
        return [f"{key} differs" for key in sorted(differing)] + [f"repeated {steps}" for steps in repeated]


def new_folder(folder: pathlib.Path) -> pathlib.Path:
    """Creates an empty folder, and removes one that exists."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def report(strikes: list[Strike], failures: list[str]) -> None:
    """Prints a table of the strikes, and what differed."""
    names = sorted({strike.signal for strike in strikes})
    counts = collections.Counter((strike.scenario, strike.signal) for strike in strikes)
    print("\n| struck | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for scenario in dict.fromkeys(strike.scenario for strike in strikes):
        print(f"| {scenario} | " + " | ".join(str(counts[scenario, name]) for name in names) + " |")
    print(f"{len(strikes)} signals, {len(failures)} differences")
    for failure in failures:
        print(failure)


if __name__ == "__main__":
    main()
