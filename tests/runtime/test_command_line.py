"""What all commands share: overrides of the config, errors of one line, Ctrl-C, closed pipes and libtpu's warnings."""

import errno
import os
import re
import subprocess
import sys

import pytest
from absl import flags
from helpers import environment

from rho1_jax.runtime import command_line
from rho1_jax.runtime.command_line import define_config_flag, run
from rho1_jax.runtime.errors import UserError


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command with a config flag. Returns its exit status and what it printed on standard error."""

    def call(*arguments, main=lambda: None):
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["rho1 test", *arguments])
        define_config_flag()
        try:
            with pytest.raises(SystemExit) as stopped:
                run(main)
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            sys.modules.pop("config_config", None)  # the config file; ml_collections would load the next one into it
        return stopped.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.optimizer.lr=3"],
            "--config.optimizer.lr: no such key. Did you mean config.optimizer.learning_rate?",
        ),
        (["--config.optimizer.lr", "3"], "--config.optimizer.lr: no such key. Did you mean config.optimizer.learning"),
        (
            ["-config.optimizer.lr=3"],
            "--config.optimizer.lr: no such key. Did you mean config.optimizer.learning_rate?",
        ),
        (["--config.optimizer.lr"], "--config.optimizer.lr: no such key. Did you mean config.optimizer.learning_rate?"),
        (
            ["--config.optimizer.learning-rate=3"],
            "--config.optimizer.learning-rate: no such key. Did you mean config.op",
        ),
        (["--config.optimiser.learning_rate=3"], "no such key. Did you mean config.optimizer.learning_rate?"),
        (["--config.data.learning_rate=3"], "no such key. Did you mean config.optimizer.learning_rate?"),
        (["--config.optimizer.lr[0]=3"], "--config.optimizer.lr[0]: no such key"),
        (["--config.eval.stops[7]=3"], "--config.eval.stops[7]: no such key. Did you mean config.eval.stops?"),
        (["--config.steps.x=3"], "--config.steps.x: no such key"),
        (["--config.=3"], "--config.: no such key"),
        (["--config.trace=3"], "--config.trace is a section; set its keys one by one: first, last"),
        (['--config.trace={"first": 3}'], "--config.trace is a section; set its keys one by one: first, last"),
        (
            ["--config.steps=abc"],
            "command line: flag --config.steps=abc: invalid literal for int() with base 10: 'abc'",
        ),
        (["--config.steps=1.5"], "command line: flag --config.steps=1.5: invalid literal for int()"),
        (["--config.steps"], "command line: Missing value for flag --config.steps"),
        (["--config.data.document_mask=maybe"], "flag --config.data.document_mask=maybe: "),
        (
            ["--noconfig.steps"],
            "command line: Unknown command line flag 'noconfig.steps'. Did you mean: config.steps ?",
        ),
        (["--nosuch"], "command line: Unknown command line flag 'nosuch'"),
        (["extra"], "command line: unexpected argument 'extra'"),
        (["--config.steps=1\n\t--config.x=2"], "command line: flag --config.steps=1"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(run_main, arguments, message):
    status, printed = run_main("--config=default:clm", *arguments)
    assert ((status, printed.count("\n")) == (2, 1) and f"error: {message}" in printed) or message in printed
    assert printed.startswith("error: ")


def test_keys_in_a_flag_file_are_checked_too(run_main, tmp_path):
    (tmp_path / "flags").write_text("--config=default:clm\n--config.optimizer.lr=3\n")
    status, printed = run_main(f"--flagfile={tmp_path}/flags")
    assert status == 2 and printed.startswith("error: --config.optimizer.lr: no such key. Did you mean")


def test_required_flags_are_named(run_main):
    assert run_main() == (2, "error: command line: give --config\n")


@pytest.mark.parametrize(
    "code, message",
    [
        ("def get_config(", "SyntaxError: "),
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("", "has no attribute 'get_config'"),
        ("def get_config(): return {}['steps']", "KeyError: 'steps'"),
        ("def get_config(): return None", "get_config must return a ConfigDict, not NoneType"),
        ("def get_config(): return {'steps': 3}", "get_config must return a ConfigDict, not dict"),
        ("def get_config(a, b): pass", "TypeError"),
    ],
)
def test_a_config_file_that_fails_is_one_line_that_says_why(run_main, code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    status, printed = run_main(f"--config={tmp_path}/mine.py", "--config.steps=3")
    assert (status, printed.count("\n")) == (2, 1) and message in printed, printed


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("runs/a  b_c: it\\'s gone"), "runs/a  b_c: it\\'s gone"),
        (UserError("first,\n   second\n\n"), "first, second"),
        (UserError("x\x1b[2Jy\udcff\N{GRINNING FACE}"), "x\\x1b[2Jy\\udcff\N{GRINNING FACE}"),
        (OSError(errno.ENOSPC, "", "runs/slm/metrics"), "runs/slm/metrics: No space left on device"),
        (OSError(errno.ENOSPC, ""), "No space left on device"),
        (OSError(errno.EROFS, "", b"/mnt/x"), "/mnt/x: Read-only file system"),
        (PermissionError(errno.EACCES, "", "/root/x", None, "y"), "/root/x: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "", "file/x"), "file/x: Not a directory"),
    ],
)
def test_errors_of_the_user_and_of_paths_are_one_line(run_main, error, line):
    assert run_main("--config=default:clm", main=fail(error)) == (2, f"error: {line}\n")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no path"), OSError("no number"), BrokenPipeError(), KeyError()]
)
def test_other_errors_keep_their_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        command_line._guarded(fail(error))


def test_ctrl_c_is_one_line_with_status_130(run_main, monkeypatch):
    monkeypatch.setattr(command_line.atexit, "register", lambda *arguments: None)  # it would end pytest
    assert run_main("--config=default:clm", main=fail(KeyboardInterrupt())) == (130, "interrupted\n")


def test_a_real_path_without_permission_is_named(run_main, tmp_path):
    (tmp_path / "file").write_text("")
    status, printed = run_main("--config=default:clm", main=lambda: (tmp_path / "file" / "x").mkdir())
    assert (status, printed) == (2, f"error: {tmp_path}/file/x: Not a directory\n")


PRINTS = """
from rho1_jax.runtime.command_line import run
def main():
    for number in range(100_000):
        print("a line of output", number)
