"""Measure the error that a backward pass through few tokens adds to the gradient, beside a batch's noise.

python -m tools.gradient_noise --run=DIR [--data=DATA] [--reference=MODEL] [--ratio=0.6] [--batches=16]

--run is a run, a checkpoint or a Hugging Face folder. Its data, reference, selection and batch size are the run's own
unless you give others. Computes the exact gradient of each batch and that of each --share and --choice of
config.backward, prints a table and a recommendation, and writes gradient_noise.json and gradient_noise.png to --output.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags

from rho1_jax.analysis.plots import plot_gradient_noise
from rho1_jax.configs.default import STAGES, BackwardChoice, BackwardConfig
from rho1_jax.data.loader import batches, to_devices
from rho1_jax.data.packing import Batch
from rho1_jax.models.decoder import Params
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, replacing, write_text
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.sharding import local_rows
from rho1_jax.training.config import as_saved
from rho1_jax.training.pretrained import Pretrained
from rho1_jax.training.reference import Reference, open_reference
from rho1_jax.training.setup import RunSetup, open_run, train_step
from rho1_jax.training.state import TrainState

CHOICES: tuple[BackwardChoice, ...] = get_args(BackwardChoice)
SAFE = 0.1  # largest error of a recommended share, relative to the noise

# An "optimizer" that changes nothing and whose state is the gradient.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
GradientOf = Callable[[TrainState, Batch], Params]


class Moments(NamedTuple):
    """Sums over batches: of vectors, and of their squared norms."""

    total: Params
    energy: jax.Array
    number: int

    @classmethod
    def zero(cls, params: Params) -> "Moments":
        """The sums over no batches, for vectors shaped like `params`."""
        return cls(jax.tree.map(jnp.zeros_like, params), jnp.float32(0), 0)

    def add(self, vector: Params) -> "Moments":
        """The sums with one more vector."""
        return Moments(_add(self.total, vector), self.energy + _energy(vector), self.number + 1)

    @property
    def mean_energy(self) -> float:
        """Mean squared norm."""
        return float(self.energy) / self.number

    @property
    def energy_of_mean(self) -> float:
        """Squared norm of the true mean, without bias. May be below 0 for few batches."""
        of_sample = float(_energy(self.total)) / self.number**2
        return (self.number * of_sample - self.mean_energy) / (self.number - 1)


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
_subtract = jax.jit(lambda a, b: jax.tree.map(jnp.subtract, a, b))
_energy = jax.jit(lambda x: optax.tree.norm(x, squared=True))


def gradient_of(setup: RunSetup, reference: Reference, backward: BackwardConfig) -> GradientOf:
    """A jitted function of a state and a batch: the gradient that the run's train step would compute."""
    config = setup.config.copy_and_resolve_references()
    config.backward.update(dataclasses.asdict(backward))
    step = train_step(dataclasses.replace(setup, config=config, optimizer=KEEP_GRADIENT), reference)
    gradient = jax.jit(lambda state, reference_params, batch: step(state, reference_params, batch)[0].opt_state)
    return lambda state, batch: gradient(state, reference.params, batch)


def measure(
    setup: RunSetup, reference: Reference, params: Params, stream: Any, first_step: int, count: int, settings: list
) -> dict[str, Any]:
    """Gradients of `count` batches: exact, and with each of `settings`.

    Args:
      setup: of the run.
      reference: of the run.
      params: of the policy.
      stream: the run's batches from `first_step` on.
      first_step: the number of the first batch's step, for schedules and random choices.
      count: number of batches, at least 2.
      settings: each a `BackwardConfig`.

    Returns:
      "noise" of a batch's exact gradient and, in "rows", for each setting its "tokens" and "choice", the "error" it
      adds and the "systematic" part of that error. All are mean squared norms, relative to that of the exact gradient.
    """
    functions = {each: gradient_of(setup, reference, each) for each in (BackwardConfig(), *settings)}
    exact, errors = Moments.zero(params), {each: Moments.zero(params) for each in settings}
    zeros = KEEP_GRADIENT.init(params)
    with Progress("gradients", count * (1 + len(settings)), unit="gradients") as progress:
        for n, batch in zip(range(count), stream):
            state = TrainState(jnp.int32(min(first_step + n, setup.config.steps - 1)), params, zeros)
            gradient = functions[BackwardConfig()](state, batch)
            exact = exact.add(gradient)
            progress.advance(1, note="exact")
            for each in settings:
                errors[each] = errors[each].add(_subtract(functions[each](state, batch), gradient))
                progress.advance(1, note=f"{each.choice}, {each.tokens:.0%}")
    energy = exact.mean_energy
    rows = [
        dataclasses.asdict(each)
        | {"error": moments.mean_energy / energy, "systematic": max(moments.energy_of_mean, 0.0) / energy}
        for each, moments in errors.items()
    ]
    return {"batches": count, "noise": 1 - exact.energy_of_mean / energy, "rows": rows}


