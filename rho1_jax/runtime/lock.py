"""A lock on a directory, so that two runs do not write to it at the same time. It works on shared file systems.

The lock is a file that names its owner. The owner touches it regularly. It is stale if its owner has ended or, if this
machine cannot tell, once it is no longer touched.
"""

import contextlib
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pydantic

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.schema import parse_json

LOCK_FILE = "lock"  # its name in a directory that a command has to itself
TOUCH_SECONDS = 10.0
SETTLE_SECONDS = 0.5  # longer than it takes to read a stale lock and replace it
# A lock of another machine is stale if untouched for this long. gcsfuse and NFS may show times that are a minute old.
STALE_SECONDS = 90.0


class Owner(pydantic.BaseModel):
    """The process that holds a lock.

    Attributes:
      host: name of its machine.
      machine: ids of the boot and the process namespace, within which id and start time identify a process; empty:
        unknown.
      process: its id.
      process_start: clock ticks from boot to its start.
      since: when it took the lock, to show to users.
      token: makes each owner unique.
    """

    host: str
    machine: str
    process: int
    process_start: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        """This process as an owner."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            process_start=_start_of(os.getpid()),
            since=since,
            token=secrets.token_hex(8),
        )

    def has_ended(self) -> bool | None:
        """True if the process has ended, None if this machine cannot tell."""
        if not self.machine or self.machine != _machine():
            return None
        return _start_of(self.process) != self.process_start


def _machine() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _start_of(process: int) -> int:
    """Clock ticks from boot to the start of a process; 0 if it does not exist."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    # The name in the second field may contain spaces and parentheses. The state is field 3, the start time field 22.
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` until the block ends.

    Args:
      path: the lock file. Its folder is created if needed.
      what: what it protects, for the error.

    Raises:
      UserError: another process holds it.
      OSError: the lock cannot be written or read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = Owner.this_process().model_dump_json()
    while not _create(path, mine):
        with contextlib.suppress(FileNotFoundError):  # it was removed just now
            text = path.read_text(errors="replace")
            _check_stale(path, text, what)
            if _take_over(path, text, mine):
                break
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(path, mine, what, ended), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _create(path: pathlib.Path, text: str) -> bool:
    """Creates the file with its content. False if it exists."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _check_stale(path: pathlib.Path, text: str, what: str) -> None:
    """Raises UserError, naming the owner, if the lock with this content is not stale."""
    try:
        owner = parse_json(text, Owner, path)
        ended = owner.has_ended()
        name = f"process {owner.process} on {owner.host} since {owner.since}"
    except UserError:
        ended, name = None, "an unknown process"
    if ended is None:
        touched = _touched(path)
        print(f"{what} is locked by {name}; waiting to see whether it is still running", file=sys.stderr, flush=True)
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline and _touched(path) == touched:
            time.sleep(1)
        ended = _touched(path) in (touched, None)
    if not ended:
        raise UserError(f"{what} is in use by {name}; wait for it, stop it, or choose another directory")


def _take_over(path: pathlib.Path, stale: str, mine: str) -> bool:
    """Replaces a stale lock. False if another process replaced it first, or overwrote this lock."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    beside.write_text(mine)
    if _read(path) != stale:
        beside.unlink()
        return False
    beside.replace(path)
    time.sleep(SETTLE_SECONDS)
    return _read(path) == mine


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _touched(path: pathlib.Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _keep(path: pathlib.Path, mine: str, what: str, ended: threading.Event) -> None:
    """Touches the lock until `ended` is set. If another process took it over, this one must not write, so it ends."""
    while not ended.wait(TOUCH_SECONDS):
        text = _read(path)
        if text is not None and text != mine:
            error = f"error: another process took over {what}, since this one stopped responding"
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        with contextlib.suppress(OSError):
            os.utime(path)
