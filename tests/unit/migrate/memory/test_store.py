"""The layout of memory on the wire and the store, against a plain dictionary of pages."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout, store
from migrate.memory.layout import BLOCK, PAGE, ZERO

BASE = 0x7F0000000000
PAGES = st.integers(0, 3 * layout.BLOCK_PAGES)
RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=8)


def body(space: int, words: list[int], data: bytes = b"") -> bytes:
    return layout.head(space, words) + data


def ranges(spans: list[tuple[int, int]]) -> list[layout.Range]:
    return layout.unite((start, start + length) for start, length in spans)


@given(RANGES, RANGES)
def test_subtract(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    def points(spans: list[layout.Range]) -> set[int]:
        return {point for start, end in spans for point in range(start, end)}

    first, second = ranges(left), ranges(right)
    found = layout.subtract(first, second)
    assert points(found) == points(first) - points(second)
    assert found == sorted(found)
    assert layout.size(found) == len(points(found))


def test_split_at_the_borders_of_blocks() -> None:
    start = BASE + BLOCK - PAGE
    assert list(layout.split([(start, start + BLOCK + 2 * PAGE)])) == [
        (start, 1), (start + PAGE, layout.BLOCK_PAGES), (start + PAGE + BLOCK, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"1234567", body(0, []), layout.head(1, [layout.word(BASE, 1)])[:-1],
        body(1, [layout.word(BASE, 1)]), body(1, [layout.word(BASE, 1)], bytes(PAGE + 1)),
        body(1, [layout.word(BASE, 1) | 1 << 7], bytes(PAGE)), body(1, [layout.word(BASE + PAGE, 64, zero=True)]),
        body(1, [layout.word(1 << 63, 1, zero=True)]), layout.head(1, [ZERO])[:4] + b"\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_a_malformed_body(wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        layout.parse(wrong)


Piece = tuple[int, int, int, bool]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2), PAGES, st.integers(1, 64), st.booleans()), max_size=12), st.booleans())
def test_the_latest_of_each_page_counts(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], forget: bool
) -> None:
    place = tmp_path_factory.mktemp("store")
    filled = store.Store(place, store.Quota(1 << 30))
    model: dict[tuple[int, int], bytes] = {}
    for generation, (space, page, count, is_zero) in enumerate(pieces):
        if forget and generation == len(pieces) // 2:
            filled.add(body(1, []))
            model = {key: data for key, data in model.items() if key[0] != 1}
        address = BASE + page * PAGE
        count = min(count, layout.BLOCK_PAGES - page % layout.BLOCK_PAGES)
        data = b"" if is_zero else b"".join(bytes([1 + generation, n]) * (PAGE // 2) for n in range(count))
        filled.add(body(space, [layout.word(address, count, zero=is_zero)], data))
        for n in range(count):
            model[space, address + n * PAGE] = data[n * PAGE : (n + 1) * PAGE] or bytes(PAGE)
    filled.finish()
    filled.close()
    pages = store.Pages.open(place)
    everything = [(BASE, BASE + 4 * BLOCK)]
    for space in (1, 2, 3):
        missing = list(pages.missing(space, everything))
        there = sorted(address for key, address in model if key == space)
        assert layout.subtract(everything, missing) == layout.unite((at, at + PAGE) for at in there)
        for address in there:
            assert pages.read(space, address, 1) == model[space, address]
        if missing:
            with pytest.raises(TargetError, match="lacks memory"):
                pages.read(space, missing[0][0], 1)
    pages.close()


def test_a_source_that_sends_more_than_fits(tmp_path: Path) -> None:
    filled = store.Store(tmp_path, store.Quota(2 * PAGE))
    filled.add(body(1, [layout.word(BASE, 2)], bytes(2 * PAGE)))
    filled.add(body(1, [layout.word(BASE, 2)], bytes(2 * PAGE)))  # the same pages again
    with pytest.raises(OSError, match="No space left"):
        filled.add(body(1, [layout.word(BASE + 2 * PAGE, 1)], bytes(PAGE)))
    filled.close()
    assert os.stat(tmp_path / store.DATA).st_mode & 0o777 == 0o600
