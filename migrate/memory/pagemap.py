"""/proc/PID/pagemap of a process: read entries of its pages, and find out which pages have changed between two reads.

An entry is a u64: bits 0 to 54 name the page frame or the place in swap, bit 55 is soft-dirty, bit 62 says that the
page is in swap, bit 63 that it is in memory (Documentation/admin-guide/mm/pagemap.rst). Entries are kept for pieces
of PIECE bytes of memory, aligned, in which pages that were not asked for count as absent.
"""

import os
from collections.abc import Iterable, Iterator, Mapping

from migrate.memory import layout
from migrate.memory.layout import PAGE, Range

ENTRY = 8
PIECE = 2 << 20
_PIECE_ENTRIES = PIECE // PAGE * ENTRY  # bytes
SOFT_DIRTY = 1 << 55
FRAME = SOFT_DIRTY - 1
_EXISTS = 62  # this bit or the next is set for a page that exists
_COUNTS = 3 << _EXISTS | SOFT_DIRTY | FRAME
_ABSENT = bytes(_PIECE_ENTRIES)
_UNTOUCHED = SOFT_DIRTY.to_bytes(ENTRY, "little") * (PIECE // PAGE)  # of a mapping that is new
_CLEAN = bytes(value & 0x7F for value in range(256))  # bits 48 to 55 without soft-dirty
_LARGEST = 64 << 20  # bytes of memory whose entries one call reads

Pieces = dict[int, bytes]  # address -> entries


def buffers(ranges: Iterable[Range]) -> list[tuple[int, bytearray]]:
    """Return what `fill` needs to read the entries of ranges: the address and a buffer for each part of them."""
    return [
        (at, bytearray((min(at + _LARGEST, end) - at) // PAGE * ENTRY))
        for start, end in ranges
        for at in range(start, end, _LARGEST)
    ]


def fill(pagemap: int, parts: Iterable[tuple[int, bytearray]]) -> None:
    """Read entries from a descriptor of pagemap. Raises ProcessLookupError when the address space is gone, OSError."""
    for address, buffer in parts:
        if os.preadv(pagemap, [buffer], address // PAGE * ENTRY) != len(buffer):
            raise ProcessLookupError("the address space is gone")


def pieces(parts: Iterable[tuple[int, bytearray]]) -> Pieces:
    """Return the entries that `fill` has read, without pieces in which no page exists."""
    whole: Pieces = {}
    edges: dict[int, bytearray] = {}
    for address, buffer in parts:
        at, stop = address, address + len(buffer) // ENTRY * PAGE
        while at < stop:
            piece = at // PIECE * PIECE
            end = min(stop, piece + PIECE)
            entries = buffer[(at - address) // PAGE * ENTRY : (end - address) // PAGE * ENTRY]
            if end - at < PIECE:
                begin = (at - piece) // PAGE * ENTRY
                edges.setdefault(piece, bytearray(_PIECE_ENTRIES))[begin : begin + len(entries)] = entries
            elif entries not in (_ABSENT, _UNTOUCHED):
                whole[piece] = bytes(entries)
            at = end
    for piece, entries in edges.items():
        if entries != _ABSENT:
            whole[piece] = bytes(entries)
    return whole


def is_huge(entries: bytes) -> bool:
    """Return whether a piece seems to be one huge page: its page frames follow each other, and the first is aligned."""
    first, last = (int.from_bytes(entries[at : at + ENTRY], "little") for at in (0, _PIECE_ENTRIES - ENTRY))
    frame, pages = first & FRAME, PIECE // PAGE
    return bool(first >> 63 and last >> 63 and frame and not frame % pages and last & FRAME == frame + pages - 1)


def clean(entries: bytes) -> bytes:
    """Return the entries of a piece as they are once its soft-dirty bits are cleared."""
    found = bytearray(entries)
    found[6::ENTRY] = found[6::ENTRY].translate(_CLEAN)
    return bytes(found)


def changed(now: Pieces, before: Mapping[int, bytes]) -> list[Range]:
    """Return the pages that exist and are not what they were: written, new, or in another page frame.

    `before` has entries that are `clean`, and lacks those of pages that count as changed.
    """
    found: list[Range] = []
    for piece, entries in now.items():
        known = before.get(piece, _ABSENT)
        if entries != known:
            found += [(piece, piece + PIECE)] if _all_changed(entries, known) else _changed(piece, entries, known)
    return layout.unite(found)


def _all_changed(entries: bytes, known: bytes) -> bool:
    """Return whether every page of a piece exists, and has changed for one reason: the usual case of many changes."""
    return min(entries[7::ENTRY]) >= 0x40 and (known is _ABSENT or min(entries[6::ENTRY]) >= 0x80)


def _changed(piece: int, entries: bytes, known: bytes) -> Iterator[Range]:
    pairs = zip(memoryview(entries).cast("Q"), memoryview(known).cast("Q"), strict=True)
    for number, (entry, old) in enumerate(pairs):
        if entry >> _EXISTS and (entry ^ old) & _COUNTS:
            yield piece + number * PAGE, piece + (number + 1) * PAGE
