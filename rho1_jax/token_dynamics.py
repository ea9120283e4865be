"""Which tokens a run learns, which it knew, and which it never learns: the four classes of the paper's section 2.1.

python -m tools.token_dynamics --run=DIR --data=DIR [--rows=256] [--reference=DIR] [--output=DIR]

Losses of the data set's split "eval" at every checkpoint of the run; config.checkpoint.keep=0 keeps all of them.
Writes dynamics.json, dynamics.png and dynamics.html into --output, RUN/dynamics if none is given.
"""

import base64
import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from rho1_jax.analysis.dynamics import CHANGE, CLASSES, Dynamics, class_means, classify, shares
from rho1_jax.analysis.plots import plot_dynamics
from rho1_jax.analysis.token_report import CSS, Mark, rows_html
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
from rho1_jax.runtime.files import replacing, write_text
from rho1_jax.runtime.progress import Progress
from rho1_jax.training import checkpoint
from rho1_jax.training.pretrained import open_pretrained

SHOWN_ROWS = 8
BATCH_ROWS = 32
COLOURS = {"H->H": "#e8927c", "L->H": "#e3b23c", "H->L": "#6fb97a", "L->L": "#7fa9d9"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Token dynamics of {run}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; text-align: left; }}
th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }}
{css}
</style></head><body>
<h1>Token dynamics of {run}</h1>
<p>Losses of {tokens:,} held-out tokens at {checkpoints} checkpoints. A line is fitted to each token's losses. Where it
falls or rises by more than {change} nats, the token's class is H&rarr;L or L&rarr;H; elsewhere it is L&rarr;L where the
last loss is at most the mean of all, and H&rarr;H where it is not.</p>
<img alt="loss of each class over training" src="data:image/png;base64,{png}">
<table><tr><th>class</th><th>share</th></tr>
{shares}
</table>
<h2>Tokens by class</h2>
<p>Grey ones are context: the first token of a row or document is no target. Hovering tells first and last loss.</p>
{rows}
</body></html>
"""


def all_losses(losses: Any, params: Params, batches: list[Any], rows: int) -> np.ndarray:
    """Losses [rows, L] of a model."""
    return np.concatenate([np.asarray(losses(params, batch)[0]) for batch in batches])[:rows]


def measure(workdir: pathlib.Path, data: str, rows: int, reference: str) -> dict[str, Any]:
    """Losses of the rows at each checkpoint, and of the reference, if there is one.

    Raises:
      UserError: the run has fewer than two checkpoints, or the data are of another tokenizer.
    """
    steps = checkpoint.steps(workdir)
    if len(steps) < 2:
        raise UserError(
            f"--run={workdir}: {len(steps)} checkpoints, two or more are needed; keep all of them with "
            "config.checkpoint.keep=0"
        )
    meta = checkpoint.load_meta(checkpoint.at(workdir, steps[-1]))
    config, store = ml_collections.ConfigDict(meta.config), Store(data)
    if store.tokenizer_fingerprint != meta.tokenizer:
        raise UserError(f"--data={data} was prepared with another tokenizer than the run's data")
    model_config = ModelConfig(**config.model)
    mesh = sharding.mesh_of_run(**config.mesh)
    held_out = store.rows("eval")
    which, size = range(min(rows, len(held_out))), BATCH_ROWS * mesh.size

    def jitted(of: ModelConfig) -> Any:
        token_losses = make_token_losses(decoder.build(of), config.data.document_mask)
        return jax.jit(token_losses, out_shardings=sharding.replicated(mesh))

    with jax.set_mesh(mesh):
        read = list(eval_batches(held_out, size, sharding.local_rows(mesh, size), which))
        batches = [to_devices(batch, mesh, size) for batch in read]
        losses, found = jitted(model_config), []
        with Progress("checkpoints", len(steps), unit="checkpoints") as progress:
            for step in steps:
                params = checkpoint.load_params(checkpoint.at(workdir, step), model_config, mesh, "float32")
                found.append(all_losses(losses, params, batches, len(which)))
                progress.advance(1)
        reference_loss = None
        if reference:
            opened = open_pretrained(reference, "--reference", config, store)
            params = opened.load(mesh, config.model.compute_dtype)
            reference_loss = all_losses(jitted(opened.model), params, batches, len(which))
    tokens, segment_ids = (np.concatenate(part)[: len(which)] for part in zip(*(batch[:2] for batch in read)))
    return {
        "steps": steps,
        "loss_nBL": np.stack(found),
        "reference_loss_BL": reference_loss,
        "eligible_BL": np.asarray(selection.eligible_targets(segment_ids)),
        "tokens_BM": tokens,
        "ratio": config.selection.ratio,
    }


def summary(measured: dict[str, Any], dynamics: Dynamics) -> dict[str, Any]:
    """What dynamics.json holds: shares, and mean losses over training of each class and of selected tokens.

    Selected are the tokens that excess loss keeps at the first checkpoint, at the run's ratio.
    """
    loss_nBL, eligible_BL = measured["loss_nBL"], measured["eligible_BL"]
    found = {
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
            found[name] = loss_nBL[:, mask_BL].mean(axis=1, dtype=np.float64).tolist()
    return found


def write_report(
    output: pathlib.Path,
    name: str,
    measured: dict[str, Any],
    dynamics: Dynamics,
    found: dict[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Writes dynamics.json, dynamics.png and dynamics.html."""
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "dynamics.png") as beside:
        plot_dynamics(found, COLOURS, beside)
    class_BL = np.full(measured["eligible_BL"].shape, -1)
    class_BL[measured["eligible_BL"]] = dynamics.class_T

    def mark(row: int, at: int) -> Mark:
        kind = CLASSES[class_BL[row, at]]
        first, last = measured["loss_nBL"][[0, -1], row, at]
        return Mark(COLOURS[kind], f"{kind}, from {first:.2f} to {last:.2f}", False)

    page = PAGE.format(
        run=name,
        css=CSS,
        tokens=found["tokens"],
        checkpoints=len(found["steps"]),
        change=CHANGE,
        png=base64.b64encode((output / "dynamics.png").read_bytes()).decode(),
        shares="\n".join(
            f'<tr><td style="background:{COLOURS[kind]}">{kind}</td><td>{share:.1%}</td></tr>'
            for kind, share in found["shares"].items()
        ),
        rows=rows_html(
            measured["tokens_BM"],
            measured["eligible_BL"],
            tokenizer,
            range(min(SHOWN_ROWS, len(class_BL))),
            mark,
        ),
    )
    write_text(output / "dynamics.html", page)
    write_text(output / "dynamics.json", json.dumps(found, indent=2) + "\n")


def main() -> None:
    """The command: its flags, then `measure` and `write_report`."""
    workdir = flags.DEFINE_string("run", None, "A run's directory.", required=True)
    data = flags.DEFINE_string("data", None, "A prepared data set with a split 'eval'.", required=True)
    rows = flags.DEFINE_integer("rows", 256, "Rows, at most.", lower_bound=1)
    reference = flags.DEFINE_string("reference", "", "The reference, for losses on selected and unselected tokens.")
    output = flags.DEFINE_string("output", None, "Directory; RUN/dynamics if not given.")

    def command() -> None:
        path = pathlib.Path(workdir.value)
        measured = measure(path, data.value, rows.value, reference.value)
        dynamics = classify(measured["loss_nBL"][:, measured["eligible_BL"]])
        found = summary(measured, dynamics)
        directory = pathlib.Path(output.value) if output.value else path / "dynamics"
        write_report(directory, path.name, measured, dynamics, found, Store(data.value).tokenizer())
        print(", ".join(f"{kind} {share:.1%}" for kind, share in found["shares"].items()))
        print(f"see {directory}/dynamics.html")

    run(command)


if __name__ == "__main__":
    main()
