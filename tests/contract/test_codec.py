"""Payloads with memory that a hostile or broken source can send."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ProtocolError
from migrate.model import Compression
from migrate.wire import zstd
from migrate.wire.codec import MAX_BODY, ZSTD, Packer, Unpacker

pytestmark = pytest.mark.skipif(not zstd.is_available(), reason="libzstd1 is missing")


def packed(body: bytes) -> bytes:
    return b"".join(Packer(Compression.ZSTD).pack(body))


@given(st.binary(max_size=3000) | st.integers(1, 3000).map(bytes), st.sampled_from(Compression))
def test_what_was_packed_comes_back(body: bytes, compress: Compression) -> None:
    assert Unpacker().unpack(b"".join(Packer(compress).pack(body))) == body


@pytest.mark.parametrize("payload", [b"", b"\2", b"\xff" + bytes(100), b"\1", b"\1\0\0\0"])
def test_an_unknown_form_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="in an unknown form"):
        Unpacker().unpack(payload)


@pytest.mark.parametrize("size", [0, MAX_BODY + 1, 1 << 31, (1 << 32) - 1])
def test_no_room_is_made_for_an_absurd_size(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"claims {size} bytes"):
        Unpacker().unpack(struct.pack(">BI", ZSTD, size) + packed(bytes(5000))[5:])


@pytest.mark.parametrize("size", [1, 4999, 5001, MAX_BODY])
def test_a_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="compressed piece of memory"):
        Unpacker().unpack(struct.pack(">BI", ZSTD, size) + packed(bytes(5000))[5:])


@given(st.binary(max_size=300))
def test_garbage_is_an_error_of_the_source(payload: bytes) -> None:
    """Nothing but ProtocolError, and never more than was claimed."""
    try:
        body = Unpacker().unpack(bytes([ZSTD]) + payload)
    except ProtocolError:
        return
    assert len(body) == struct.unpack_from(">I", payload)[0]


def test_a_flipped_bit_is_found_here_or_by_the_digest() -> None:
    good = packed(os.urandom(3000) * 2)
    for at in range(5, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 1
        try:
            assert len(Unpacker().unpack(bad)) == 6000
        except ProtocolError:
            continue


def test_a_target_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = packed(bytes(5000))
    monkeypatch.setattr(zstd, "_zstd", lambda: None)
    with pytest.raises(ProtocolError, match=r"libzstd\.so\.1 is missing here"):
        Unpacker().unpack(payload)
    assert Unpacker().unpack(b"\0abc") == b"abc"
