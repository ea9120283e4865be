"""Notice within seconds that another process of the run has died, and end with one line that names it.

Every process keeps a connection to process 0. A process is gone if its connection closes before the process reports
that it is done, or stays silent for too long.
"""

import contextlib
import os
import secrets
import socket
import struct
import sys
import threading
import time
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from rho1_jax.runtime.errors import UserError

PING_SECONDS = 5.0
SILENT_SECONDS = 45.0
GREETING_SECONDS = 5.0
SAME_ERROR_SECONDS = 3.0
PING, DONE, LOST = b".", b"D", b"L"
_MESSAGE = struct.Struct("!cI")  # kind, and the number of a process
_INVITATION = struct.Struct("!32sI")  # token, and port of process 0

_REMEDY = "let the machines of the run reach each other on all TCP ports"

_watch: "_Watch | None" = None


def watch(host: str) -> None:
    """Starts to watch the other processes. All of them must call it.

    Args:
      host: where this process reaches process 0.

    Raises:
      UserError: a connection between a process and process 0 cannot be made.
    """
    global _watch
    _watch = _Watch(host)


def done() -> None:
    """Reports that the command ended normally. In process 0, it waits until all others have reported it."""
    if _watch:
        _watch.done()


def leave(status: int) -> NoReturn:
    """Exits with a status. In a run of several processes, it skips the teardown, whose barrier nobody would reach."""
    if _watch:
        sys.stdout.flush()
        _watch.leave()
        os._exit(status)
    sys.exit(status)


def wait_for_verdict() -> None:
    """Waits after an error that another process may have caused. If one is gone, this process ends with that line."""
    if _watch:
        time.sleep(PING_SECONDS)


class _Watch:
    """The connections of one process: in process 0 to all others, elsewhere to process 0."""

    def __init__(self, host: str):
        index, count = jax.process_index(), jax.process_count()
        listener = _listen() if index == 0 else None
        port = listener.getsockname()[1] if listener else 0
        invitation = _INVITATION.pack(secrets.token_bytes(32), port)
        shared = multihost_utils.broadcast_one_to_all(np.frombuffer(invitation, np.uint8))
        token, port = _INVITATION.unpack(np.asarray(shared).tobytes())
        self._is_done = False
        self._lock = threading.Lock()
        if listener:
            self._peers = _accept(listener, token, count - 1)
        else:
            self._peers = {0: _connect(host, port, token, index)}
        self._readers = []
        for number, connection in self._peers.items():
            connection.settimeout(SILENT_SECONDS)
            self._readers.append(threading.Thread(target=self._read, args=(number, connection), daemon=True))
            self._readers[-1].start()
        threading.Thread(target=self._ping, daemon=True).start()

    def done(self) -> None:
        if jax.process_index() == 0:  # it runs the service that the others sign off from
            for reader in self._readers:
                reader.join()
            self._send(DONE, 0)
        else:
            jax.distributed.shutdown()
            self._send(DONE, jax.process_index())
        self._is_done = True

    def leave(self) -> None:
        """Lets processes that meet the same error as process 0 learn from its service that it was printed."""
        self._is_done = True
        deadline = time.monotonic() + SAME_ERROR_SECONDS
        for reader in self._readers if jax.process_index() == 0 else ():
            reader.join(max(0, deadline - time.monotonic()))

    def _send(self, kind: bytes, number: int) -> None:
        with self._lock:
            for connection in self._peers.values():
                with contextlib.suppress(OSError):
                    connection.sendall(_MESSAGE.pack(kind, number))

    def _ping(self) -> None:
        while not self._is_done:
            self._send(PING, 0)
            time.sleep(PING_SECONDS)

    def _read(self, number: int, connection: socket.socket) -> None:
        """Reads the messages of one process until it is done or gone."""
        kind, lost = PING, number
        while kind == PING:
            try:
                message = connection.recv(_MESSAGE.size, socket.MSG_WAITALL)
            except OSError:
                message = b""
            kind, lost = _MESSAGE.unpack(message) if len(message) == _MESSAGE.size else (LOST, number)
        if kind == LOST and not self._is_done:
            self._send(LOST, lost)
            text = f"error: process {lost} has ended early; see its output, and start all processes again to resume"
            print(text, file=sys.stderr, flush=True)
            os._exit(1)


def _listen() -> socket.socket:
    """A socket on a free port, for IPv4 and, where the machine has it, IPv6."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _connect(host: str, port: int, token: bytes, index: int) -> socket.socket:
    """A connection to process 0. Raises UserError if it cannot be made."""
    try:
        connection = socket.create_connection((host, port), SILENT_SECONDS)
        connection.sendall(token + struct.pack("!I", index))
    except OSError as error:
        raise UserError(f"process {index} cannot reach process 0 at {host}:{port}: {error}; {_REMEDY}") from None
    return connection


def _accept(listener: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """Connections from `count` processes that know the token, by process number. Raises UserError if one is missing."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + SILENT_SECONDS
    while len(peers) < count:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = ", ".join(str(number) for number in range(1, count + 1) if number not in peers)
            port = listener.getsockname()[1]
            raise UserError(f"process 0 has waited in vain for {missing} on port {port}; {_REMEDY}") from None
        connection.settimeout(GREETING_SECONDS)
        with contextlib.suppress(OSError):  # a stranger that says nothing
            greeting = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if len(greeting) == len(token) + 4 and secrets.compare_digest(greeting[: len(token)], token):
                peers[struct.unpack("!I", greeting[len(token) :])[0]] = connection
                continue
        connection.close()
    listener.close()
    return peers
