"""A host that is not an sshd at all, or one that keeps to no window: what it can make us hold is bounded."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import paramiko
import pytest
from paramiko.common import cMSG_CHANNEL_DATA, cMSG_CHANNEL_EXTENDED_DATA

from migrate.wire import ssh
from migrate.wire.known_hosts import Known

PATIENCE = 20.0
BANNER = b"SSH-2.0-x\r\n"


@contextmanager
def connected(serve: Callable[[socket.socket], None]) -> Iterator[tuple[paramiko.Transport, socket.socket]]:
    """Our transport, with `serve` in a thread at the other end."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            try:
                serve(theirs)
            except (OSError, EOFError):
                return  # we have hung up

    thread = threading.Thread(target=run)
    thread.start()
    transport = ssh._transport(Known((), frozenset()), ours)
    try:
        yield transport, theirs
    finally:
        transport.close()
        ours.close()
        thread.join(PATIENCE)


def greet(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"x" * 100)


def claim(sock: socket.socket) -> None:
    """A packet of almost 4 GiB."""
    sock.sendall(BANNER + (0xFFFFFFF4).to_bytes(4, "big") + bytes(1 << 20))
    while True:
        sock.sendall(bytes(1 << 20))


@pytest.mark.parametrize(("serve", "words"), [(greet, "its greeting is longer"), (claim, "is over the limit")])
def test_before_anything_is_encrypted(serve: Callable[[socket.socket], None], words: str) -> None:
    with connected(serve) as (transport, _), pytest.raises(paramiko.SSHException, match=words):
        transport.start_client(timeout=PATIENCE)


class _Server(paramiko.ServerInterface):
    def check_auth_none(self, username: str) -> int:
        return 0

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return 0


@pytest.mark.parametrize("kind", [cMSG_CHANNEL_DATA, cMSG_CHANNEL_EXTENDED_DATA], ids=["stdout", "stderr"])
def test_more_than_the_window(kind: bytes) -> None:
    ended = threading.Event()
    sent = 0

    def serve(sock: socket.socket) -> None:
        nonlocal sent
        server = paramiko.Transport(sock)
        server.add_server_key(paramiko.ECDSAKey.generate())
        server.start_server(server=_Server())
        channel = server.accept(PATIENCE)
        while channel is not None and sent < 64 << 20 and not ended.is_set():
            message = paramiko.Message()
            message.add_byte(kind)
            message.add_int(channel.remote_chanid)
            if kind == cMSG_CHANNEL_EXTENDED_DATA:
                message.add_int(1)
            message.add_string(os.urandom(1 << 15))
            server._send_user_message(message)  # type: ignore[attr-defined]
            sent += 1 << 15
        server.close()

    with connected(serve) as (transport, _):
        transport.start_client(timeout=PATIENCE)
        transport.auth_none("root")
        channel = transport.open_session(timeout=PATIENCE)
        transport.join(PATIENCE)
        ended.set()
        assert not transport.is_active()
        held = len(channel.in_buffer) + len(channel.in_stderr_buffer)
        assert ssh.WINDOW < held < ssh.WINDOW + (1 << 20)
        assert "more than the channel's window" in str(transport.get_exception())
