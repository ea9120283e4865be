"""Whole runs of the demo and the commands."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import config_of, root, run_command

from rho1_jax.configs import demo as demo_config
from rho1_jax.data.store import Store
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.train import train_model
from tools import demo

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch):
    """Shrink the demo to a few steps."""
    monkeypatch.setattr(demo, "CLEAN_PROBLEMS", 600)
    monkeypatch.setattr(demo, "NOISY_PROBLEMS", 1200)
    monkeypatch.setattr(demo, "QUESTIONS", 16)
    full = demo_config.get_config

    def get_config(stage):
        config = full(stage)
        config.steps = 4
        config.model.update(width=32, layers=1, heads=2, kv_heads=1, head_width=16, ff_width=32)
        config.eval.update(every=2, generate_batch=16, rows=16)
        config.checkpoint.every = 2
        return config

    monkeypatch.setattr(demo_config, "get_config", get_config)


def test_the_demo_runs_and_writes_its_report(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = demo.demo(pathlib.Path("demo"), seed=0, cached=True)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    assert list(summary["arms"]) == ["reference", "clm", "random", "slm", "slm_cached"]
    for arm in summary["arms"].values():
        assert arm["tokens_seen"] == 4 * 16 * 64
        assert [point["tokens"] for point in arm["curve"]] == [2 * 1024, 4 * 1024]
        assert arm["final"] == {name: arm["curve"][-1][name] for name in ("loss", "accuracy")}
    assert summary["arms"]["random"]["tokens_selected"] == summary["arms"]["slm"]["tokens_selected"]
    for cached, online in zip(summary["arms"]["slm_cached"]["curve"], summary["arms"]["slm"]["curve"], strict=True):
        assert cached == pytest.approx(online, rel=1e-4)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|@import', page)
    assert page.count('class="row"') == 10 and 'class="selected"' in page
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = demo.demo(pathlib.Path("demo"), seed=0, cached=True)
    assert again["arms"]["slm"]["curve"] == summary["arms"]["slm"]["curve"]


def test_all_ten_tasks_in_one_command(reference, tmp_path):
    """Two items per task, with the run's own small model."""
    published = root().parent / "shared" / "data" / "eval"
    if not published.is_dir():
        pytest.skip(f"{published} is missing: cannot evaluate the ten tasks")
    names = "gsm8k,math,svamp,asdiv,mawps,tabmwp,mathqa,mmlu_stem,sat_math,gsm_hard"
    arguments = [f"--checkpoint={reference}", "--data=", f"--tasks={names}", f"--data_dir={published}"]
    arguments += ["--task_items=2", "--max_new_tokens=16", "--generate_batch=2", f"--output={tmp_path / 'out'}"]
    result = run_command("rho1_jax.evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    metrics = [line.split()[0] for line in result.stdout.splitlines()]
    assert metrics == [f"eval/{name}/accuracy" for name in [*names.split(","), "average"]]
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 10


def test_fine_tuning_selects_among_response_tokens(tokenizer, reference, tmp_path):
    path = tmp_path / "chat.jsonl"
    records = [{"question": f"Document {n}:", "answer": f"{n}+1={n + 1}. and so on, " * 3} for n in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run_command(
        "tools.prepare_data",
        f"--input={path}",
        f"--tokenizer={tokenizer.path}",
        f"--output={tmp_path / 'rows'}",
        "--seq_len=100",
        "--transcripts",
        "--prompt_key=question",
        "--response_key=answer",
        r"--role_template=user={content}\n",
        "--eval_fraction=0.2",
    )
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "rows")
    counts = store.manifest["splits"]["train"]
    config = config_of("slm", tmp_path / "rows", reference)
    config.update(epochs=2.0, batch_size=8)
    config.eval.data = f"held_out={tmp_path / 'rows'}"
    config.optimizer.decay = "linear"
    train_model(config, tmp_path / "run")
    steps = -(-2 * counts["rows"] // 8)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == steps and last["eval/held_out/loss"] > 0
    rows = store.rows("train")
    responses = sum(int(rows[n]["responses"].sum()) for n in range(len(rows)))
    # About two epochs over the response tokens, of which 60 % are selected.
    assert last["tokens_selected"] == pytest.approx(0.6 * responses * steps * 8 / len(rows), rel=0.1)


def test_token_dynamics_of_a_run(data, reference, tmp_path):
    config = config_of("slm", data, reference)
    config.checkpoint.update(every=2, keep=0)
    train_model(config, tmp_path / "run")
    flags = [
        f"--run={tmp_path / 'run'}",
        f"--data={data}",
        f"--output={tmp_path / 'out'}",
        "--rows=16",
        f"--reference={reference}",
    ]
    done = run_command("tools.token_dynamics", *flags)
    assert done.returncode == 0, done.stderr
    dynamics = json.loads((tmp_path / "out" / "dynamics.json").read_text())
    assert dynamics["steps"] == [2, 4, 6, 8, 10, 12]
    assert sum(dynamics["shares"].values()) == pytest.approx(1) and dynamics["tokens"] > 100
    assert len(dynamics["selected_loss"]) == len(dynamics["unselected_loss"]) == 6
    assert (tmp_path / "out" / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "dynamics.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|@import', page)
    assert page.count('class="row"') == 8
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    for step in (4, 6, 8, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    done = run_command("tools.token_dynamics", *flags)
    assert done.returncode == 2 and "1 checkpoints, but at least two are needed" in done.stderr


def test_the_documented_custom_score_trains(data, tmp_path):
    small = ["width=32", "layers=2", "heads=4", "kv_heads=2", "head_width=8", "ff_width=48"]
    done = run_command(
        "rho1_jax.train",
        "--config=docs/examples/own_score.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.train={data}",
        *(f"--config.model.{size}" for size in small),
        *("--config.steps=3", "--config.batch_size=8", "--config.log_every=1"),
    )
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.count('"reference_loss"') == 3


@pytest.mark.parametrize("microbatches", [1, 2])
def test_optimizer_state_in_host_memory_changes_nothing(data, reference, tmp_path, microbatches):
    """Each run stops halfway and resumes, so restoring the state to the right memory is tested too."""
    finals = {}
    for offload in (False, True):
        for steps in (4, 8):
            config = config_of("slm", data, reference)
            config.update(steps=steps, microbatches=microbatches, batch_size=16)
            config.optimizer.host_offload = offload
            finals[offload] = train_model(config, tmp_path / str(offload))
    jax.tree.map(np.testing.assert_array_equal, *finals.values())
