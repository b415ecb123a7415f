"""Following CRIU's page stream, in whatever pieces it comes, in both of its formats."""

import contextlib
import ctypes
import mmap
import os
import resource
import struct
import tempfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import ProtocolError
from migrate.memory.clean_pages import CleanPages
from migrate.wire.carrier import Carrier
from migrate.wire.codec import Unpacker
from migrate.wire.native import Buffer
from migrate.wire.pages import PageRelay, PageStream
from migrate.wire.protocol import PagesEnd

PAGE = resource.getpagesize()
FORMATS = {(4, 2, 1): "=I4xQQQ", (4, 1, 1): "=IIQQ"}
PRESENT, LAZY, HOLE = 1 << 2, 1 << 1, 1


def record(
    version: tuple[int, ...], command: int, pages: int = 0, flags: int = 0, start: int = 0x1000, kind: int = 1
) -> bytes:
    return struct.pack(FORMATS[version], command | flags << 16, pages, start, kind)


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
@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9000))
def test_answers_come_whatever_the_pieces(version: tuple[int, ...], size: int) -> None:
    data, expected = dump(version)
    passed: list[Buffer] = []
    stream = PageStream(version, passed.append)
    answers = b"".join(stream.feed(data[start : start + size]) for start in range(0, len(data), size))
    assert answers == expected
    assert b"".join(passed) == data


def test_a_stream_of_the_other_version_is_noticed() -> None:
    data, _ = dump((4, 1, 1))
    with pytest.raises(ProtocolError, match="unknown kind"):
        PageStream((4, 2, 1), lambda _: None).feed(data)


def map_file(address: int, file: int) -> None:
    """Map a page of a file, privately, in place of what is there."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    flags = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
    assert call(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0) == address


@pytest.mark.parametrize("version", FORMATS)
@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9000))
def test_holes_become_what_criu_would_have_sent(version: tuple[int, ...], size: int) -> None:
    """Of this process: memory that may be lazy, a written page of a file, and both as one hole."""
    room = mmap.mmap(-1, 5 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with tempfile.TemporaryFile() as file, contextlib.closing(room):
        file.write(bytes(5 * PAGE))
        file.flush()
        view = ctypes.c_char.from_buffer(room)
        start = ctypes.addressof(view)
        del view
        map_file(start + 2 * PAGE, file.fileno())
        room[2 * PAGE : 3 * PAGE] = b"written!" * (PAGE // 8)
        clean = CleanPages(lambda: clean.know({0: os.getpid()}))
        passed: list[Buffer] = []
        stream = PageStream(version, passed.append, clean)
        before = record(version, 6, 1, PRESENT) + bytes(PAGE)
        data = record(version, 4) + before + record(version, 6, 5, HOLE, start) + record(version, 6, 9, LAZY)
        answers = b"".join(stream.feed(data[at : at + size]) for at in range(0, len(data), size))
        eager = start + 2 * PAGE
        expected = [
            record(version, 4), before, record(version, 6, 2, LAZY, start),
            record(version, 6, 1, PRESENT, eager), b"written!" * (PAGE // 8),
            record(version, 6, 2, LAZY, start + 3 * PAGE), record(version, 6, 9, LAZY),
        ]  # fmt: skip
        assert b"".join(passed) == b"".join(expected)
        assert answers == b"\1"
        assert stream.lazy == {0: [(start, eager), (start + 3 * PAGE, start + 5 * PAGE), (0x1000, 0x1000 + 9 * PAGE)]}


def test_a_parent_is_claimed_only_where_holes_can_be_filled() -> None:
    """Not for shared memory, an unknown process, or one with locked memory, which CRIU restores eagerly."""
    process, shared = 1, 2
    clean = CleanPages(lambda: clean.know({0: os.getpid()}))
    stream = PageStream((4, 2, 1), lambda _: None, clean)
    asked = (process, shared, process | 5 << 8)
    assert stream.feed(b"".join(record((4, 2, 1), 4, kind=kind) for kind in asked)) == b"\1\0\0"
    libc = ctypes.CDLL(None)
    page = ctypes.create_string_buffer(PAGE)
    assert libc.mlock(page, PAGE) == 0
    try:
        assert stream.feed(record((4, 2, 1), 4)) == b"\0"
    finally:
        libc.munlock(page, PAGE)


def test_a_hole_without_a_claim_is_an_error() -> None:
    clean = CleanPages(lambda: clean.know({}))
    stream = PageStream((4, 2, 1), lambda _: None, clean)
    assert stream.feed(record((4, 2, 1), 4)) == b"\0"
    with pytest.raises(ProtocolError, match="no parent"):
        stream.feed(record((4, 2, 1), 6, 1, HOLE))


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
