"""Run programs that a model wrote, in a process that can do nothing but compute (see sandbox_child.py)."""

import json
import os
import pathlib
import select
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

from rho1_jax.runtime.errors import UserError

SECONDS = 10.0  # wall-clock limit for one program
MEMORY = 2 << 30  # address space, in bytes
FILE_SIZE = 1 << 20  # largest file in the scratch folder, in bytes
MAX_OUTPUT = 100_000  # characters of output that are kept
SHOWN_OUTPUT = 400  # characters that the model sees; the middle of longer output is left out
TIMED_OUT = "TimeoutError: 'Timed Out'\n"
ENDED = "SystemError: the process ended\n"
START_SECONDS = 60.0

_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
# Files that the dynamic linker and the C library read, besides the interpreter's own folders.
_SYSTEM_FILES = ("/lib", "/lib64", "/usr/lib", "/usr/local/lib", "/etc/ld.so.cache", "/dev/urandom", "/dev/null")


def shown(output: str) -> str:
    """Output as in the published transcripts: stripped, and cut to its two ends if it exceeds SHOWN_OUTPUT."""
    output = output.strip()
    half = SHOWN_OUTPUT // 2
    return output if len(output) <= SHOWN_OUTPUT else output[:half] + "..." + output[-half:]


class Sandbox:
    """A process for the programs of one transcript, which share their variables. It ends with the `with` block."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: Any = None
        self._scratch: Any = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, code: str) -> str:
        """Runs a program and returns what it prints.

        The value of an expression on the last line is printed, too. If the program fails, the result is the last line
        of its traceback; if it takes too long or kills the process, it is TIMED_OUT or ENDED.

        Raises:
          UserError: this machine cannot confine a process.
        """
        if self._process is None:
            self._start()
        try:
            return str(self._ask(code, self._seconds).get("output", ""))[:MAX_OUTPUT]
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
            "max_output": MAX_OUTPUT,
        }
        try:
            answer = self._ask(settings, START_SECONDS)
        except (TimeoutError, EOFError):
            answer = {}
        if "ready" not in answer:
            self.close()
            reason = answer.get("refused", "the process did not start")
            raise UserError(f"programs cannot be run safely on this machine: {reason}; use another machine")

    def _ask(self, message: Any, seconds: float) -> dict[str, Any]:
        """Sends a message and waits for the answer. Each is one line of JSON.

        Raises:
          TimeoutError: no answer came in time.
          EOFError: the process ended, or sent something other than a JSON object.
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
            if not part or len(received) > 8 * MAX_OUTPUT:
                raise EOFError
        try:
            answer = json.loads(received)
        except ValueError:
            raise EOFError from None
        if not isinstance(answer, dict):
            raise EOFError
        return answer

    def close(self) -> None:
        """Kills the process, if it runs, and removes its folder. The next program starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
            self._scratch.cleanup()