def recommended(figures: dict[str, Any], choice: str) -> float:
    """The smallest share whose error is below a tenth of the noise; 1.0 if there is none."""
    safe = [
        row["tokens"] for row in figures["rows"] if row["choice"] == choice and row["error"] < SAFE * figures["noise"]
    ]
    return min(safe, default=1.0)


def open_config(
    path: str, data: str | None, reference: str | None, ratio: float | None, batch_size: int | None
) -> tuple[ml_collections.ConfigDict, int, bool]:
    """The config of a run that would continue from a model, its next step, and whether rows are shuffled in a batch.

    Raises:
      UserError: there is no model, or no data is known to train it on.
    """
    pretrained = Pretrained.open(path, "--run")
    config = pretrained.config.copy_and_resolve_references()
    config.init.checkpoint = str(pretrained.path)
    config.optimizer.host_offload = False
    if data:
        config.data.train = data
    if reference:
        config.reference.update(checkpoint=reference, scores="", moves="")
        if config.selection.score == STAGES["clm"]:
            config.selection.score = STAGES["slm"]
    if ratio is not None:
        config.selection.ratio = ratio
    if batch_size:
        config.batch_size = batch_size
    if not config.data.train:
        raise UserError(f"--run={path} has no data of its own; pass --data=DIR")
    if config.reference.moves:
        raise UserError(f"--run={path} has a moving reference; pass --reference=MODEL to measure with a frozen one")
    meta = pretrained.meta
    return config, meta.step if meta else 0, meta.permuted_rows if meta else True


def report(figures: dict[str, Any], choices: Sequence[str]) -> str:
    """The figures as a Markdown table, and what to set."""
    lines = [
        f"noise of a batch's gradient: {figures['noise']:.3f} of its squared norm ({figures['batches']} batches)",
        "",
        "| tokens | choice | error | systematic part | error / noise |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['tokens']:.0%} | {row['choice']} | {row['error']:.4f} | {row['systematic']:.4f} | "
            f"{row['error'] / figures['noise']:.2f} |"
            for row in figures["rows"]
        ),
        "",
    ]
    for choice in choices:
        tokens = recommended(figures, choice)
        lines.append(f"error below a tenth of the noise: config.backward.tokens={tokens:g}, choice {choice}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    path = flags.DEFINE_string("run", None, "A run, a checkpoint or a Hugging Face folder.", required=True)
    data = flags.DEFINE_string("data", None, "Prepared data sets, as in config.data.train. (default: the run's)")
    reference = flags.DEFINE_string("reference", None, "Reference model, for SLM. (default: the run's)")
    ratio = flags.DEFINE_float("ratio", None, "Share of the tokens to select. (default: the run's)", 0.0, 1.0)
    batch_size = flags.DEFINE_integer("batch_size", None, "Rows per batch. (default: the run's)", lower_bound=1)
    count = flags.DEFINE_integer("batches", 16, "Number of batches.", lower_bound=2)
    shares_flag = flags.DEFINE_list("share", ["0.2", "0.4", "0.6", "0.8"], "Values of config.backward.tokens.")
    choices = flags.DEFINE_multi_enum("choice", list(CHOICES), CHOICES, "Value of config.backward.choice. Repeatable.")
    output = flags.DEFINE_string("output", None, "Folder for the table and the plot. (default: nothing is written)")

    def command() -> None:
        shares = parse_shares(shares_flag.value)
        settings = [BackwardConfig(share, choice) for choice in CHOICES if choice in choices.value for share in shares]
        config, first_step, permute = open_config(
            path.value, data.value, reference.value, ratio.value, batch_size.value
        )
        setup, training_data = open_run(config)
        assert setup.initial is not None
        with jax.set_mesh(setup.mesh):
            frozen = open_reference(setup.config, setup.needs, setup.model, training_data.stores, setup.mesh)
            stream = batches(
                training_data.stores,
                training_data.weights,
                batch_size=config.batch_size,
                seed=config.seed,
                first_step=first_step,
                rows=local_rows(setup.mesh, config.batch_size),
                permute=permute,
                prefetch=config.data.prefetch,
                columns=frozen.columns,
            )
            on_devices = (to_devices(batch, setup.mesh, config.batch_size) for batch in stream)
            params = setup.initial.load(setup.mesh, "float32")
            figures = measure(setup, frozen, params, on_devices, first_step, count.value, settings)
        print(report(figures, choices.value))
        if output.value:
            folder = local_path(output.value, "--output")
            folder.mkdir(parents=True, exist_ok=True)
            figures |= {"run": path.value, "config": as_saved(setup.config)}
            write_text(folder / "gradient_noise.json", json.dumps(figures, indent=2) + "\n")
            with replacing(folder / "gradient_noise.png") as partial:
                plot_gradient_noise(figures["rows"], figures["noise"], partial)

    run(command)


def parse_shares(texts: Sequence[str]) -> list[float]:
    """The values of --share. Raises UserError if one is not a number above 0 and at most 1."""
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = [math.nan]
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError(f"--share={','.join(texts)}: shares are numbers above 0 and at most 1, separated by commas")
    return shares


if __name__ == "__main__":
    main()
