"""Programs that a model wrote, run in a process that can do nothing but compute (see sandbox_child.py)."""

import json
import os
import pathlib
import select
import subprocess
import sys
import sysconfig
import tempfile
import time
from types import TracebackType
from typing import Any

from rho1_jax.runtime.errors import UserError

SECONDS = 10.0  # wall time of a program
MEMORY = 2 << 30  # bytes of address space
FILE_SIZE = 1 << 20  # bytes of a file in the scratch folder
MOST_OUTPUT = 100_000  # characters that are kept
SHOWN_OUTPUT = 400  # characters that the model is shown; longer output loses its middle
TIMED_OUT = "TimeoutError: 'Timed Out'\n"
ENDED = "SystemError: the process ended\n"
START_SECONDS = 60.0

_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
# Beside the interpreter's own folders: what the dynamic linker and the C library look at.
_SYSTEM_FILES = ("/lib", "/lib64", "/usr/lib", "/usr/local/lib", "/etc/ld.so.cache", "/dev/urandom", "/dev/null")


def shown(output: str) -> str:
    """An output as the published transcripts have it: stripped, and of more than 400 characters only both ends."""
    output = output.strip()
    half = SHOWN_OUTPUT // 2
    return output if len(output) <= SHOWN_OUTPUT else output[:half] + "..." + output[-half:]


class Sandbox:
    """A process for the programs of one transcript, which see each other's names. Never outlives its `with` block."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: Any = None
        self._scratch: Any = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, code: str) -> str:
        """What the program prints, and the value of its last line; the last line of the traceback where it fails.

        Raises:
          UserError: this system cannot confine a process.
        """
        if self._process is None:
            self._start()
        try:
            return str(self._ask(code, self._seconds).get("output", ""))[:MOST_OUTPUT]
        except (TimeoutError, EOFError) as error:
            self.close()
            return TIMED_OUT if isinstance(error, TimeoutError) else ENDED

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        readable = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        readable |= {sys.base_prefix + "/lib", sys.prefix + "/lib", *_SYSTEM_FILES}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-u", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._scratch.name,
            env={
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
                "HOME": self._scratch.name,
                "TMPDIR": self._scratch.name,
                "MPLBACKEND": "Agg",
                "MPLCONFIGDIR": self._scratch.name,
            },
            close_fds=True,
            start_new_session=True,
        )
        settings = {
            "scratch": self._scratch.name,
            "readable": sorted(map(str, readable)),
            "cpu_seconds": 600,
            "memory": MEMORY,
            "file_size": FILE_SIZE,
            "most": MOST_OUTPUT,
        }
        try:
            answer = self._ask(settings, START_SECONDS)
        except (TimeoutError, EOFError):
            answer = {}
        if "ready" not in answer:
            self.close()
            reason = answer.get("refused", "the process did not start")
            raise UserError(f"programs cannot be run safely on this machine: {reason}")

    def _ask(self, message: Any, seconds: float) -> dict[str, Any]:
        """Sends a line and waits for one.

        Raises:
          TimeoutError: none came in time.
          EOFError: the process ended, or sent something else.
        """
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            raise EOFError from None
        received = bytearray()
        while not received.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            received += part
            if not part or len(received) > 8 * MOST_OUTPUT:
                raise EOFError
        try:
            answer = json.loads(received)
        except ValueError:
            raise EOFError from None
        if not isinstance(answer, dict):
            raise EOFError
        return answer

    def close(self) -> None:
        """Ends the process, if there is one, and removes its folder. The next program gets others."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
            self._scratch.cleanup()
