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

PING_SECONDS = 5.0
SILENT_SECONDS = 45.0
PING, DONE, LOST = b".", b"D", b"L"
_MESSAGE = struct.Struct("!cI")  # kind, and the number of a process
_INVITATION = struct.Struct("!32s32sI")  # token, host and port of process 0

_watch: "_Watch | None" = None


def watch(host: str) -> None:
    """Starts to watch the other processes. All of them must call it.

    Args:
      host: the address at which the others reach process 0; used only in process 0.
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
        listener = socket.create_server(("", 0)) if index == 0 else None
        port = listener.getsockname()[1] if listener else 0
        invitation = _INVITATION.pack(secrets.token_bytes(32), host.encode(), port)
        shared = multihost_utils.broadcast_one_to_all(np.frombuffer(invitation, np.uint8))
        token, host_bytes, port = _INVITATION.unpack(np.asarray(shared).tobytes())
        self._is_done = False
        self._lock = threading.Lock()
        if listener:
            self._peers = _accept(listener, token, count - 1)
        else:
            connection = socket.create_connection((host_bytes.rstrip(b"\0").decode(), port), SILENT_SECONDS)
            connection.sendall(token + struct.pack("!I", index))
            self._peers = {0: connection}
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


def _accept(listener: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """Connections from `count` processes that know the token, by process number."""
    peers: dict[int, socket.socket] = {}
    while len(peers) < count:
        connection, _ = listener.accept()
        connection.settimeout(SILENT_SECONDS)
        greeting = connection.recv(len(token) + 4, socket.MSG_WAITALL)
        if greeting[: len(token)] == token:
            peers[struct.unpack("!I", greeting[len(token) :])[0]] = connection
        else:
            connection.close()
    listener.close()
    return peers
