"""Show which tokens a run trains on: documents as HTML, with each token coloured by its excess loss.

Shapes: B rows, L sequence, M = L + 1.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from rho1_jax.data.packing import Batch
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method import selection
from rho1_jax.models.decoder import Params
from rho1_jax.models.forward import make_token_losses

FULL_COLOUR = 4.0  # excess loss with the strongest colour, in nats

CSS = """
.row { white-space: pre-wrap; font: 14px/2 ui-monospace, monospace; border: 1px solid #ddd; border-radius: 6px;
       padding: 8px 12px; margin: 10px 0; }
.row span { padding: 2px 0; }
.row span.selected { border-bottom: 3px solid #222; }
.row span.context { color: #999; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #ddd; }}
th, td {{ text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
{css}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
LEGEND = """Colour is excess loss: <span style="background:rgba(255,140,60,.7)">warm</span> where the reference predicts
the token better, <span style="background:rgba(90,150,255,.7)">cold</span> where the policy does. Underlined tokens are
selected. Grey tokens are context: the first token of a row or document is not a target."""


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Packed rows, with both models' losses in nats, the eligible targets and the selected ones, [B, L] each."""

    batch: Batch
    policy_loss_BL: np.ndarray
    reference_loss_BL: np.ndarray
    eligible_BL: np.ndarray
    selected_BL: np.ndarray


class Mark(NamedTuple):
    """How to show a token: its CSS background colour, its tooltip, and whether to underline it."""

    colour: str
    title: str
    underlined: bool


def score_tokens(
    policy: tuple[nnx.GraphDef, Params],
    reference: tuple[nnx.GraphDef, Params],
    batch: Batch,
    ratio: float,
    document_mask: bool,
) -> TokenScores:
    """Computes both models' losses on a batch, and the tokens that SLM would select from it by excess loss.

    Args:
      policy: structure and parameters of the model in training.
      reference: structure and parameters of the reference model.
      batch: packed rows.
      ratio: fraction of eligible tokens to select.
      document_mask: keep attention within documents.
    """
    losses = []
    for graphdef, params in (policy, reference):
        loss_BL, eligible_BL = jax.jit(make_token_losses(graphdef, document_mask))(params, batch)
        losses.append(loss_BL)
    selected_BL = selection.select(losses[0] - losses[1], eligible_BL, selection.ratio_units(ratio), "global")
    return TokenScores(batch, *(np.asarray(x) for x in (*losses, eligible_BL, selected_BL)))


def _colour(excess: float) -> str:
    """Warm if the reference predicts the token better than the policy, cold if it predicts it worse."""
    strength = min(abs(excess) / FULL_COLOUR, 1.0)
    red, green, blue = (255, 140, 60) if excess > 0 else (90, 150, 255)
    return f"rgba({red},{green},{blue},{0.85 * strength:.2f})"


def excess_marks(scores: TokenScores) -> Callable[[int, int], Mark]:
    """Marks for `rows_html`: colour shows excess loss, underlines show selected tokens, tooltips show the losses."""

    def mark(row: int, position: int) -> Mark:
        policy, reference = scores.policy_loss_BL[row, position], scores.reference_loss_BL[row, position]
        title = f"policy {policy:.2f}, reference {reference:.2f}, excess {policy - reference:+.2f}"
        return Mark(_colour(policy - reference), title, bool(scores.selected_BL[row, position]))

    return mark


def rows_html(
    tokens_BM: np.ndarray,
    eligible_BL: np.ndarray,
    tokenizer: Tokenizer,
    rows: Sequence[int],
    mark: Callable[[int, int], Mark],
) -> str:
    """Rows as HTML.

    Args:
      tokens_BM: token ids.
      eligible_BL: the targets to mark; all other tokens are grey.
      tokenizer: the tokenizer of the ids.
      rows: the rows to show.
      mark: (row, position) -> how to show the target there.
    """
    lines = []
    for row in rows:
        pieces = tokenizer.pieces(tokens_BM[row])
        spans = [f'<span class="context">{html.escape(pieces[0])}</span>']
        for position, piece in enumerate(pieces[1:]):
            if not eligible_BL[row, position]:
                spans.append(f'<span class="context">{html.escape(piece)}</span>')
                continue
            colour, title, underlined = mark(row, position)
            css_class = ' class="selected"' if underlined else ""
            spans.append(
                f'<span{css_class} style="background:{colour}" title="{html.escape(title)}">{html.escape(piece)}</span>'
            )
        lines.append(f'<div class="row">{"".join(spans)}</div>')
    return "\n".join(lines)


def page(title: str, body: str) -> str:
    """A self-contained HTML page."""
    return PAGE.format(title=html.escape(title), css=CSS, body=body)


def selection_html(scores: TokenScores, tokenizer: Tokenizer, rows: int) -> str:
    """The first `rows` rows as HTML, without those that are only padding."""
    shown = np.flatnonzero(scores.eligible_BL.any(axis=1))[:rows].tolist()
    return rows_html(scores.batch.tokens, scores.eligible_BL, tokenizer, shown, excess_marks(scores))
