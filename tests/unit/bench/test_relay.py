"""The relay that delays a link, between sockets of its own."""

import os
import socket
import threading
import time

from tests.bench.relay import Direction, relay

PATIENCE = 20.0
DELAY = 0.05


def pair() -> tuple[socket.socket, socket.socket]:
    """A link: what the host has of it, and what the relay has."""
    host, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    host.settimeout(PATIENCE)
    link.setblocking(False)
    return host, link


def test_frames_arrive_in_order_and_not_before_their_time() -> None:
    (left, first), (right, second) = pair(), pair()
    reading, writing = os.pipe()
    thread = threading.Thread(target=relay, args=(DELAY, first, second, reading))
    thread.start()
    try:
        began = time.monotonic()
        for number in range(100):
            left.send(b"%d" % number)
        assert [right.recv(64) for _ in range(100)] == [b"%d" % number for number in range(100)]
        assert time.monotonic() - began >= DELAY
        right.send(b"back")
        assert left.recv(64) == b"back"
        assert time.monotonic() - began >= 2 * DELAY
    finally:
        os.close(writing)
        thread.join(PATIENCE)
        assert not thread.is_alive()  # it ends with what it was given as its stdin
        os.close(reading)
        for sock in (left, first, right, second):
            sock.close()


def test_a_full_link_loses_frames_and_nothing_else() -> None:
    (left, first), (right, second) = pair(), pair()
    direction = Direction(first, second, 0.0)
    left.setblocking(False)
    sent = 0
    for _ in range(50):
        try:
            while True:
                left.send(b"frame")
                sent += 1
        except BlockingIOError:
            direction.read(0.0)
            direction.send(0.0)
    right.setblocking(False)
    arrived = 0
    try:
        while right.recv(64) == b"frame":
            arrived += 1
    except BlockingIOError:
        pass
    assert 0 < arrived < sent
    assert direction.due() is None
    for sock in (left, first, right, second):
        sock.close()
