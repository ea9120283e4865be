"""Which tokens a run learns, already knew, or never learns: the four classes of the paper's section 2.1.

rho1 dynamics --run=DIR --data=DIR [--rows=256] [--reference=DIR] [--output=DIR]

Measures the losses of the data set's split "eval" at every checkpoint of the run; train with config.checkpoint.keep=0
to keep them all. Writes dynamics.json, dynamics.png and dynamics.html to --output, by default RUN/dynamics.
"""

import base64
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from rho1_jax.analysis.dynamics import CHANGE, CLASSES, Dynamics, class_means, classify, shares
from rho1_jax.analysis.plots import plot_dynamics
from rho1_jax.analysis.token_report import Mark, page, rows_html
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.loader import eval_batches, to_devices
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method import selection
from rho1_jax.models import decoder
from rho1_jax.models.decoder import Params
from rho1_jax.models.forward import make_token_losses
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, replacing, write_text
from rho1_jax.runtime.progress import Progress
from rho1_jax.training import checkpoint
from rho1_jax.training.pretrained import Pretrained, open_pretrained

SHOWN_ROWS = 8
BATCH_ROWS = 32
COLOURS = {"H->H": "#e8927c", "L->H": "#e3b23c", "H->L": "#6fb97a", "L->L": "#7fa9d9"}

BODY = """<p>Losses of {tokens:,} held-out tokens at {checkpoints} checkpoints. A line is fitted to each token's losses.
If it falls or rises by more than {change} nats, the token's class is H&rarr;L or L&rarr;H. Otherwise the class is
L&rarr;L if the last loss is at most the mean of all last losses, and H&rarr;H if it is above.</p>
<img alt="loss of each class over training" src="data:image/png;base64,{png}">
<table><tr><th>class</th><th>share</th></tr>
{shares}
</table>
<h2>Tokens by class</h2>
<p>Grey tokens are context: the first token of a row or document is not a target. Hover over a token to see its first
and last loss.</p>
{rows}"""


def all_losses(losses: Any, params: Params, batches: list[Any], rows: int) -> np.ndarray:
    """Token losses [rows, L] of a model, in nats."""
    return np.concatenate([np.asarray(losses(params, batch)[0]) for batch in batches])[:rows]


def measure(workdir: pathlib.Path, data: pathlib.Path, rows: int, reference: str) -> dict[str, Any]:
    """Measures the token losses of the first `rows` held-out rows at each checkpoint of a run.

    Args:
      workdir: the run's directory.
      data: a data set with a split "eval".
      rows: number of rows, at most.
      reference: a run, checkpoint or Hugging Face folder to measure as well; empty: none.

    Returns:
      steps: the step of each of the n checkpoints.
      loss_nBL, reference_loss_BL: losses in nats; the latter is None without a reference.
      eligible_BL: bool, the tokens that count.
      tokens_BM: the rows' token ids, M = L + 1.
      ratio: the run's selection ratio.

    Raises:
      UserError: the run has fewer than two checkpoints, or the data set has another tokenizer.
    """
    steps = checkpoint.steps(workdir)
    if len(steps) < 2:
        raise UserError(
            f"--run={workdir}: {len(steps)} checkpoints, but at least two are needed; train with "
            "config.checkpoint.keep=0 to keep them all"
        )
    trained, store = Pretrained.open(workdir, "--run"), Store(data)
    config, model_config = trained.config, trained.model
    if not store.has_tokenizer(trained.tokenizer_path, trained.tokenizer_fingerprint):
        raise UserError(f"--data={data} was prepared with a different tokenizer than the run's data")
    mesh = sharding.mesh_of_run(**config.mesh)
    held_out = store.rows("eval")
    row_numbers, size = range(min(rows, len(held_out))), BATCH_ROWS * mesh.size

    def jitted(model: ModelConfig) -> Any:
        token_losses = make_token_losses(decoder.build(model), config.data.document_mask)
        return jax.jit(token_losses, out_shardings=sharding.replicated(mesh))

    with jax.set_mesh(mesh):
        local_batches = list(eval_batches(held_out, size, sharding.local_rows(mesh, size), row_numbers))
        batches = [to_devices(batch, mesh, size) for batch in local_batches]
        losses, loss_of_step = jitted(model_config), []
        with Progress("checkpoints", len(steps), unit="checkpoints") as progress:
            for step in steps:
                params = checkpoint.load_params(checkpoint.at(workdir, step), model_config, mesh, "float32")
                loss_of_step.append(all_losses(losses, params, batches, len(row_numbers)))
                progress.advance(1)
        reference_loss = None
        if reference:
            pretrained = open_pretrained(reference, "--reference", config, store)
            params = pretrained.load(mesh, config.model.compute_dtype)
            reference_loss = all_losses(jitted(pretrained.model), params, batches, len(row_numbers))
    tokens, segment_ids = (
        np.concatenate(part)[: len(row_numbers)] for part in zip(*(batch[:2] for batch in local_batches))
    )
    return {
        "steps": steps,
        "loss_nBL": np.stack(loss_of_step),
        "reference_loss_BL": reference_loss,
        "eligible_BL": np.asarray(selection.eligible_targets(segment_ids)),
        "tokens_BM": tokens,
        "ratio": config.selection.ratio,
    }


