"""What was typed and not read, on real pseudo terminals; detach keys."""

import fcntl
import os
import pty
import select
import termios
import tty
from collections.abc import Iterator

import pytest

from migrate.commands.attach import parse_keys
from migrate.errors import UsageError
from runtime.monitor import typeahead
from runtime.monitor.attach import DetachKeys
from runtime.monitor.clients import TIOCGPTPEER


class Pair:
    """A master, and two descriptors of its slave: a program's, and a non-blocking one of the monitor's."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.peer = fcntl.ioctl(self.master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        os.set_blocking(self.master, False)

    def settle(self) -> None:
        """Wait until what was written to the master has arrived."""
        assert select.select([self.slave], [], [], 10)[0]

    def read(self) -> bytes:
        return os.read(self.peer, 1 << 16)

    def echo(self) -> bytes:
        try:
            return os.read(self.master, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        for fd in (self.peer, self.slave, self.master):
            os.close(fd)


@pytest.fixture
def pairs() -> Iterator[tuple[Pair, Pair]]:
    first, second = Pair(), Pair()
    yield first, second
    first.close()
    second.close()


def carry(source: Pair, target: Pair) -> bytes:
    """As a move does: the settings are CRIU's business, the rest is ours. Returns what was taken."""
    before = termios.tcgetattr(source.slave)
    taken = typeahead.take(source.peer)
    assert termios.tcgetattr(source.slave) == before
    termios.tcsetattr(target.slave, termios.TCSANOW, before)
    typeahead.put(target.master, target.peer, taken)
    assert termios.tcgetattr(target.slave) == before
    assert target.echo() == b""  # it was shown where it was typed
    return taken


@pytest.mark.parametrize(
    ("typed", "more", "lines"),
    [
        (b"one\ntwo\nthr", b"\x7free\n", [b"one\n", b"two\n", b"three\n"]),
        (b"\x16\x03a\x16\x7fb\nc", b"\n", [b"\x03a\x7fb\n", b"c\n"]),
        (b"line\n\x04rest", b"\n", [b"line\n", b"", b"rest\n"]),
        (b"no newline\x04", b"x\n", [b"no newline", b"x\n"]),
        (b"x" * 3000 + b"\n" + b"y" * 500, b"\n", [b"x" * 3000 + b"\n", b"y" * 500 + b"\n"]),
        (b"", b"x\n", [b"x\n"]),
    ],
    ids=["unfinished line", "quoted", "end of file", "line without newline", "long", "nothing"],
)
def test_lines_are_as_they_were(pairs: tuple[Pair, Pair], typed: bytes, more: bytes, lines: list[bytes]) -> None:
    source, target = pairs
    os.write(source.master, typed)
    carry(source, target)
    with pytest.raises(BlockingIOError):
        source.read()
    os.write(target.master, more)
    target.settle()
    assert [target.read() for _ in lines] == lines


def test_raw_keys_mean_nothing_on_the_way(pairs: tuple[Pair, Pair]) -> None:
    source, target = pairs
    tty.setraw(source.slave)
    keys = bytes(range(256)) * 40  # more than fits into the line discipline: the rest waits before it
    sent = os.write(source.master, keys)
    assert carry(source, target) == keys[:sent]
    found = b""
    while len(found) < sent:
        target.settle()
        found += target.read()
    assert found == keys[:sent]


@pytest.mark.parametrize(
    ("pieces", "handed_on", "over"),
    [
        ([b"abc"], b"abc", False),
        ([b"ab\x10\x11cd"], b"ab", True),
        ([b"ab\x10", b"\x11"], b"ab", True),
        ([b"\x10x"], b"\x10x", False),
        ([b"\x10\x10\x11"], b"\x10", True),
        ([b"\x10"], b"", False),
    ],
)
def test_detach_keys(pieces: list[bytes], handed_on: bytes, over: bool) -> None:
    keys = DetachKeys(parse_keys("ctrl-p,ctrl-q"))
    results = [keys.feed(piece) for piece in pieces]
    assert (b"".join(data for data, _ in results), results[-1][1]) == (handed_on, over)


def test_names_of_keys() -> None:
    assert parse_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert parse_keys("ctrl-@,ctrl-[,x") == b"\x00\x1bx"
    assert parse_keys("") == b""
    assert DetachKeys(b"").feed(b"\x10\x11") == (b"\x10\x11", False)
    for text in ("ctrl-", "ctrl-1", "xy", "a,,b", "ctrl-é"):
        with pytest.raises(UsageError):
            parse_keys(text)
