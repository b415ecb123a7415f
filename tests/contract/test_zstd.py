"""Compressed pieces of memory that are damaged, or made to fill the target's memory."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrateError, ProtocolError
from migrate.wire import zstd

pytestmark = pytest.mark.skipif(not zstd.is_available(), reason="libzstd1 is missing")
MIB = 1 << 20


def compressed(data: bytes) -> bytes:
    room = bytearray(zstd.bound(len(data)))
    return bytes(room[: zstd.Compressor().compress(data, room)])


@given(st.binary(max_size=5000), st.sampled_from([1, -1, -5]))
def test_what_was_compressed_comes_back(data: bytes, level: int) -> None:
    room = bytearray(zstd.bound(len(data)))
    size = zstd.Compressor().compress(memoryview(data), memoryview(room), level)
    found = bytearray(len(data))
    zstd.Decompressor().decompress(memoryview(room)[:size], found)
    assert found == data


def test_a_context_serves_many_frames() -> None:
    compressor, decompressor, room = zstd.Compressor(), zstd.Decompressor(), bytearray(zstd.bound(MIB))
    for number in range(5):
        data = os.urandom(100) * (number + 1) * 50
        size = compressor.compress(data, room)
        assert size < len(data)
        found = bytearray(len(data))
        decompressor.decompress(memoryview(room)[:size], found)
        assert found == data


def test_what_does_not_fit_is_not_cut() -> None:
    assert zstd.Compressor().compress(os.urandom(1000), bytearray(500)) == 0


@pytest.mark.parametrize("frame", [b"", b"x", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + bytes(50), os.urandom(5000)])
def test_garbage_is_refused_and_the_context_stays_good(frame: bytes) -> None:
    decompressor, found = zstd.Decompressor(), bytearray(5000)
    with pytest.raises(ProtocolError, match="compressed piece of memory"):
        decompressor.decompress(frame, found)
    decompressor.decompress(compressed(b"y" * 5000), found)
    assert found == b"y" * 5000


def test_a_frame_that_is_cut_short_is_refused() -> None:
    with pytest.raises(ProtocolError, match="cannot be decompressed"):
        zstd.Decompressor().decompress(compressed(bytes(5000))[:-1], bytearray(5000))


@pytest.mark.parametrize("size", [0, 1, 4999, 5001, MIB])
def test_a_frame_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=r"Destination buffer is too small|has 5000 bytes, not"):
        zstd.Decompressor().decompress(compressed(bytes(5000)), bytearray(size))


def test_a_bomb_fills_no_more_than_the_room() -> None:
    bomb = compressed(bytes(256 * MIB))
    assert len(bomb) < 256 << 10
    room = bytearray(b"-" * (MIB + 100))
    with pytest.raises(ProtocolError, match="too small"):
        zstd.Decompressor().decompress(bomb, memoryview(room)[:MIB])
    assert room[MIB:] == b"-" * 100


def test_without_the_library_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd, "_zstd", lambda: None)
    assert not zstd.is_available()
    with pytest.raises(MigrateError, match=r"libzstd\.so\.1 is missing here"):
        zstd.Compressor()
