"""The evaluation command on a finished run."""

import json

import pytest
from conftest import run_command

from rho1_jax.errors import UserError
from rho1_jax.evaluate import evaluate
from rho1_jax.metrics import read_metrics


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"question": "{n}+1=", "answer": "#### {n + 1}"}}\n' for n in range(5)))
    return path


def test_losses_are_those_of_the_run_and_items_are_written(data, reference, questions, tmp_path):
    overrides = {"questions": f"sums={questions}", "max_new_tokens": 8}
    metrics = evaluate(str(reference), overrides, tmp_path / "out", temperature=0.0, seed=0)
    assert metrics["eval/held_out/loss"] == pytest.approx(read_metrics(reference)[-1]["eval/held_out/loss"], rel=1e-6)
    items = [json.loads(line) for line in (tmp_path / "out" / "sums.jsonl").open()]
    assert [item["prompt"] for item in items] == [f"{n}+1=\n" for n in range(5)]
    assert metrics["eval/sums/accuracy"] == sum(item["correct"] for item in items) / 5
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved.items() >= metrics.items() and saved["checkpoint"].endswith("checkpoints/12")


def test_nothing_to_evaluate_is_an_error(reference):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(str(reference), {"data": ""}, None, temperature=0.0, seed=0)


def test_the_command(reference, questions):
    arguments = [f"--checkpoint={reference}", f"--questions=sums={questions}", "--max_new_tokens=4"]
    result = run_command("rho1_jax.evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["eval/held_out/loss", "eval/sums/accuracy"]
    missing = run_command("rho1_jax.evaluate", "--checkpoint=nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("error: --checkpoint=nowhere: no checkpoint")
