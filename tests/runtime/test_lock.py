"""The lock of a directory: one holder at a time, and a holder that is gone does not keep it."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from helpers import environment, root

from rho1_jax.runtime import lock
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.lock import Owner, locked

HOLD = """
import pathlib, sys, time
from rho1_jax.runtime.lock import locked
with locked(pathlib.Path(sys.argv[1]), "runs/slm"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        cwd=root(), env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_in_use_is_refused_with_its_holder(holder, tmp_path):
    message = rf"runs/slm is in use by process {holder.pid} on \S+ since 20\d\d-.*; wait for it, stop it, or choose"
    with pytest.raises(UserError, match=message), locked(tmp_path / "lock", "runs/slm"):
        pass
    assert holder.poll() is None and (tmp_path / "lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", "runs/slm"):
        assert Owner(**json.loads((tmp_path / "lock").read_text())).process == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_reused_process_id_does_not_keep_the_lock(tmp_path):
    other = Owner.this_process().model_copy(update={"process_start": 1})
    (tmp_path / "lock").write_text(other.model_dump_json())
    with locked(tmp_path / "lock", "runs/slm"):
        pass


def test_the_lock_of_another_machine_is_stale_once_it_is_no_longer_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.5)
    path = tmp_path / "lock"
    path.write_text(Owner.this_process().model_copy(update={"machine": "another", "host": "vm-2"}).model_dump_json())
    ended = threading.Event()

    def touch():
        while not ended.wait(0.5):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(UserError, match="in use by process [0-9]+ on vm-2"), locked(path, "runs/slm"):
        pass
    ended.set()
    thread.join()
    with locked(path, "runs/slm"):
        pass
    assert "waiting to see whether it is still running" in capsys.readouterr().err


def test_of_many_that_start_at_once_one_gets_a_stale_lock(tmp_path):
    stale = Owner.this_process().model_copy(update={"process_start": 1}).model_dump_json()
    path, held, counts = tmp_path / "lock", [], []
    path.write_text(stale)

    def take():
        try:
            with locked(path, "runs/slm"):
                held.append(1)
                counts.append(len(held))
                time.sleep(0.3)
                held.pop()
        except UserError:
            pass

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts and max(counts) == 1


def test_a_lock_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError), locked(tmp_path / "lock", "runs/slm"):
        pass


def test_an_unreadable_lock_is_not_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)
    (tmp_path / "lock").write_bytes(b"[\xff]")
    start = time.monotonic()
    with locked(tmp_path / "lock", "runs/slm"):
        assert time.monotonic() - start > 1.4
