"""The connections between the processes of a run: who is let in, and what is said if one cannot be made."""

import socket
import struct
import threading

import pytest

from rho1_jax.runtime import peers
from rho1_jax.runtime.errors import UserError

TOKEN = b"t" * 32


@pytest.fixture
def listener():
    with peers._listen() as listener:
        yield listener


def accept(listener, count):
    """The numbers of the processes that were let in."""
    accepted = {}
    thread = threading.Thread(target=lambda: accepted.update(peers._accept(listener, TOKEN, count)))
    thread.start()
    return thread, accepted


def test_strangers_are_not_let_in_and_do_not_end_the_run(listener, monkeypatch):
    monkeypatch.setattr(peers, "GREETING_SECONDS", 0.2)
    port = listener.getsockname()[1]
    thread, accepted = accept(listener, 2)
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    strangers[1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")  # as long as a greeting
    strangers[2].sendall(TOKEN)
    strangers[2].shutdown(socket.SHUT_WR)
    processes = [peers._connect("localhost", port, TOKEN, number) for number in (2, 1)]
    thread.join(20)
    assert not thread.is_alive() and sorted(accepted) == [1, 2]
    for connection in (*strangers, *processes, *accepted.values()):
        connection.close()


def test_a_process_that_cannot_be_reached_is_named(listener, monkeypatch):
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.5)
    port = listener.getsockname()[1]
    with (
        socket.create_connection(("localhost", port)) as other,
        pytest.raises(UserError, match=f"process 0 has waited in vain for 1, 3 on port {port}; let the machines"),
    ):
        other.sendall(TOKEN + struct.pack("!I", 2))
        peers._accept(listener, TOKEN, 3)
    listener.close()
    with pytest.raises(UserError, match=f"process 3 cannot reach process 0 at localhost:{port}: .*refused; let the"):
        peers._connect("localhost", port, TOKEN, 3)
