"""Copy memory from the store into address spaces, and free what no table refers to any more."""

import array
import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator

from migrate.memory import uffd
from migrate.memory.layout import BLOCK, PAGE
from migrate.memory.store import Block, Pages
from migrate.memory.tables import Piece, Table, Tables
from migrate.memory.uffd import Outcome
from runtime.linux import syscalls


class Filler:
    """Fills the tables' missing memory. `left` counts it, in bytes; what two tables miss counts twice."""

    def __init__(self, pages: Pages, done: memoryview, tables: Tables) -> None:
        """`done` has a byte for each block of the store, 1 for one that no table needs; it outlives this process.

        A table that was made from a log still has what was filled before. What is in a block that is done is in place
        everywhere, and that block may be free already.
        """
        self._pages, self._done, self._tables = pages, done, tables
        self._buffer = mmap.mmap(-1, BLOCK)
        self._view, self._address = memoryview(self._buffer), uffd.address_of(self._buffer)
        self._users = array.array("I", bytes(4 * len(done)))  # pages of each block that tables miss
        self._frees = False
        self.left = 0
        for table in (*tables.initial.values(), *tables.open.values()):
            self._drop_done(table)
            self.add(table)
        for number in range(len(done)):
            if not self._users[number]:
                done[number] = 1

    def _drop_done(self, table: Table) -> None:
        for missing in (table.missing, *(move[2] for move in table.moves)):
            if any(self._done[number] for number, _ in self._blocks(table.space, missing)):
                for start, end, origin in list(missing):
                    for left, right in _split(start, end, origin):
                        if self._done[self._block(table.space, origin + left - start).number]:
                            missing.cut(left, right)

    def _block(self, space: int, origin: int) -> Block:
        return self._pages.blocks[space][origin - origin % BLOCK]

    def _blocks(self, space: int, pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
        """Yield block number and number of pages of everything in some intervals."""
        blocks = self._pages.blocks.get(space, {})
        for start, end, origin in pieces:
            for left, right in _split(start, end, origin):
                place = origin + left - start
                yield blocks[place - place % BLOCK].number, (right - left) // PAGE

    def add(self, table: Table) -> None:
        """Count a new table."""
        for number, pages in self._blocks(table.space, table.pieces()):
            self._users[number] += pages
            self.left += pages * PAGE

    def release(self, space: int, pieces: Iterable[Piece]) -> None:
        """These intervals of one table are not missing any more."""
        for number, pages in self._blocks(space, pieces):
            self._users[number] -= pages
            self.left -= pages * PAGE
            if not self._users[number]:
                self._done[number] = 1
                if self._frees:
                    self._free(number, 1)

    def start_freeing(self) -> None:
        """Nobody needs the store but the tables: free what they do not need, from now on."""
        self._frees = True
        first = 0
        for number in range(len(self._done) + 1):
            if number == len(self._done) or not self._done[number]:
                if first < number:
                    self._free(first, number - first)
                first = number + 1

    def _free(self, number: int, count: int) -> None:
        with contextlib.suppress(OSError):  # a file system that cannot: it is freed with the images
            syscalls.punch_hole(self._pages.data, number * BLOCK, count * BLOCK)

    def fault(self, fd: int, table: Table, address: int) -> Outcome:
        """Let a thread go on that waits for the page at `address`; then fill what is missing around it.

        Return DONE, or why the thread still waits.
        """
        piece = table.missing.find(address)
        if piece is None:
            outcome = uffd.zero(fd, address, PAGE)[1]
            if outcome in (Outcome.THERE, Outcome.UNREGISTERED):
                uffd.wake(fd, address, PAGE)
                return Outcome.DONE
            return outcome
        outcome = self._fill(fd, table, address, address + PAGE)
        if outcome is Outcome.DONE:
            start, end, origin = piece
            offset = (origin + address - start) % BLOCK
            low, high = max(start, address - offset), min(end, address - offset + BLOCK)
            for left, right in ((address + PAGE, high), (low, address)):
                if left < right and self._fill(fd, table, left, right) is not Outcome.DONE:
                    break  # the background or the next fault sees why
        return outcome

    def advance(self, fd: int, table: Table) -> Outcome:
        """Fill up to a block of what is missing, which must not be nothing."""
        start, end, origin = table.missing.last()
        size = (origin + end - start - 1) % BLOCK + 1
        return self._fill(fd, table, max(start, end - size), end)

    def _fill(self, fd: int, table: Table, start: int, end: int) -> Outcome:
        """Fill a part of one interval and of one block; return DONE, or why not all of it."""
        piece = table.missing.find(start)
        assert piece is not None
        origin = piece[2] + start - piece[0]
        block, offset = self._block(table.space, origin), origin % BLOCK
        if block.present >> offset // PAGE & (1 << (end - start) // PAGE) - 1:
            os.preadv(self._pages.data, [self._view[offset : offset + end - start]], block.number * BLOCK + offset)
        most = BLOCK
        while start < end:
            pages, is_zero = _run(block, offset // PAGE)
            size = min(pages * PAGE, end - start, most)
            if is_zero:
                filled, outcome = uffd.zero(fd, start, size)
            else:
                filled, outcome = uffd.copy(fd, start, self._address + offset, size)
            if outcome is Outcome.UNREGISTERED and size > PAGE:  # a border of mappings may be in it
                most = max(PAGE, size // PAGE // 2 * PAGE)
                continue
            if outcome is Outcome.THERE or (outcome is Outcome.UNREGISTERED and self._tables.finished):
                uffd.wake(fd, start, PAGE)
                filled = PAGE
            elif outcome is not Outcome.DONE:
                return outcome
            self.release(table.space, table.missing.cut(start, start + filled))
            start, offset = start + filled, offset + filled
        return Outcome.DONE


def _split(start: int, end: int, origin: int) -> Iterator[tuple[int, int]]:
    """Split an interval where its origin crosses the border of a block."""
    while start < end:
        stop = min(end, start + BLOCK - origin % BLOCK)
        yield start, stop
        origin += stop - start
        start = stop


def _run(block: Block, page: int) -> tuple[int, bool]:
    """Return how many pages from `page` on are in the store alike, and whether they are zero."""
    is_zero = bool(block.zero >> page & 1)
    rest = (block.zero if is_zero else block.present) >> page
    count = (~rest & rest + 1).bit_length() - 1
    assert count, "the store lacks a page that is missing"
    return count, is_zero
