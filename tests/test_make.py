"""What `make` says where it cannot run."""

import os
import subprocess

from helpers import root


def test_gpu_tests_say_that_they_did_not_run(tmp_path):
    """With an nvidia-smi that finds no GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    # Under `make test`, make sets variables of its own.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    made = subprocess.run(["make", "test-gpu"], cwd=root(), env=variables, capture_output=True, text=True)
    assert made.returncode and made.stdout == ""
    assert made.stderr.startswith("make test-gpu: no GPU: these tests did not run\n")
