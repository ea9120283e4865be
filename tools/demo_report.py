"""Write the demo's report: summary.json, curves.png and a self-contained report.html."""

import base64
import html
import json
import pathlib
from typing import Any

from rho1_jax.analysis.plots import Curve, plot_curves
from rho1_jax.analysis.token_report import LEGEND, TokenScores, page, selection_html
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.runtime.files import write_text
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.runtime.schema import read_json
from rho1_jax.training.accounting import LEDGER_FILE

LABELS = {
    "reference": "reference (clean text)",
    "clm": "CLM",
    "random": "random",
    "slm": "SLM",
    "slm_cached": "SLM, stored reference losses",
}
SHOWN_ROWS = 10

BODY = """<p>All models have the same size and initial weights. The <b>reference</b> is trained on clean worked problems
only. The others read the same noisy pages in the same order, but train on different tokens: <b>CLM</b> on all of them,
<b>random</b> on a random {ratio:.0%}, and <b>SLM</b> on the {ratio:.0%} with the highest excess loss, which is the
model's loss minus the reference's.</p>
<img alt="accuracy and loss over training tokens" src="data:image/png;base64,{png}">
<table><tr><th>arm</th><th>tokens seen</th><th>tokens trained on</th><th>clean loss</th><th>accuracy</th>
<th>tokens per second</th><th>seconds</th></tr>
{arms}
</table>
<p>{speedup}</p>
<h2>What SLM selects</h2>
<p>These are rows of the noisy corpus, scored by the SLM model halfway through training. {legend} Hover over a token to
see its losses.</p>
{rows}"""


def arm_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """One run's totals and evaluations, from its metrics.jsonl and ledger.json."""
    metrics = read_metrics(workdir)
    curve = [
        {"tokens": line["tokens_seen"], "loss": line["eval/clean/loss"], "accuracy": line["eval/problems/accuracy"]}
        for line in metrics
        if "eval/clean/loss" in line
    ]
    last, ledger = metrics[-1], read_json(workdir / LEDGER_FILE, dict[str, Any])
    return {
        "tokens_seen": last["tokens_seen"],
        "tokens_selected": last["tokens_selected"],
        "tokens_per_second": ledger["tokens_per_second_per_chip"] * ledger["chips"],
        "curve": curve,
        "final": {"loss": curve[-1]["loss"], "accuracy": curve[-1]["accuracy"]},
    }


def token_speedup(clm: list[dict[str, float]], slm: list[dict[str, float]]) -> float | None:
    """Tokens that CLM needs to reach its best accuracy, divided by the tokens that SLM needs to reach the same.

    Interpolates SLM's curve linearly between evaluations, from zero accuracy at zero tokens. Returns None if CLM has no
    correct answer or SLM never reaches CLM's best.
    """
    best = max(clm, key=lambda point: point["accuracy"])  # the first maximum
    if best["accuracy"] == 0:
        return None
    before = {"tokens": 0, "accuracy": 0.0}
    for point in slm:
        if point["accuracy"] >= best["accuracy"]:
            rise = (best["accuracy"] - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return best["tokens"] / (before["tokens"] + rise * (point["tokens"] - before["tokens"]))
        before = point
    return None


def write_report(
    output: pathlib.Path, summary: dict[str, Any], scores: TokenScores, tokenizer: Tokenizer, ratio: float
) -> None:
    """Write summary.json, curves.png and report.html into `output`."""
    curves = [
        Curve(LABELS[arm], *([point[key] for point in values["curve"]] for key in ("tokens", "loss", "accuracy")))
        for arm, values in summary["arms"].items()
    ]
    plot_curves(curves, output / "curves.png")
    arms = "\n".join(
        f"<tr><td>{html.escape(LABELS[arm])}</td><td>{values['tokens_seen']:,}</td>"
        f"<td>{values['tokens_selected']:,}</td><td>{values['final']['loss']:.3f}</td>"
        f"<td>{values['final']['accuracy']:.1%}</td><td>{values['tokens_per_second']:,.0f}</td>"
        f"<td>{values['seconds']:.0f}</td></tr>"
        for arm, values in summary["arms"].items()
    )
    speedup = summary["token_speedup"]
    verdict = (
        "There is no speed-up to report: CLM answered nothing correctly, or SLM never reached CLM's best accuracy."
        if speedup is None
        else f"SLM reached CLM's best accuracy with {speedup:.1f} times fewer tokens."
    )
    body = BODY.format(
        ratio=ratio,
        png=base64.b64encode((output / "curves.png").read_bytes()).decode(),
        arms=arms,
        speedup=verdict,
        legend=LEGEND,
        rows=selection_html(scores, tokenizer, SHOWN_ROWS),
    )
    write_text(output / "report.html", page("Training on the tokens that matter", body))
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
