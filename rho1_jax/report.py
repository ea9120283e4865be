"""Shows which tokens SLM selects: held-out rows as HTML, each token coloured by its excess loss.

rho1 report --policy=DIR --reference=DIR --data=DIR --output=FILE.html [--rows=16] [--ratio=0.6]
"""

import html
import pathlib

import jax
import numpy as np
from absl import flags

from rho1_jax.analysis.token_report import LEGEND, TokenScores, page, score_tokens, selection_html
from rho1_jax.data.loader import eval_batches
from rho1_jax.data.store import Store
from rho1_jax.models import decoder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.files import local_path, write_text
from rho1_jax.training.pretrained import Pretrained, open_pretrained


def compare(
    policy: str | pathlib.Path, reference: str | pathlib.Path, store: Store, rows: int, ratio: float | None
) -> tuple[TokenScores, float]:
    """Scores the first held-out rows of a data set with two models.

    Args:
      policy: a run directory, one of its checkpoints, or a Hugging Face folder.
      reference: the same.
      store: a data set with a split "eval", prepared with the tokenizer of both.
      rows: number of rows, at most. Padding rows fill them up to a multiple of the mesh's data-parallel size.
      ratio: share of the tokens to select; None: that of the policy's run, or the default for a folder.

    Returns:
      Both models' token losses with the tokens selected, and the ratio.

    Raises:
      UserError: a model is missing, or its tokenizer is not that of the data.
    """
    config = Pretrained.open(policy, "--policy").config
    ratio = config.selection.ratio if ratio is None else ratio
    models, mesh = [], sharding.mesh_of_run(**config.mesh)
    with jax.set_mesh(mesh):
        for key, path in (("--policy", policy), ("--reference", reference)):
            pretrained = open_pretrained(str(path), key, config, store)
            models.append((decoder.build(pretrained.model), pretrained.load(mesh, "float32")))
        held_out, size = store.rows("eval"), sharding.even_rows(rows)
        batch = next(eval_batches(held_out, size, np.arange(size), range(min(rows, len(held_out)))))
        return score_tokens(models[0], models[1], batch, ratio, config.data.document_mask), ratio


def main() -> None:
    """The command: parses the flags, calls `compare` and writes the page."""
    policy = flags.DEFINE_string(
        "policy", None, "The model in training: run, checkpoint or Hugging Face folder.", required=True
    )
    reference = flags.DEFINE_string(
        "reference", None, "The reference: run, checkpoint or Hugging Face folder.", required=True
    )
    data = flags.DEFINE_string("data", None, "Prepared data set with a split 'eval'.", required=True)
    rows = flags.DEFINE_integer("rows", 16, "Rows to score and show, at most.", lower_bound=1)
    ratio = flags.DEFINE_float(
        "ratio", None, "Share of the tokens to select. By default, that of the policy's config.", 0.0001, 1.0
    )
    output = flags.DEFINE_string("output", None, "HTML file to write.", required=True)

    def command() -> None:
        path, store = local_path(output.value, "--output"), Store(local_path(data.value, "--data"))
        scores, share = compare(policy.value, reference.value, store, rows.value, ratio.value)
        models = f"Policy: {html.escape(policy.value)}. Reference: {html.escape(reference.value)}."
        legend = f"<p>{models} SLM selects {100 * share:g}% of these tokens.</p>\n<p>{LEGEND}</p>\n"
        write_text(path, page("What SLM selects", legend + selection_html(scores, store.tokenizer(), rows.value)))
        print(f"wrote {path}")

    run(command)


if __name__ == "__main__":
    main()
