"""Training: resuming, refusing what does not fit, and errors as a user sees them."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import OPTIONS, STEPS, config_of, run_command

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.preparation import prepare
from rho1_jax.data.tokenizer import Tokenizer
from rho1_jax.method.objectives import OBJECTIVES
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.train import train_model
from rho1_jax.train_tokenizer import train_tokenizer
from rho1_jax.training import checkpoint
from rho1_jax.training.loop import Loop


def command_line(config, workdir):
    """The command-line arguments that produce this config."""
    changed = []
    base = default.get_config("slm")

    def collect(section, defaults, prefix):
        for key, value in section.items():
            if hasattr(value, "items"):
                collect(value, defaults[key], f"{prefix}.{key}")
            elif value != defaults[key]:
                changed.append(f"--{prefix}.{key}={value}")

    collect(config, base, "config")
    return ["--config=configs/default.py:slm", f"--workdir={workdir}", *changed]


@pytest.fixture(scope="module")
def undisturbed(data, reference, tmp_path_factory):
    """An SLM run without interruption: its directory and final parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    return workdir, jax.device_get(train_model(config_of("slm", data, reference), workdir))


def without_rate(lines):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def final_params(workdir):
    mesh = sharding.make_mesh(8, 1, 1)
    directory = checkpoint.find(workdir, "workdir")
    config = ModelConfig(**checkpoint.load_meta(directory).config["model"])
    return jax.device_get(checkpoint.load_params(directory, config, mesh, "float32"))


def test_metrics_of_a_run(undisturbed):
    lines = read_metrics(undisturbed[0])
    # Every second step, every evaluation, every checkpoint, and the last.
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "eval/held_out/loss" in line] == [5, 10, 12]
    names = "tokens_seen tokens_selected loss selected_loss reference_loss mean_excess selected_fraction gradient_norm"
    for line in lines:
        assert {*names.split(), "learning_rate", "tokens_per_second"} <= line.keys()
        assert line["tokens_seen"] == line["step"] * 8 * OPTIONS.seq_len
        assert line["selected_fraction"] == pytest.approx(0.6, abs=0.01)
    assert lines[-1]["eval/held_out/loss"] < lines[2]["eval/held_out/loss"]


def test_a_run_killed_with_sigkill_and_restarted_equals_an_undisturbed_one(data, reference, undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "rho1_jax.train", *command_line(config_of("slm", data, reference), workdir)]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not any((workdir / "checkpoints").glob("4/_CHECKPOINT_METADATA")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= checkpoint.load_meta(checkpoint.find(workdir, "workdir")).step < STEPS
    again = run_command("rho1_jax.train", *command_line(config_of("slm", data, reference), workdir))
    assert again.returncode == 0 and "resumed from step" in again.stdout, again.stderr
    assert without_rate(read_metrics(workdir)) == without_rate(read_metrics(undisturbed[0]))
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), undisturbed[1])


def test_restarting_a_finished_run_does_nothing(data, reference, undisturbed, capsys):
    kept = [(undisturbed[0] / name).read_text() for name in ("metrics.jsonl", "ledger.json")]
    train_model(config_of("slm", data, reference), undisturbed[0])
    assert [(undisturbed[0] / name).read_text() for name in ("metrics.jsonl", "ledger.json")] == kept
    assert "changed" not in capsys.readouterr().out


