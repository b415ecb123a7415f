"""Sockets whose other ends are in the same container: Unix ones with what is in their queues, UDP, TCP."""

import os
import socket
from collections.abc import Iterator

from harness import equal, kind

_WAIT = 10.0  # seconds, for what is there at once unless it is lost


def _ready(*socks: socket.socket) -> None:
    for sock in socks:
        sock.settimeout(_WAIT)


def _unix_pair(flavour: int) -> Iterator[None]:
    """Messages both ways and a descriptor of a pipe wait to be read."""
    one, other = socket.socketpair(socket.AF_UNIX, flavour)
    _ready(one, other)
    while True:
        reader, writer = os.pipe()
        one.send(b"first,")
        one.send(b"second")
        socket.send_fds(one, [b"a descriptor"], [reader])
        os.close(reader)
        other.send(b"back")
        yield
        text, fds = b"", []
        while len(text) < 24:  # of a stream, CRIU makes one piece of what waits
            piece, came, _, _ = socket.recv_fds(other, 100, 4)
            text, fds = text + piece, fds + came
        equal((text, len(fds)), (b"first,seconda descriptor", 1), "what waited, descriptors")
        os.write(writer, b"through the pipe")
        equal(os.read(fds[0], 100), b"through the pipe", "the descriptor")
        for fd in (writer, *fds):
            os.close(fd)
        equal(one.recv(100), b"back", "the other way")


@kind
def unix_stream() -> Iterator[None]:
    return _unix_pair(socket.SOCK_STREAM)


@kind
def unix_datagram() -> Iterator[None]:
    return _unix_pair(socket.SOCK_DGRAM)


@kind
def unix_seqpacket() -> Iterator[None]:
    return _unix_pair(socket.SOCK_SEQPACKET)


def _unix_listening(flavour: int, name: str) -> Iterator[None]:
    """One connection was accepted, one waits."""
    listener = socket.socket(socket.AF_UNIX, flavour)
    listener.bind(name)
    listener.listen(4)
    _ready(listener)
    first = socket.socket(socket.AF_UNIX, flavour)
    first.connect(name)
    accepted, _ = listener.accept()
    while True:
        second = socket.socket(socket.AF_UNIX, flavour)
        second.connect(name)
        _ready(first, second, accepted)
        accepted.send(b"held")
        yield
        equal(first.recv(100), b"held", "the accepted one")
        waited, _ = listener.accept()
        _ready(waited)
        second.send(b"hello")
        equal(waited.recv(100), b"hello", "the one that waited")
        with socket.socket(socket.AF_UNIX, flavour) as new:
            new.connect(name)
            listener.accept()[0].close()
        waited.close()
        second.close()


@kind
def unix_listening_stream() -> Iterator[None]:
    return _unix_listening(socket.SOCK_STREAM, "/tmp/listening-stream")


@kind
def unix_listening_seqpacket() -> Iterator[None]:
    return _unix_listening(socket.SOCK_SEQPACKET, "\0listening-seqpacket")


@kind
def unix_datagram_bound() -> Iterator[None]:
    """Reached by its name, and connected to by another."""
    name = "/tmp/bound-datagram"
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(name)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    connected.connect(name)
    _ready(bound)
    while True:
        connected.send(b"waits")
        yield
        equal(bound.recv(100), b"waits", "what waited")
        connected.send(b"by the connection")
        equal(bound.recv(100), b"by the connection")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as new:
            new.sendto(b"by the name", name)
        equal(bound.recv(100), b"by the name")


def _udp(family: int, address: str) -> Iterator[None]:
    """One bound to an address, one to a port of all addresses, one connected."""
    bound, wild, connected = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(3))
    bound.bind((address, 0))
    wild.bind(("", 0))
    connected.connect(bound.getsockname())
    _ready(bound, wild, connected)
    names = [sock.getsockname() for sock in (bound, wild, connected)]
    while True:
        yield
        equal([sock.getsockname() for sock in (bound, wild, connected)], names, "names")
        equal(connected.getpeername(), names[0], "the peer")
        connected.send(b"there")
        text, sender = bound.recvfrom(100)
        equal((text, sender), (b"there", names[2]), "what came")
        bound.sendto(b"back", sender)
        equal(connected.recv(100), b"back", "the answer")
        bound.sendto(b"to all", (address, names[1][1]))
        equal(wild.recv(100), b"to all", "at the wildcard")


@kind
def udp() -> Iterator[None]:
    return _udp(socket.AF_INET, "127.0.0.1")


@kind
def udp_ipv6() -> Iterator[None]:
    return _udp(socket.AF_INET6, "::1")


@kind
def udp_unread() -> Iterator[None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        sender.sendto(b"waits", receiver.getsockname())
    receiver.setblocking(False)
    yield
    equal(receiver.recv(100), b"waits")


def _tcp(family: int, address: str) -> Iterator[None]:
    """Both ends, with data that wait, and the listener."""
    listener = socket.create_server((address, 0), family=family)
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    _ready(listener, client, server)
    while True:
        client.sendall(b"there" * 10000)
        server.sendall(b"back")
        yield
        equal(server.recv(50000, socket.MSG_WAITALL), b"there" * 10000, "what waited")
        equal(client.recv(100), b"back", "the other way")
        with socket.create_connection(listener.getsockname()[:2]) as new:
            equal(listener.accept()[1], new.getsockname(), "a new one")


@kind
def tcp() -> Iterator[None]:
    return _tcp(socket.AF_INET, "127.0.0.1")


@kind
def tcp_ipv6() -> Iterator[None]:
    return _tcp(socket.AF_INET6, "::1")
