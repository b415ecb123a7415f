"""What two reads of a process's pagemap say of its pages."""

import array
import os

import pytest

from migrate.memory import pagemap
from migrate.memory.layout import PAGE, Range
from migrate.memory.pagemap import PIECE, SOFT_DIRTY, Pieces

PRESENT, SWAPPED, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 56
START = 7 * PIECE
PAGES = PIECE // PAGE


def read(entries: dict[int, int], start: int = START, end: int = START + PIECE) -> Pieces:
    """Return pieces with these entries (page number from START on -> entry), as if [start, end) had been read."""
    values = array.array("Q", (entries.get((at - START) // PAGE, 0) for at in range(start, end, PAGE)))
    return pagemap.pieces([(start, bytearray(values.tobytes()))])


def left(pieces: Pieces) -> Pieces:
    return {piece: pagemap.clean(entries) for piece, entries in pieces.items()}


def pages(*numbers: int) -> list[Range]:
    return [(START + number * PAGE, START + (number + 1) * PAGE) for number in numbers]


def test_everything_that_exists_is_new_at_first() -> None:
    now = read({0: PRESENT | 5, 2: SWAPPED | 9, 4: SOFT_DIRTY, PAGES - 1: PRESENT | SOFT_DIRTY | 6})
    assert pagemap.changed(now, {}) == pages(0, 2, PAGES - 1)


@pytest.mark.parametrize(
    ("entry", "is_changed"),
    [
        (PRESENT | 5, False),
        (PRESENT | EXCLUSIVE | 5, False),  # fork(2) changes this of every page
        (PRESENT | SOFT_DIRTY | 5, True),
        (PRESENT | 6, True),
        (PRESENT | 1 << 54 | 5, True),
        (SWAPPED | 5, True),
        (SOFT_DIRTY, False),  # it does not exist
        (0, False),
    ],
)
def test_a_page_changes(entry: int, is_changed: bool) -> None:
    before = left(read({1: PRESENT | 5, 3: PRESENT | SOFT_DIRTY | 7}))
    assert pagemap.changed(read({1: entry, 3: PRESENT | 7}), before) == (pages(1) if is_changed else [])


def test_a_bit_that_was_not_cleared_is_reported_again() -> None:
    now = read({1: PRESENT | SOFT_DIRTY | 5})
    assert pagemap.changed(now, left(now)) == pages(1)


@pytest.mark.parametrize("flag", [0, SOFT_DIRTY])
def test_whole_pieces(flag: int) -> None:
    """They take a short cut."""
    now = read({number: PRESENT | flag | number + 1 for number in range(PAGES)})
    known = left(now) if flag else {}
    assert pagemap.changed(now, known) == [(START, START + PIECE)]
    assert pagemap.changed(left(now), left(now)) == []


def test_one_page_of_a_whole_piece() -> None:
    entries = {number: PRESENT | number + 1 for number in range(PAGES)}
    before = left(read(entries))
    assert pagemap.changed(read({**entries, 17: PRESENT | SOFT_DIRTY | 18}), before) == pages(17)
    assert pagemap.changed(read({**entries, 17: PRESENT | 9999}), before) == pages(17)


def test_pieces_are_put_together_of_their_mappings() -> None:
    """Two mappings in one piece, and a third across its end; the page between them was not read."""
    entries = array.array("Q", [PRESENT | 1]).tobytes()
    parts = [
        (START, bytearray(entries * 2)),
        (START + 3 * PAGE, bytearray(entries)),
        (START + PIECE - PAGE, bytearray(entries * (2 + PAGES))),
    ]
    now = pagemap.pieces(parts)
    assert sorted(now) == [START, START + PIECE, START + 2 * PIECE]
    rest = (START + PIECE - PAGE, START + 2 * PIECE + PAGE)
    assert pagemap.changed(now, {}) == [(START, START + 2 * PAGE), *pages(3), rest]


def test_empty_pieces_are_left_out() -> None:
    assert read({}) == {}
    assert read(dict.fromkeys(range(PAGES), SOFT_DIRTY)) == {}  # a mapping that is new
    assert read({3: PRESENT}, START, START + 3 * PAGE) == {}


def test_huge_pages() -> None:
    whole = {number: PRESENT | 512 * 9 + number for number in range(PAGES)}
    assert pagemap.is_huge(read(whole)[START])
    assert not pagemap.is_huge(read({**whole, PAGES - 1: PRESENT | 7})[START])
    assert not pagemap.is_huge(read({number: entry + 1 for number, entry in whole.items()})[START])
    assert not pagemap.is_huge(read({number: entry & ~PRESENT | SWAPPED for number, entry in whole.items()})[START])
    assert not pagemap.is_huge(read({0: PRESENT | 512})[START])


def test_buffers_cover_the_ranges() -> None:
    ranges = [(START, START + PAGE), (1 << 40, (1 << 40) + (200 << 20))]
    found = [(at, at + len(buffer) // pagemap.ENTRY * PAGE) for at, buffer in pagemap.buffers(ranges)]
    assert found[0] == ranges[0]
    assert (found[1][0], found[-1][1]) == ranges[1]
    assert [end for _, end in found[1:-1]] == [start for start, _ in found[2:]]


def test_an_address_space_that_is_gone() -> None:
    with open(os.devnull, "rb") as nothing, pytest.raises(ProcessLookupError):
        pagemap.fill(nothing.fileno(), pagemap.buffers([(0, PAGE)]))
