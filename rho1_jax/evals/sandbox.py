"""Run programs that a model wrote, in a process that can do nothing but compute (see sandbox_child.py)."""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

from rho1_jax.evals.sandbox_calls import MACHINES, seccomp_filter
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.schema import parse_json

SECONDS = 10.0  # wall-clock limit for one program
MEMORY = 2 << 30  # address space, in bytes
FILE_SIZE = 1 << 20  # largest file in the scratch folder, in bytes
FILES = 64  # files in the scratch folder, and open files; a program that creates more is killed
LOOK_SECONDS = 0.05  # between two checks of the scratch folder
CPU_SECONDS = 600  # processor time for all programs of one sandbox
MAX_OUTPUT = 100_000  # characters of output that are kept
MAX_ANSWER = 13 * MAX_OUTPUT  # bytes of an answer; JSON needs up to 12 for a character
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


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What the process sends: that it is confined, why it could not be, or what a program printed."""

    ready: bool = False
    refused: str = "the process did not start"
    output: str = ""


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
        """Runs a program and returns what it prints, which is valid text of at most MAX_OUTPUT characters.

        The value of an expression on the last line is printed, too. If the program fails, the result is the last line
        of its traceback. If it takes too long, kills the process or creates too many files, the result is TIMED_OUT or
        ENDED.

        Raises:
          UserError: this machine cannot confine a process.
        """
        if self._process is None:
            self._start()
        try:
            return self._ask(code, self._seconds).output[:MAX_OUTPUT]
        except (TimeoutError, EOFError) as error:
            self.close()
            return TIMED_OUT if isinstance(error, TimeoutError) else ENDED

    def _start(self) -> None:
        system, machine = platform.system(), platform.machine()
        if system != "Linux" or machine not in MACHINES:
            supported = " or ".join(MACHINES)
            raise UserError(f"cannot run programs safely on {system} {machine}; use Linux on {supported}")
        readable = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        readable |= {sys.base_prefix + "/lib", sys.prefix + "/lib", *_SYSTEM_FILES}
        try:
            self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
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
        except OSError as error:
            self.close()
            raise UserError(f"cannot start a process for the model's programs: {error}") from None
        os.set_blocking(self._process.stdin.fileno(), False)
        limits = {"AS": MEMORY, "CPU": CPU_SECONDS, "FSIZE": FILE_SIZE, "NOFILE": FILES, "CORE": 0}
        settings = {
            "parent": os.getpid(),
            "scratch": self._scratch.name,
            "readable": sorted(map(str, readable)),
            "limits": limits,
            "instructions": seccomp_filter(machine),
            "max_output": MAX_OUTPUT,
        }
        try:
            answer = self._ask(settings, START_SECONDS)
        except (TimeoutError, EOFError):
            answer = _Answer()
        if not answer.ready:
            self.close()
            raise UserError(f"cannot run programs safely on this machine: {answer.refused}; use another machine")

    def _ask(self, message: Any, seconds: float) -> _Answer:
        """Sends a message and waits for the answer. Each is one line of JSON. The answer may be forged.

        The process is halted until the next message, so that one that forges its answer cannot keep running unwatched.

        Raises:
          TimeoutError: no answer came in time.
          EOFError: the process ended, sent something other than an answer, or filled the scratch folder.
        """
        self._process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + seconds
        unsent, received = (json.dumps(message) + "\n").encode(), b""
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        poll = select.poll()
        poll.register(stdin, select.POLLOUT)
        poll.register(stdout, select.POLLIN)
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = dict(poll.poll(1000 * min(left, LOOK_SECONDS)))
            if stdout in ready:
                part = os.read(stdout, 1 << 16)
                received += part
                if not part or len(received) > MAX_ANSWER:
                    raise EOFError
            elif stdin in ready:
                try:
                    unsent = unsent[os.write(stdin, unsent) :]
                except OSError:
                    raise EOFError from None
                if not unsent:
                    poll.unregister(stdin)
            if self._overflows():
                raise EOFError
        self._process.send_signal(signal.SIGSTOP)
        try:
            return parse_json(received, _Answer, "the sandbox")
        except UserError:
            raise EOFError from None

    def _overflows(self) -> bool:
        """True if the scratch folder holds more than FILES files. Programs cannot create folders in it."""
        with os.scandir(self._scratch.name) as files:
            return sum(1 for _ in files) > FILES

    def kill(self) -> None:
        """Ends a running program at once. Another thread may call this while `run` waits, which then returns ENDED."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kills the process, if it runs, and removes its folder. The next program starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):  # what the process did not read
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
