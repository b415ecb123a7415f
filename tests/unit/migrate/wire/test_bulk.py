"""Much data on a channel, sent to paramiko's own server: the other end decrypts with code that we have not written."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator

import paramiko
import pytest

from migrate.wire import bulk, ssh
from migrate.wire.known_hosts import Key, Known
from migrate.wire.packetizer import BATCH, Packetizer

TIMEOUT = 20.0


class Anyone(paramiko.ServerInterface):
    def check_auth_none(self, username: str) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED


class Link:
    """A client's channel, and the same channel at the server."""

    def __init__(self, cipher: str, largest: int = 32 << 10) -> None:
        key = paramiko.ECDSAKey.generate()
        near, far = socket.socketpair()
        self.server = paramiko.Transport(far)
        self.server.add_server_key(key)
        self.server.get_security_options().ciphers = (cipher,)
        self.server.default_max_packet_size = largest
        self.server.default_window_size = 1 << 20
        self.server.start_server(event=threading.Event(), server=Anyone())
        self.client = ssh._transport(Known(frozenset({Key(key.get_name(), key.asbytes())}), frozenset()), near)
        self.client.start_client(timeout=TIMEOUT)
        self.client.auth_none("anyone")
        self.near = self.client.open_session(timeout=TIMEOUT)
        accepted = self.server.accept(TIMEOUT)
        assert accepted is not None
        self.far = accepted
        self.near.settimeout(TIMEOUT)
        self.far.settimeout(TIMEOUT)
        self.received = hashlib.sha256()
        self.size = 0
        self._reader = threading.Thread(target=self._read)

    def read(self) -> None:
        self._reader.start()

    def _read(self) -> None:
        while data := self.far.recv(1 << 20):
            self.received.update(data)
            self.size += len(data)

    def finish(self) -> str:
        self.near.shutdown_write()
        self._reader.join(TIMEOUT)
        assert not self._reader.is_alive()
        return self.received.hexdigest()

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self._reader.join(TIMEOUT) if self._reader.ident else None


@pytest.fixture
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(*getattr(request, "param", ("aes128-gcm@openssh.com",)))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("link", "is_fast"),
    [(("aes128-gcm@openssh.com",), True), (("aes256-gcm@openssh.com", 40_000), True), (("aes128-ctr",), False)],
    ids=["aes128-gcm", "aes256-gcm", "aes128-ctr"],
    indirect=["link"],
)
def test_everything_arrives_in_order(link: Link, is_fast: bool) -> None:
    assert isinstance(link.client.packetizer, Packetizer)
    assert link.client.packetizer.sends_data is is_fast
    link.read()
    sent = hashlib.sha256()
    largest = link.near.out_max_packet_size - 64
    for size in (1, 15, 16, 17, largest - 1, largest, largest + 1, BATCH * largest, BATCH * largest + 1, 3 << 20):
        parts = [os.urandom(5), memoryview(os.urandom(size)), bytearray(b"x" * (size % 7)), b""]
        for part in parts:
            sent.update(part)
        bulk.send(link.near, *parts)
        link.near.sendall(b"between")  # paramiko's own way, with the same counters
        sent.update(b"between")
    assert link.finish() == sent.hexdigest()


def test_keys_are_exchanged_anew_meanwhile(link: Link) -> None:
    link.client.packetizer.REKEY_BYTES = 1 << 20
    first = link.client.H
    link.read()
    data = os.urandom(1 << 20)
    sent = hashlib.sha256()
    for _ in range(16):
        bulk.send(link.near, data)
        sent.update(data)
    assert link.finish() == sent.hexdigest()
    assert first != link.client.H, "no keys were exchanged"


def test_an_end_that_takes_nothing_is_noticed(link: Link) -> None:
    link.near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        bulk.send(link.near, bytes(4 << 20))  # the window is 1 MiB, and nobody reads


def test_a_closed_channel_is_an_error(link: Link) -> None:
    link.near.close()
    with pytest.raises(OSError, match="closed"):
        bulk.send(link.near, bytes(1 << 20))


def test_a_lost_connection_is_an_error(link: Link) -> None:
    link.server.close()
    with pytest.raises((OSError, EOFError, paramiko.SSHException)):
        bulk.send(link.near, bytes(8 << 20))