run(main)
"""


def test_a_closed_pipe_ends_a_command_without_a_traceback():
    command = subprocess.Popen(
        [sys.executable, "-c", PRINTS], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout.readline() == "a line of output 0\n"
    command.stdout.close()
    assert (command.wait(timeout=60), command.stderr.read()) == (141, "")


def test_without_a_tpu_libtpu_prints_no_warning(run_main, monkeypatch, tmp_path):
    """With one, nothing is set: its driver and the environment describe it."""
    for name in command_line.NO_TPU:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(command_line, "TPU_DEVICES", (f"{tmp_path}/none*", f"{tmp_path}/accel*"))
    run_main("--config=default:clm")
    assert not set(command_line.NO_TPU) & set(os.environ)
    monkeypatch.setattr(command_line, "TPU_DEVICES", (f"{tmp_path}/none*",))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    run_main("--config=default:clm")
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert re.fullmatch(r"v5litepod-\d", os.environ["TPU_ACCELERATOR_TYPE"])


STARTS = """
import jax
from rho1_jax.runtime.command_line import run
run(lambda: print(jax.default_backend()))
"""


def test_a_command_on_a_cpu_prints_nothing_on_standard_error():
    variables = {name: value for name, value in environment().items() if name != "JAX_PLATFORMS"}
    if not any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio", "/dev/nvidia0")):
        done = subprocess.run([sys.executable, "-c", STARTS], env=variables, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
