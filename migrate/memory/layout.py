"""How memory is named on the wire and in the store: spaces, blocks, runs, and the frames that carry them.

A *space* is the address space of one process, named by the process's pid in the container, as CRIU's images name it; or
an object of shared memory, named by a number from OBJECTS on, whose addresses are offsets in the object. A *block* is
BLOCK bytes of a space, aligned. A *run* is some pages in a row inside one block, named by one word:

    bits 12 to 63   address of the first page, whose low bits are 0
    bit 6           ZERO: every byte is 0, and no data follows
    bits 0 to 5     number of pages, less one

A body is what one frame carries, in native byte order (both hosts have the same processor architecture):

    u32 space | u32 number of words | words | the data of the runs that are not ZERO, in the same order

A body without words drops the space: its process has exited, or has executed another program.
"""

import array
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

from migrate.errors import ProtocolError

PAGE = 4096
BLOCK = 256 << 10
BLOCK_PAGES = BLOCK // PAGE  # one bit each in a u64
ZERO = 1 << 6
OBJECTS = 1 << 31  # spaces from here on are objects of shared memory
_COUNT = ZERO - 1
_FLAGS = PAGE - 1
_HEAD = struct.Struct("=II")
_TOP = 1 << 63  # addresses of programs are below

Range = tuple[int, int]  # start and end address


def split(ranges: Iterable[Range]) -> Iterator[tuple[int, int]]:
    """Yield the runs of page-aligned ranges: (address, pages), none of which crosses the border of a block."""
    for start, end in ranges:
        while start < end:
            stop = min(end, (start // BLOCK + 1) * BLOCK)
            yield start, (stop - start) // PAGE
            start = stop


def runs_of_bits(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of ones in a bitmap, lowest first: (number of the first bit, length)."""
    while bits:
        first = (bits & -bits).bit_length() - 1
        count = (~(bits >> first) & (bits >> first) + 1).bit_length() - 1
        yield first, count
        bits &= ~(((1 << count) - 1) << first)


def word(address: int, pages: int, *, zero: bool = False) -> int:
    """Return the name of a run."""
    return address | (pages - 1) | (ZERO if zero else 0)


def head(space: int, words: Sequence[int]) -> bytes:
    """Return the part of a body that precedes the data."""
    return _HEAD.pack(space, len(words)) + array.array("Q", words).tobytes()


def drops(body: bytes) -> bool:
    """Return whether a body that `head` has begun has no words."""
    return len(body) == _HEAD.size


def space(body: bytes | memoryview) -> int:
    """Return the space that a body is about; 0 if it is cut short."""
    return int.from_bytes(body[:4], sys.byteorder) if len(body) >= _HEAD.size else 0


def covered(body: bytes) -> int:
    """Return how many bytes of memory a body that `head` has begun stands for, with its zeros."""
    _, count = _HEAD.unpack_from(body)
    words = memoryview(body)[_HEAD.size : _HEAD.size + 8 * count].cast("Q")
    return sum((word & _COUNT) + 1 for word in words) * PAGE


def parse(body: bytes | memoryview) -> tuple[int, list[tuple[int, int, bool]], memoryview]:
    """Return the space, the runs as (address, pages, is zero), and their data. Raises ProtocolError."""
    view = memoryview(body)
    if len(view) < _HEAD.size:
        raise ProtocolError("a piece of memory is cut short")
    space, count = _HEAD.unpack_from(view)
    start = _HEAD.size + 8 * count
    if not space or len(view) < start:
        raise ProtocolError("a piece of memory is malformed")
    runs, size = [], 0
    for number in view[_HEAD.size : start].cast("Q"):
        address, pages, is_zero = number & ~_FLAGS, (number & _COUNT) + 1, bool(number & ZERO)
        if number & _FLAGS & ~(_COUNT | ZERO) or address >= _TOP or address % BLOCK + pages * PAGE > BLOCK:
            raise ProtocolError("a piece of memory has a malformed run")
        runs.append((address, pages, is_zero))
        size += 0 if is_zero else pages * PAGE
    if len(view) - start != size:
        raise ProtocolError(f"a piece of memory has {len(view) - start} bytes of pages, not {size}")
    return space, runs, view[start:]


def subtract(ranges: Iterable[Range], without: Iterable[Range]) -> list[Range]:
    """Return the parts of sorted, disjoint ranges that the sorted, disjoint ranges `without` do not cover."""
    found: list[Range] = []
    holes = iter(without)
    hole = next(holes, None)
    for start, end in ranges:
        while hole is not None and hole[1] <= start:
            hole = next(holes, None)
        while hole is not None and hole[0] < end:
            if start < hole[0]:
                found.append((start, hole[0]))
            start = hole[1]
            if start >= end:
                break
            hole = next(holes, None)
        if start < end:
            found.append((start, end))
    return found


def unite(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges sorted, with those that touch or overlap joined."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def size(ranges: Iterable[Range]) -> int:
    """Return the bytes in disjoint ranges."""
    return sum(end - start for start, end in ranges)
