"""Following CRIU's page stream, in whatever pieces it comes, in both of its formats."""

import resource
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ProtocolError
from migrate.wire.carrier import Carrier
from migrate.wire.codec import Unpacker
from migrate.wire.native import Buffer
from migrate.wire.pages import PageRelay, PageStream
from migrate.wire.protocol import PagesEnd

PAGE = resource.getpagesize()
FORMATS = {(4, 2, 1): "=I4xQQQ", (4, 1, 1): "=IIQQ"}
PRESENT, LAZY = 1 << 2, 1 << 1


def record(version: tuple[int, ...], command: int, pages: int = 0, flags: int = 0) -> bytes:
    return struct.pack(FORMATS[version], command | flags << 16, pages, 0x1000, 1)


def dump(version: tuple[int, ...]) -> tuple[bytes, bytes]:
    """A stream of two tasks and the answers that CRIU waits for. The pages look like records on purpose."""
    trap = (record(version, 0x1023) * PAGE)[: 3 * PAGE]
    parts = [
        (record(version, 5), b"\0\0\0\0"),
        (record(version, 4), b"\0"),
        (record(version, 6, 3, PRESENT) + trap, b""),
        (record(version, 6, 9, LAZY), b""),
        (record(version, 1, 1) + trap[:PAGE], b""),
        (record(version, 4), b"\0"),
        (record(version, 2, 7), b""),
        (record(version, 0x1024), b"\0\0\0\0"),
    ]
    return b"".join(part for part, _ in parts), b"".join(answer for _, answer in parts)


@pytest.mark.parametrize("version", FORMATS)
@given(size=st.integers(1, 9000))
def test_answers_come_whatever_the_pieces(version: tuple[int, ...], size: int) -> None:
    data, expected = dump(version)
    stream = PageStream(version)
    answers = b"".join(stream.feed(data[start : start + size]) for start in range(0, len(data), size))
    assert answers == expected


def test_a_stream_of_the_other_version_is_noticed() -> None:
    data, _ = dump((4, 1, 1))
    with pytest.raises(ProtocolError, match="unknown kind"):
        PageStream((4, 2, 1)).feed(data)


def test_relay_counts_and_answers() -> None:
    data, expected = dump((4, 2, 1))
    sent = bytearray()
    carrier = Carrier(lambda payload: sent.extend(Unpacker().unpack(b"".join(payload))))
    relay = PageRelay((4, 2, 1), carrier, lambda _: None)
    relay.start()
    relay.criu_end.sendall(data)
    relay.criu_end.settimeout(10)
    got = b""
    while len(got) < len(expected):
        got += relay.criu_end.recv(100)
    relay.criu_end.close()
    end = relay.finish(60)
    relay.close()
    assert (bytes(sent), got, end) == (data, expected, PagesEnd(len(data), f"{zlib.crc32(data):08x}"))


def test_relay_that_cannot_send_fails_criu_at_once() -> None:
    def broken(_: tuple[Buffer, ...]) -> None:
        raise OSError("gone")

    carrier = Carrier(broken)
    relay = PageRelay((4, 2, 1), carrier, lambda _: None)
    relay.start()
    relay.criu_end.settimeout(10)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # the first piece fails on the carrier's thread
        relay.criu_end.sendall(record((4, 2, 1), 2) * 10_000_000)
    with pytest.raises(OSError, match="gone"):
        relay.finish(60)
    relay.close()
