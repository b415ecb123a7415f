"""Copy memory from a source into address spaces, and free what no table refers to any more."""

import array
import contextlib
from collections.abc import Iterable, Iterator

from migrate.memory import uffd
from migrate.memory.layout import BLOCK, PAGE
from migrate.memory.sources import Source
from migrate.memory.tables import Piece, Table, Tables
from migrate.memory.uffd import Outcome


class Filler:
    """Fills the tables' missing memory. `left` counts it, in bytes; what two tables miss counts twice."""

    def __init__(self, source: Source, done: memoryview, tables: Tables) -> None:
        """`done` has a byte for each block of the source, 1 for one that no table needs; it outlives this process.

        A table that was made from a log still has what was filled before. What is in a block that is done is in place
        everywhere, and that block may be free already.
        """
        self._source, self._done, self._tables = source, done, tables
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
                    for number, size in self._source.blocks(table.space, origin, end - start):
                        if self._done[number]:
                            missing.cut(start, start + size)
                        start += size

    def _blocks(self, space: int, pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
        """Yield block number and number of pages of everything in some intervals."""
        for start, end, origin in pieces:
            for number, size in self._source.blocks(space, origin, end - start):
                yield number, size // PAGE

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
        """Nobody needs the source but the tables: free what they do not need, from now on."""
        self._frees = True
        first = 0
        for number in range(len(self._done) + 1):
            if number == len(self._done) or not self._done[number]:
                if first < number:
                    self._free(first, number - first)
                first = number + 1

    def _free(self, number: int, count: int) -> None:
        with contextlib.suppress(OSError):  # a file system that cannot: it is freed with the images
            self._source.free(number, count)

    def fault(self, fd: int, table: Table, address: int) -> Outcome:
        """Let a thread go on that waits for the page at `address`; then fill what is missing around it.

        Return DONE, or why the thread still waits. Raises Unreadable.
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
            before, after = self._source.around(table.space, origin + address - start)
            low, high = max(start, address - before), min(end, address + after)
            for left, right in ((address + PAGE, high), (low, address)):
                if left < right and self._fill(fd, table, left, right) is not Outcome.DONE:
                    break  # the background or the next fault sees why
        return outcome

    def advance(self, fd: int, table: Table) -> Outcome:
        """Fill up to a block of what is missing, which must not be nothing. Raises Unreadable."""
        start, end, origin = table.missing.last()
        before, _ = self._source.around(table.space, origin + end - start - PAGE)
        return self._fill(fd, table, max(start, end - PAGE - before), end)

    def _fill(self, fd: int, table: Table, start: int, end: int) -> Outcome:
        """Fill a part of one interval and of one block; return DONE, or why not all of it."""
        piece = table.missing.find(start)
        assert piece is not None
        for part in self._source.parts(table.space, piece[2] + start - piece[0], end - start):
            address = 0 if part.is_zero else self._source.read(part)
            stop, most = start + part.size, BLOCK
            while start < stop:
                size = min(stop - start, most)
                if part.is_zero:
                    filled, outcome = uffd.zero(fd, start, size)
                else:
                    filled, outcome = uffd.copy(fd, start, address, size)
                if outcome is Outcome.UNREGISTERED and size > PAGE:  # a border of mappings may be in it
                    most = max(PAGE, size // PAGE // 2 * PAGE)
                    continue
                if outcome is Outcome.THERE or (outcome is Outcome.UNREGISTERED and self._tables.finished):
                    uffd.wake(fd, start, PAGE)
                    filled = PAGE
                elif outcome is not Outcome.DONE:
                    return outcome
                self.release(table.space, table.missing.cut(start, start + filled))
                start, address = start + filled, address + filled
        return Outcome.DONE