def test_changes_since_the_last_start_are_reported(data, reference, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    config = config_of("slm", data, reference)
    config.log_every = 3
    train_model(config, tmp_path / "run")
    assert "since the last start, config.log_every changed from 2 to 3" in capsys.readouterr().out


def test_the_run_describes_itself(data, reference, undisturbed, tokenizer):
    workdir, _ = undisturbed
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["vocab_size"] == tokenizer.vocab_size and saved["selection"]["score"] == "excess"
    meta = checkpoint.load_meta(checkpoint.find(workdir, "workdir"))
    assert meta.config == saved and meta.tokenizer == tokenizer.fingerprint
    assert meta.reference["path"] == str(checkpoint.find(reference, "reference"))
    assert Tokenizer(workdir / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_run_with_a_backward_pass_through_few_tokens(data, reference, undisturbed, tmp_path):
    config = config_of("slm", data, reference)
    config.update(steps=2, backward={"tokens": 0.5})
    train_model(config, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert 0 < line["backward_dropped"] < 0.5 and "backward_dropped" not in read_metrics(undisturbed[0])[0]
    flops = [json.loads((run / "ledger.json").read_text())["flops"] for run in (tmp_path / "run", undisturbed[0])]
    per_forward = [part["policy_backward"] / part["policy_forward"] for part in flops]
    assert 0.4 < per_forward[0] / per_forward[1] < 0.9


def test_first_weights_from_another_run(data, reference, tmp_path):
    config = config_of("clm", data)
    config.init.checkpoint = str(reference)
    config.steps = 1
    config.optimizer.learning_rate = 0.0
    params = jax.device_get(train_model(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, params, final_params(reference))


def test_first_weights_of_another_model_are_refused(data, reference, tmp_path):
    config = config_of("clm", data)
    config.init.checkpoint = str(reference)
    config.model.layers = 3
    with pytest.raises(UserError, match="config.model.layers=3 contradicts .*, which has layers=2; remove it"):
        train_model(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_the_run(data, tmp_path):
    config = config_of("clm", data)
    config.optimizer.update(learning_rate=1e30, clip_norm=1e30, warmup_fraction=0.0)
    with pytest.raises(UserError, match=r"the last 11 steps were skipped, up to step 12: loss .*learning_rate"):
        train_model(config, tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 3}, "config.seed changed from 0 to 3"),
        ({"batch_size": 16}, "config.batch_size changed from 8 to 16"),
        ({"selection": {"ratio": 0.5}}, "config.selection.ratio changed from 0.6 to 0.5"),
        ({"backward": {"tokens": 0.5}}, "config.backward.tokens changed from 1.0 to 0.5"),
        ({"data": {"document_mask": False}}, "config.data.document_mask changed from True to False"),
    ],
)
def test_resuming_with_other_settings_is_refused(data, reference, undisturbed, change, message):
    config = config_of("slm", data, reference)
    config.update(change)
    with pytest.raises(UserError, match=f"cannot resume this run: {message}. Use a new --workdir, or change it back"):
        train_model(config, undisturbed[0])


def test_resuming_with_another_objective_is_refused(data, reference, undisturbed, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "other", lambda policy_loss_BL: policy_loss_BL)
    config = config_of("slm", data, reference)
    config.objective = "other"
    with pytest.raises(UserError, match="cannot resume this run: config.objective changed from 'cross_entropy' to"):
        train_model(config, undisturbed[0])


def test_resuming_with_other_data_is_refused(corpus, tokenizer, reference, undisturbed, tmp_path):
    other = type(OPTIONS)(**OPTIONS.__dict__ | {"eval_fraction": 0.2})
    prepare([corpus], tokenizer, tmp_path / "other", other, workers=1)
    with pytest.raises(UserError, match="cannot resume this run: the content of config.data.train changed"):
        train_model(config_of("slm", tmp_path / "other", reference), undisturbed[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"selection": {"score": "exces"}}, "config.selection.score='exces': 'exces' is not one of none, excess"),
        ({"selection": {"scope": "device"}}, "config.selection.scope='device'"),
        ({"selection": {"ratio": 1.5}}, "config.selection.ratio: a selection ratio"),
        ({"batch_size": 12}, "config.batch_size=12 must be a multiple of 8"),
        ({"microbatches": 2}, "config.batch_size=8 must be a multiple of 16"),
        ({"steps": 0}, "config.steps=0"),
        ({"backward": {"tokens": 0.0}}, "config.backward.tokens=0.0: input should be greater than 0"),
        ({"backward": {"choice": "random"}}, "config.backward.choice='random': input should be 'largest', 'drawn' or"),
        ({"model": {"logits_gib": -1.0}}, "config.model.logits_gib=-1.0: input should be greater than or equal to 0"),
        ({"objective": "dpo"}, "config.objective='dpo' is not one of cross_entropy"),
        ({"eval": {"every": 0}}, "config.eval.every=0"),
        ({"trace": {"first": 3, "last": 2}}, "config.trace.last=2 must not be below config.trace.first=3"),
        ({"mesh": {"fsdp": 3}}, r"config.mesh \(data="),
        ({"model": {"kv_heads": 3}}, "config.model.kv_heads=3 does not divide"),
        ({"model": {"head_width": 7}}, "config.model.head_width=7 is odd"),
        ({"model": {"vocab_size": 10}}, "config.model.vocab_size=10 is below"),
        ({"model": {"vocab_size": 512}}, "vocabulary of 300, but config.model.vocab_size is 512"),
        ({"reference": {"checkpoint": ""}}, "config.reference.checkpoint is empty"),
        ({"reference": {"checkpoint": "nowhere"}}, "config.reference.checkpoint=nowhere is neither a run"),
        ({"init": {"checkpoint": "nowhere"}}, "config.init.checkpoint=nowhere is neither a run"),
        ({"data": {"train": "nowhere"}}, "nowhere: no prepared data set"),
        ({"eval": {"data": "nowhere"}}, "config.eval.data: 'nowhere' is not NAME=PATH"),
        ({"eval": {"questions": "q=nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(data, reference, tmp_path, change, message):
    config = config_of("slm", data, reference)
    config.update(change)
    with pytest.raises(UserError, match=message):
        train_model(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_tokenizer_is_refused(corpus, reference, tmp_path):
    path = tmp_path / "other.model"
    train_tokenizer([corpus], path, vocab_size=290, templates=["{text}"], max_sentences=1000)
    prepare([corpus], Tokenizer(path), tmp_path / "data", OPTIONS, workers=1)
    result = run_command(
        "rho1_jax.train", *command_line(config_of("slm", tmp_path / "data", reference), tmp_path / "run")
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: config.reference.checkpoint=") and "another tokenizer" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optimizer.learning_rat=1"], r"learning_rat: .*Did you mean config.optimizer.learning_rate\?"),
        (["--config.steps=many"], "--config.steps=many"),
        (["--confg.steps=3"], "confg.steps"),
        (["extra"], "unexpected argument 'extra'"),
        (["--config=configs/nowhere.py"], "nowhere.py"),
        (["--config=configs/default.py:sml"], "unknown stage 'sml'; .* reference, clm, random, slm"),
    ],
)
def test_a_mistyped_command_prints_one_line_and_exits_with_status_2(tmp_path, arguments, message):
    result = run_command(
        "rho1_jax.train", "--config=configs/default.py:slm", f"--workdir={tmp_path / 'run'}", *arguments
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_bfloat16_first_moment_trains_about_the_same(data, undisturbed, reference, tmp_path):
    config = config_of("slm", data, reference)
    config.optimizer.first_moment_dtype = "bfloat16"
    train_model(config, tmp_path / "run")
    ours, theirs = read_metrics(tmp_path / "run")[-1], read_metrics(undisturbed[0])[-1]
    assert ours["loss"] != theirs["loss"] and ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["average", "snapshot"])
def test_a_moving_reference_resumes(data, reference, tmp_path, moves):
    """A run that is stopped and resumed equals one that is not, and its reference has moved."""
    config = config_of("slm", data, reference)
    config.reference.update(moves=moves, decay=0.9, every=3)
    config.steps = 8
    whole = jax.device_get(train_model(config, tmp_path / "whole"))
    stopped = config.copy_and_resolve_references()
    stopped.log_every = 1

    class Stop(Exception):
        pass

    def log(self, number, *rest, original=Loop.log):
        original(self, number, *rest)
        if number == 6:
            self.checkpoints.close()
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "log", log)
        with pytest.raises(Stop):
            train_model(stopped, tmp_path / "run")
    directory = checkpoint.find(tmp_path / "run", "workdir")
    assert directory.name == "4" and (directory / "reference").is_dir()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(train_model(stopped, tmp_path / "run")), whole)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"moves": "often"}, "config.reference.moves='often' is not empty, nor one of average, snapshot"),
        ({"moves": "average", "decay": 1.0}, "config.reference.decay=1.0"),
        ({"moves": "snapshot", "every": 0}, "config.reference.every=0: input should be greater than or equal to 1"),
    ],
)
def test_bad_settings_of_a_moving_reference_are_refused(data, tmp_path, change, message):
    config = config_of("slm", data)
    config.reference.update(change)
    with pytest.raises(UserError, match=message):
        train_model(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_resumes_with_another_kernel_and_more_remat(data, reference, tmp_path, capsys):
    config = config_of("slm", data, reference)
    config.steps = 4
    train_model(config, tmp_path / "run")
    config.steps = 6
    config.model.update(attention="xla", remat="dots", unroll=2, loss_chunk=64, logits_gib=1.0)
    train_model(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert (
        "resumed from step 4" in printed
        and "since the last start, config.model.remat changed from 'none' to 'dots'" in printed
    )
