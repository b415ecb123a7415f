"""Digests of what travels, against known values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ProtocolError
from migrate.wire import digests

needs_xxhash = pytest.mark.skipif(digests.XXH3 not in digests.available(), reason="libxxhash0 is missing")


@needs_xxhash
@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", "99aa06d3014798d86001c324468d497f"), (b"hello world", "df8d09e93f874900a99b8775cc15b6c7")],
)
def test_xxh3_is_that_of_xxh128sum(data: bytes, expected: str) -> None:
    digest = digests.new(digests.XXH3)
    digest.update(data)
    assert digest.hexdigest() == expected


def test_crc32_is_that_of_zlib() -> None:
    digest = digests.new(digests.CRC32)
    digest.update(b"123456789")
    assert digest.hexdigest() == "cbf43926"


@pytest.mark.parametrize("name", digests.available())
@given(data=st.binary(max_size=2000), cut=st.integers(0, 2000))
def test_pieces_of_any_kind_count_as_the_whole(name: str, data: bytes, cut: int) -> None:
    whole, pieces = digests.new(name), digests.new(name)
    whole.update(data)
    pieces.update(memoryview(data)[:cut])
    pieces.update(bytearray(data[cut:]))
    assert pieces.hexdigest() == whole.hexdigest()


def test_both_ends_agree_on_what_both_have() -> None:
    assert digests.agree(digests.available()) == digests.available()[0]
    assert digests.agree([digests.CRC32]) == digests.CRC32
    assert digests.agree([]) == digests.CRC32
    assert digests.agree(["md5"]) == digests.CRC32


def test_without_the_library_there_is_crc32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_xxhash", lambda: None)
    assert digests.available() == (digests.CRC32,)
    assert digests.agree([digests.XXH3, digests.CRC32]) == digests.CRC32
    with pytest.raises(ProtocolError, match="xxh3-128"):
        digests.new(digests.XXH3)


@pytest.mark.parametrize("name", ["", "sha256", "x" * 1000])
def test_an_unknown_digest_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be computed here"):
        digests.new(name)
