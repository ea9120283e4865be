"""Which tokens a run trains on: documents as HTML, each token coloured by its excess loss.

Shapes: B rows, L sequence.
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

# Excess loss, in nats, at which the colour is full.
FULL_COLOUR = 4.0

CSS = """
.row { white-space: pre-wrap; font: 14px/2 ui-monospace, monospace; border: 1px solid #ddd; border-radius: 6px;
       padding: 8px 12px; margin: 10px 0; }
.row span { padding: 2px 0; }
.row span.selected { border-bottom: 3px solid #222; }
.row span.context { color: #999; }
"""


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Packed rows with what the two models make of their targets; [B, L] each, losses in nats."""

    batch: Batch
    policy_loss_BL: np.ndarray
    reference_loss_BL: np.ndarray
    eligible_BL: np.ndarray
    selected_BL: np.ndarray


class Mark(NamedTuple):
    """How a token is shown: its background in CSS, what hovering tells, and whether it is underlined."""

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
    """Losses of both models on a batch, and the tokens that SLM would select from it by excess loss."""
    losses = []
    for graphdef, params in (policy, reference):
        loss_BL, eligible_BL = jax.jit(make_token_losses(graphdef, document_mask))(params, batch)
        losses.append(loss_BL)
    selected_BL = selection.select(losses[0] - losses[1], eligible_BL, selection.ratio_units(ratio), "global")
    return TokenScores(batch, *(np.asarray(x) for x in (*losses, eligible_BL, selected_BL)))


def _colour(excess: float) -> str:
    """Warm above zero (the reference knows better), cold below (noise to the reference)."""
    strength = min(abs(excess) / FULL_COLOUR, 1.0)
    red, green, blue = (255, 140, 60) if excess > 0 else (90, 150, 255)
    return f"rgba({red},{green},{blue},{0.85 * strength:.2f})"


def excess_marks(scores: TokenScores) -> Callable[[int, int], Mark]:
    """Colour is excess loss, an underline marks selected tokens, the losses show on hovering."""

    def mark(row: int, at: int) -> Mark:
        policy, reference = scores.policy_loss_BL[row, at], scores.reference_loss_BL[row, at]
        title = f"policy {policy:.2f}, reference {reference:.2f}, excess {policy - reference:+.2f}"
        return Mark(_colour(policy - reference), title, bool(scores.selected_BL[row, at]))

    return mark


def rows_html(
    tokens_BM: np.ndarray,
    eligible_BL: np.ndarray,
    tokenizer: Tokenizer,
    rows: Sequence[int],
    mark: Callable[[int, int], Mark],
) -> str:
    """Rows as HTML, each eligible target with what `mark` says of it, by row and position; the others are grey."""
    lines = []
    for row in rows:
        pieces = tokenizer.pieces(tokens_BM[row])
        spans = [f'<span class="context">{html.escape(pieces[0])}</span>']
        for at, piece in enumerate(pieces[1:]):
            if not eligible_BL[row, at]:
                spans.append(f'<span class="context">{html.escape(piece)}</span>')
                continue
            colour, title, chosen = mark(row, at)
            selected = ' class="selected"' if chosen else ""
            spans.append(
                f'<span{selected} style="background:{colour}" title="{html.escape(title)}">{html.escape(piece)}</span>'
            )
        lines.append(f'<div class="row">{"".join(spans)}</div>')
    return "\n".join(lines)
