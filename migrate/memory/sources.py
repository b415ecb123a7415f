"""Where the page handler takes memory from: the store of a move here, the images of a snapshot in image_source.py.

A source is divided into blocks, which are numbered from 0. Memory of a space that is in a row can be in several of
them.
"""

import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from migrate.errors import MigrateError
from migrate.memory import uffd
from migrate.memory.layout import BLOCK, PAGE
from migrate.memory.store import Block, Pages
from runtime.linux import syscalls


class Unreadable(MigrateError):
    """Memory that the container needs cannot be read, or is not what was written."""


class Part(NamedTuple):
    """`size` bytes at `offset` of block `number`; all of them 0 if `is_zero`."""

    number: int
    offset: int
    size: int
    is_zero: bool


class Source(Protocol):
    """A source with `count` blocks. A space and an origin name memory as in tables.py; all of it must be there."""

    @property
    def count(self) -> int: ...

    def blocks(self, space: int, origin: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield which blocks have some memory, in its order: (number, bytes in it)."""

    def around(self, space: int, origin: int) -> tuple[int, int]:
        """Return how many bytes before and after an origin are in the same block, in a row."""

    def parts(self, space: int, origin: int, size: int) -> Iterator[Part]:
        """Yield the parts of memory that is in one block, in order."""

    def read(self, part: Part) -> int:
        """Return the address of its data in this process, until the next call. Raises Unreadable."""

    def free(self, number: int, count: int) -> None:
        """Nobody needs some blocks any more. Raises OSError."""


class StoreSource:
    """The store of a move."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._buffer = mmap.mmap(-1, BLOCK)
        self._view, self._address = memoryview(self._buffer), uffd.address_of(self._buffer)

    @property
    def count(self) -> int:
        numbers = [block.number for blocks in self._pages.blocks.values() for block in blocks.values()]
        return 1 + max(numbers, default=-1)

    def _block(self, space: int, origin: int) -> Block:
        return self._pages.blocks[space][origin - origin % BLOCK]

    def blocks(self, space: int, origin: int, size: int) -> Iterator[tuple[int, int]]:
        end = origin + size
        while origin < end:
            stop = min(end, origin - origin % BLOCK + BLOCK)
            yield self._block(space, origin).number, stop - origin
            origin = stop

    def around(self, space: int, origin: int) -> tuple[int, int]:
        return origin % BLOCK, BLOCK - origin % BLOCK

    def parts(self, space: int, origin: int, size: int) -> Iterator[Part]:
        block, offset = self._block(space, origin), origin % BLOCK
        end = offset + size
        while offset < end:
            pages, is_zero = _run(block, offset // PAGE)
            length = min(pages * PAGE, end - offset)
            yield Part(block.number, offset, length, is_zero)
            offset += length

    def read(self, part: Part) -> int:
        place = part.number * BLOCK + part.offset
        try:
            count = os.preadv(self._pages.data, [self._view[part.offset : part.offset + part.size]], place)
        except OSError as error:
            raise Unreadable(f"the store cannot be read at {place:#x}: {error.strerror}") from None
        if count != part.size:
            raise Unreadable(f"the store ends at {place + count:#x}")
        return self._address + part.offset

    def free(self, number: int, count: int) -> None:
        syscalls.punch_hole(self._pages.data, number * BLOCK, count * BLOCK)


def _run(block: Block, page: int) -> tuple[int, bool]:
    """Return how many pages from `page` on are in the store alike, and whether they are zero."""
    is_zero = bool(block.zero >> page & 1)
    rest = (block.zero if is_zero else block.present) >> page
    count = (~rest & rest + 1).bit_length() - 1
    assert count, "the store lacks a page that is missing"
    return count, is_zero
