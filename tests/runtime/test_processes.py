"""Two processes with four devices each train and score like one process with eight."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

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


def start_two(flags, *extra):
    """Start the command as two hosts would. Each may have flags of its own."""
    address = f"localhost:{free_port()}"
    variables = {**environment(), "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *flags, *more, f"--distributed={address},2,{index}"],
            cwd=root(), env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, more in enumerate(extra or ([], []))
    ]  # fmt: skip


def two_processes(flags, message="parameters on 8 devices"):
    """Run the command as two hosts would, and return the output of the first process, which alone prints `message`."""
    processes = start_two(flags)
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
    for signals in ("losses", "entropies"):
        single, joint = (np.load(tmp_path / name / "scores" / "r" / f"{signals}-00000.npy") for name in ("one", "two"))
        np.testing.assert_allclose(single.astype(np.float32), joint.astype(np.float32), rtol=2e-3, atol=1e-3)


def test_a_malformed_flag_is_refused(data, reference, questions, tmp_path):
    flags = flags_of(data, reference, questions, tmp_path / "run", {"data": 8})
    for value in ("localhost", "localhost:1,2", "localhost:1,two,0"):
        done = run_command(*flags, f"--distributed={value}")
        assert done.returncode == 2 and f"--distributed={value} is neither 'auto' nor HOST:PORT" in done.stderr


def wait_for_step(workdir, step):
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or not any(line["step"] >= step for line in read_metrics(workdir)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_lines(processes):
    """The exit status of each process, the lines that we printed in it, and all output."""
    printed = [process.communicate(timeout=60) for process in processes]
    lines = [[line for line in error.splitlines() if line.startswith(("error", "SIG"))] for _, error in printed]
    return [process.returncode for process in processes], lines, printed


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_dies_the_other_names_it_and_ends(data, reference, questions, killed, tmp_path):
    flags = [*flags_of(data, reference, questions, tmp_path / "run", {"data": 8}), "--config.steps=100000"]
    processes = start_two(flags)
    wait_for_step(tmp_path / "run", 1)
    processes[killed].kill()
    status, lines, printed = last_lines(processes)
    assert status[1 - killed] == 1 and "Traceback" not in printed[1 - killed][1]
    assert lines[1 - killed] == [
        f"error: process {killed} has ended early; see its output, and start all processes again to resume"
    ]


BLIND = """
import jax
from rho1_jax.training import checkpoint
steps, load_meta = checkpoint.steps, checkpoint.load_meta
def old_steps(workdir):
    return steps(workdir)[: -1 if jax.process_index() and workdir.name == "run" else None]
def failing(path):
    if jax.process_index() and path.name == "4":
        raise checkpoint.DamagedCheckpoint(path, "the network failed")
    return load_meta(path)
"""


def test_processes_resume_alike_though_one_sees_other_files(data, reference, questions, tmp_path):
    flags = flags_of(data, reference, questions, tmp_path / "run", {"data": 8})
    two_processes(flags)
    (tmp_path / "list.py").write_text(f"{BLIND}\ncheckpoint.steps = old_steps\n")
    (tmp_path / "read.py").write_text(f"{BLIND}\ncheckpoint.load_meta = failing\n")
    assert "resumed from step 4" in two_processes([*flags, f"--plugin={tmp_path / 'list.py'}"])
    printed = two_processes([*flags, f"--plugin={tmp_path / 'read.py'}"])
    assert "4 is damaged: another process cannot read the description; renamed it to 4.damaged" in printed
    assert "resumed from step 2" in printed


def test_an_error_of_one_process_ends_both_before_the_first_checkpoint(data, reference, questions, tmp_path):
    plugin = tmp_path / "damage.py"
    plugin.write_text(
        "import jax\n"
        "from rho1_jax.data import store\n"
        "def read(self, row):\n"
        "    if jax.process_index() == 1:\n"
        "        raise store.UserError('the disk of this machine is damaged')\n"
        "    return self._source[row]\n"
        "store._Rows.__getitem__ = read\n"
    )
    flags = [*flags_of(data, reference, questions, tmp_path / "run", {"data": 8}), f"--plugin={plugin}"]
    status, lines, _ = last_lines(start_two(flags))
    assert status == [1, 2] and lines[1] == ["error: the disk of this machine is damaged"]
    assert lines[0] == ["error: process 1 has ended early; see its output, and start all processes again to resume"]


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--config.seed=1", "process 1 differs from process 0 in config.seed: 1, not 0"),
        ("--config.optimizer.b2=0.9", "process 1 differs from process 0 in config.optimizer.b2: 0.9, not 0.95"),
    ],
)
def test_processes_that_were_started_differently_say_so(data, reference, questions, extra, message, tmp_path):
    flags = flags_of(data, reference, questions, tmp_path / "run", {"data": 8})
    status, lines, _ = last_lines(start_two(flags, [], [extra]))
    assert status == [2, 2] and lines[0] + lines[1] == [f"error: {message}"]
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(data, reference, questions, tmp_path):
    flags = [*flags_of(data, reference, questions, tmp_path / "run", {"data": 8}), "--config.eval.every=100"]
    processes = start_two([*flags, "--config.steps=100000", "--config.optimizer.schedule_steps=40"])
    wait_for_step(tmp_path / "run", 1)
    processes[1].send_signal(signal.SIGTERM)
    status, lines, printed = last_lines(processes)
    assert status == [0, 0] and not lines[0] and lines[1][0].startswith("SIGTERM: saving and stopping"), printed
    stopped = checkpoint.load_meta(checkpoint.find(tmp_path / "run", "workdir")).step
    assert f"stopped after step {stopped} of 100000" in printed[0][0]
    steps = [f"--config.steps={stopped + 3}", "--config.optimizer.schedule_steps=40"]
    for workdir in ("run", "undisturbed"):
        flags = flags_of(data, reference, questions, tmp_path / workdir, {"data": 8})
        two_processes([*flags, "--config.eval.every=100", *steps])
    ended, undisturbed = (read_metrics(tmp_path / name) for name in ("run", "undisturbed"))
    for line in ended + undisturbed:
        del line["tokens_per_second"]
    assert ended == undisturbed and len(ended) == stopped + 3
    jax.tree.map(np.testing.assert_array_equal, *(params_of(tmp_path / name) for name in ("run", "undisturbed")))


def test_an_error_of_both_processes_is_printed_once(data, reference, questions, tmp_path):
    flags = flags_of(data, reference, questions, tmp_path / "run", {"data": 8})
    status, lines, _ = last_lines(start_two([*flags, "--config.batch_size=12"]))
    assert status == [2, 2] and len(lines[0] + lines[1]) == 1
    assert (lines[0] + lines[1])[0].startswith("error: config.batch_size=12 must be a multiple of 8")