def summary(measured: dict[str, Any], dynamics: Dynamics) -> dict[str, Any]:
    """The content of dynamics.json: the share of each class, and mean losses in nats at each checkpoint.

    With a reference, the mean losses of selected and unselected tokens are included. Selected tokens are those that
    excess loss keeps at the first checkpoint, at the run's ratio.
    """
    loss_nBL, eligible_BL = measured["loss_nBL"], measured["eligible_BL"]
    figures = {
        "steps": measured["steps"],
        "tokens": int(eligible_BL.sum()),
        "shares": shares(dynamics.class_T),
        "class_loss": class_means(loss_nBL[:, eligible_BL], dynamics.class_T),
    }
    if measured["reference_loss_BL"] is not None:
        excess_BL = loss_nBL[0] - measured["reference_loss_BL"]
        units = selection.ratio_units(measured["ratio"])
        selected_BL = np.asarray(selection.select(excess_BL, eligible_BL, units, "global"))
        for name, mask_BL in (("selected_loss", selected_BL), ("unselected_loss", eligible_BL & ~selected_BL)):
            figures[name] = loss_nBL[:, mask_BL].mean(axis=1, dtype=np.float64).tolist()
    return figures


def write_report(
    output: pathlib.Path,
    name: str,
    measured: dict[str, Any],
    dynamics: Dynamics,
    figures: dict[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Writes dynamics.json, dynamics.png and dynamics.html."""
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "dynamics.png") as temporary:
        plot_dynamics(figures, COLOURS, temporary)
    class_BL = np.full(measured["eligible_BL"].shape, -1)
    class_BL[measured["eligible_BL"]] = dynamics.class_T

    def mark(row: int, at: int) -> Mark:
        kind = CLASSES[class_BL[row, at]]
        first, last = measured["loss_nBL"][[0, -1], row, at]
        return Mark(COLOURS[kind], f"{kind}, from {first:.2f} to {last:.2f}", False)

    body = BODY.format(
        tokens=figures["tokens"],
        checkpoints=len(figures["steps"]),
        change=CHANGE,
        png=base64.b64encode((output / "dynamics.png").read_bytes()).decode(),
        shares="\n".join(
            f'<tr><td style="background:{COLOURS[kind]}">{kind}</td><td>{share:.1%}</td></tr>'
            for kind, share in figures["shares"].items()
        ),
        rows=rows_html(
            measured["tokens_BM"],
            measured["eligible_BL"],
            tokenizer,
            range(min(SHOWN_ROWS, len(class_BL))),
            mark,
        ),
    )
    write_text(output / "dynamics.html", page(f"Token dynamics of {name}", body))
    write_text(output / "dynamics.json", json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """The command: parses the flags, and calls `measure` and `write_report`."""
    workdir = flags.DEFINE_string("run", None, "Run directory.", required=True)
    data = flags.DEFINE_string("data", None, "Prepared data set with a split 'eval'.", required=True)
    rows = flags.DEFINE_integer("rows", 256, "Rows to measure, at most.", lower_bound=1)
    reference = flags.DEFINE_string(
        "reference",
        "",
        "Reference (run, checkpoint or Hugging Face folder), for the losses of selected and unselected tokens.",
    )
    output = flags.DEFINE_string("output", None, "Folder to write. By default, RUN/dynamics.")

    def command() -> None:
        path, data_path = local_path(workdir.value, "--run"), local_path(data.value, "--data")
        directory = local_path(output.value or path / "dynamics", "--output")
        local_path(reference.value, "--reference")
        measured = measure(path, data_path, rows.value, reference.value)
        dynamics = classify(measured["loss_nBL"][:, measured["eligible_BL"]])
        figures = summary(measured, dynamics)
        write_report(directory, path.name, measured, dynamics, figures, Store(data_path).tokenizer())
        print(", ".join(f"{kind} {share:.1%}" for kind, share in figures["shares"].items()))
        print(f"see {directory}/dynamics.html")

    run(command)


if __name__ == "__main__":
    main()
