"""SIGTERM and SIGINT: the first asks a command to save, the second ends it, and a deadline holds."""

import signal
import subprocess
import sys
import time

import pytest
from helpers import environment, root

COMMAND = """
import sys, time
from rho1_jax.runtime import stopping
from rho1_jax.runtime.stopping import Stopped

def main():
    if sys.argv[1] != "starting":
        stopping.save_on_stop(1.5)
    print("ready", flush=True)
    while not stopping.requested() or sys.argv[1] != "polite":
        time.sleep(0.02)
    raise Stopped("stopped after step 3 of 9; the same command resumes there")

stopping.listen()
try:
    main()
except Stopped as stop:
    print(stop)
"""


@pytest.fixture
def start():
    processes = []

    def start(mode):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, mode],
                cwd=root(), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        assert processes[-1].stdout.readline() == "ready\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_a_command_save(start, number):
    process = start("polite")
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output == "stopped after step 3 of 9; the same command resumes there\n"
    assert errors == f"{number.name}: saving and stopping within 2 seconds; send a second signal to stop at once\n"


def test_a_second_signal_ends_it_at_once_and_a_repeated_one_does_not(start):
    process = start("deaf")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # as `timeout` does: the same request
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and errors.endswith("SIGINT: stopped at once\n")


def test_the_grace_period_ends(start):
    process = start("deaf")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and errors.endswith("not saved within 2 seconds\n")


def test_a_command_with_nothing_to_save_just_ends(start):
    process = start("starting")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and errors == "SIGTERM: stopped, with nothing to save\n"
