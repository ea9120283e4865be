"""Two processes with four devices each train and score like one process with eight."""

import json
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import config_of, environment, root, run_command

from rho1_jax.configs.default import ModelConfig
from rho1_jax.runtime import sharding
from rho1_jax.runtime.metrics import read_metrics
from rho1_jax.training import checkpoint

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def flags_of(data, reference, questions, workdir, mesh):
    config = config_of("slm", data, reference)
    changes = {
        **{
            f"model.{key}": config.model[key]
            for key in ("width", "layers", "heads", "kv_heads", "head_width", "ff_width")
        },
        **{f"mesh.{axis}": size for axis, size in mesh.items()},
        **{"data.train": data, "reference.checkpoint": reference, "steps": 4, "batch_size": 8, "log_every": 1},
        **{"eval.data": f"held_out={data}", "eval.rows": 16, "eval.questions": f"sums={questions}"},
        **{"eval.prompt_template": "{question}", "eval.answer_pattern": r"(\d+)", "eval.max_new_tokens": 4},
        "checkpoint.every": 2,
    }
    named = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["rho1_jax.train", "--config=configs/default.py:slm", f"--workdir={workdir}", *named]


def two_processes(flags, message="parameters on 8 devices"):
    """Run the command as two hosts would, and return the output of the first process, which alone prints `message`."""
    address = f"localhost:{free_port()}"
    variables = {**environment(), "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *flags, f"--distributed={address},2,{index}"],
            cwd=root(), env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in (0, 1)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert message in printed[0][0] and message not in printed[1][0]
    return printed[0][0]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+1=", "answer": f"#### {n + 1}"}) + "\n" for n in range(5)))
    return path


def params_of(workdir):
    directory = checkpoint.find(workdir, "workdir")
    config = ModelConfig(**checkpoint.load_meta(directory).config["model"])
    return jax.device_get(checkpoint.load_params(directory, config, sharding.make_mesh(8, 1, 1), "float32"))


def check_damage_and_one_process(flags, workdir):
    """Both processes leave a damaged checkpoint alone. One process resumes what two have saved."""
    shutil.rmtree(workdir / "checkpoints" / "4" / "params")
    shutil.copytree(workdir / "checkpoints" / "2" / "params", workdir / "checkpoints" / "4" / "params")
    printed = two_processes(flags)
    assert "4 is damaged: params/embedding does not match its checksum; renamed it to 4.damaged" in printed
    assert "resumed from step 2" in printed
    (chunk,) = sorted((workdir / "checkpoints" / "4" / "opt_state" / "ocdbt.process_1" / "d").iterdir())[-1:]
    chunk.write_bytes(b"")
    done = run_command(*flags)
    assert done.returncode == 0 and "resumed from step" in done.stdout, done.stderr
    assert checkpoint.steps(workdir) == [2, 4]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_two_processes_train_like_one(data, reference, questions, mesh, tmp_path):
    done = run_command(*flags_of(data, reference, questions, tmp_path / "one", mesh))
    assert done.returncode == 0, done.stderr
    two = flags_of(data, reference, questions, tmp_path / "two", mesh)
    two_processes(two)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    assert "resumed from step 2" in two_processes(two)
    if mesh == {"data": 8}:
        check_damage_and_one_process(two, tmp_path / "two")
    lines = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for single, joint in zip(*lines):
        assert single.keys() >= {"tokens_selected"}
        for name in single.keys() & joint.keys() - {"tokens_per_second"}:
            assert single[name] == pytest.approx(joint[name], rel=1e-4, abs=1e-5), name
    for single, joint in zip(*(jax.tree.leaves(params_of(tmp_path / name)) for name in ("one", "two"))):
        np.testing.assert_allclose(single, joint, rtol=1e-3, atol=1e-4)


def test_two_processes_score_like_one(data, reference, questions, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(data, tmp_path / name)
    flags = flags_of(data, reference, questions, tmp_path, {"data": 4, "tensor": 2})[1:]
    flags = ["rho1_jax.score", *(flag for flag in flags if "workdir" not in flag), "--config.reference.scores=r"]
    done = run_command(*flags, f"--config.data.train={tmp_path / 'one'}", "--entropies")
    assert done.returncode == 0, done.stderr
    two_processes([*flags, f"--config.data.train={tmp_path / 'two'}", "--entropies"], message="tokens scored")
    for signal in ("losses", "entropies"):
        single, joint = (np.load(tmp_path / name / "scores" / "r" / f"{signal}-00000.npy") for name in ("one", "two"))
        np.testing.assert_allclose(single.astype(np.float32), joint.astype(np.float32), rtol=2e-3, atol=1e-3)


def test_a_malformed_flag_is_refused(data, reference, questions, tmp_path):
    flags = flags_of(data, reference, questions, tmp_path / "run", {"data": 8})
    for value in ("localhost", "localhost:1,2", "localhost:1,two,0"):
        done = run_command(*flags, f"--distributed={value}")
        assert done.returncode == 2 and f"--distributed={value} is neither 'auto' nor HOST:PORT" in done.stderr
