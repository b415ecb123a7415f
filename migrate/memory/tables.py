"""Which pages are missing, in each address space that is filled; how events change that. Pure: no descriptor is used.

A table belongs to one userfaultfd. An interval of it is missing memory: where it is now, and where it was at the dump
(its origin), which is where the store has it. mremap moves the one and not the other.

Several threads may change their address space at the same time. Each sends its event after its change, so events can
come in another order than the changes: memory appears to move to a place that is not yet free. Such a move waits for
the event that frees the place, or until the address space is quiet (uffd.is_quiet), because nothing is under way then.
After REMAP the kernel also reports UNMAP of the old place; by then another thread may have moved memory there, so that
one UNMAP is ignored.
"""

import array
import bisect
import marshal
from collections.abc import Iterable, Iterator
from typing import Any, Self

from migrate.memory import uffd

Piece = tuple[int, int, int]  # start, end, origin


class Pieces:
    """Disjoint intervals, sorted by address, each with its origin; 24 bytes each."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.starts, self.ends, self.origins = (array.array("Q") for _ in range(3))
        for start, end, origin in pieces:
            self.starts.append(start)
            self.ends.append(end)
            self.origins.append(origin)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Piece]:
        return zip(self.starts, self.ends, self.origins, strict=True)

    def copy(self) -> "Pieces":
        """Return an independent copy."""
        new = Pieces()
        new.starts, new.ends, new.origins = self.starts[:], self.ends[:], self.origins[:]
        return new

    @property
    def size(self) -> int:
        """The bytes in all intervals."""
        return sum(self.ends) - sum(self.starts)

    def find(self, address: int) -> Piece | None:
        """Return the interval that holds `address`."""
        index = bisect.bisect_right(self.starts, address) - 1
        if index < 0 or address >= self.ends[index]:
            return None
        return self.starts[index], self.ends[index], self.origins[index]

    def last(self) -> Piece:
        """Return the last interval."""
        return self.starts[-1], self.ends[-1], self.origins[-1]

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether any byte between is in an interval."""
        index = bisect.bisect_right(self.ends, start)
        return index < len(self.starts) and self.starts[index] < end

    def cut(self, start: int, end: int) -> list[Piece]:
        """Remove everything between, and return it."""
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.starts, end, first)
        if first >= last:
            return []
        removed: list[Piece] = []
        kept: list[Piece] = []
        for left, right, origin in list(zip(*(part[first:last] for part in self._parts()), strict=True)):
            low, high = max(left, start), min(right, end)
            removed.append((low, high, origin + low - left))
            if left < low:
                kept.append((left, low, origin))
            if high < right:
                kept.append((high, right, origin + high - left))
        self._splice(first, last, kept)
        return removed

    def put(self, pieces: list[Piece]) -> None:
        """Add sorted intervals in whose place there is nothing."""
        for piece in pieces:
            at = bisect.bisect_left(self.starts, piece[0])
            self._splice(at, at, [piece])

    def _parts(self) -> tuple["array.array[int]", "array.array[int]", "array.array[int]"]:
        return self.starts, self.ends, self.origins

    def _splice(self, first: int, last: int, pieces: list[Piece]) -> None:
        for number, part in enumerate(self._parts()):
            part[first:last] = array.array("Q", [piece[number] for piece in pieces])

    def plain(self) -> tuple[bytes, ...]:
        """Return it for marshal."""
        return tuple(part.tobytes() for part in self._parts())

    @classmethod
    def of(cls, plain: tuple[bytes, ...]) -> Self:
        """Return what `plain` was made of."""
        new = cls()
        for part, data in zip(new._parts(), plain, strict=True):
            part.frombytes(data)
        return new


class Table:
    """The missing memory of one address space: `space` is that of the dump. `areas` is what is registered."""

    def __init__(self, space: int, missing: Pieces, areas: Pieces) -> None:
        self.space, self.missing, self.areas = space, missing, areas
        self.moves: list[tuple[int, int, Pieces]] = []  # that wait: to, length, missing memory
        self.left: list[tuple[int, int]] = []  # old places of moves, whose UNMAP is to come

    def fork(self) -> "Table":
        """Return the table of a child. What its parent moves at the moment has moved in the child, or has not."""
        child = Table(self.space, self.missing.copy(), self.areas.copy())
        for move in self.moves:
            child._place(*move)
        return child

    def removed(self, start: int, end: int) -> list[Piece]:
        """madvise has emptied a range: return what is no longer missing."""
        gone: list[Piece] = []
        for to, length, missing in self.moves:  # memory that is there already, whatever was there before
            low, high = max(start, to), min(end, to + length)
            if low < high:
                gone += missing.cut(low, high) + self.removed(start, low) + self.removed(high, end)
                return gone
        return self.missing.cut(start, end) if start < end else []

    def unmapped(self, start: int, end: int) -> list[Piece]:
        """A range was unmapped: return what is no longer missing."""
        if (start, end) in self.left:
            self.left.remove((start, end))
            return []
        gone = self.missing.cut(start, end)
        self.areas.cut(start, end)
        return gone + self._place_moves()

    def moved(self, start: int, to: int, length: int) -> list[Piece]:
        """A range was moved: return what is no longer missing."""
        pieces = self.missing.cut(start, start + length)
        self.areas.cut(start, start + length)
        self.left.append((start, start + length))
        shifted = [(left - start + to, right - start + to, origin) for left, right, origin in pieces]
        self.moves.append((to, length, Pieces(shifted)))
        return self._place_moves()

    def settled(self) -> list[Piece]:
        """Nothing is under way: return what is no longer missing."""
        gone: list[Piece] = []
        for move in self.moves:
            gone += self._place(*move)
        self.moves.clear()
        self.left.clear()
        return gone

    @property
    def is_unsettled(self) -> bool:
        """Whether events may still come that belong to earlier ones."""
        return bool(self.moves or self.left)

    def _place_moves(self) -> list[Piece]:
        """Finish the moves whose place is free."""
        gone: list[Piece] = []
        while True:
            ready = next((move for move in self.moves if not self.areas.overlaps(move[0], move[0] + move[1])), None)
            if ready is None:
                return gone
            self.moves.remove(ready)
            gone += self._place(*ready)

    def _place(self, to: int, length: int, missing: Pieces) -> list[Piece]:
        gone = self.missing.cut(to, to + length)
        self.areas.cut(to, to + length)
        self.missing.put(list(missing))
        self.areas.put([(to, to + length, to)])
        return gone

    def pieces(self) -> Iterator[Piece]:
        """Yield all missing memory, that of moves that wait included."""
        yield from self.missing
        for _, _, missing in self.moves:
            yield from missing

    def plain(self) -> tuple[Any, ...]:
        """Return it for marshal."""
        moves = [(to, length, missing.plain()) for to, length, missing in self.moves]
        return self.space, self.missing.plain(), self.areas.plain(), moves, self.left

    @classmethod
    def of(cls, plain: tuple[Any, ...]) -> Self:
        """Return what `plain` was made of."""
        space, missing, areas, moves, left = plain
        new = cls(space, Pieces.of(missing), Pieces.of(areas))
        new.moves = [(to, length, Pieces.of(waiting)) for to, length, waiting in moves]
        new.left = list(left)
        return new


class Tables:
    """All tables, by descriptor; `initial` holds those of processes whose descriptors have not come yet, by space."""

    def __init__(self, initial: dict[int, Table]) -> None:
        self.initial = initial
        self.open: dict[int, Table] = {}
        self.pid = 0  # of the process whose descriptor comes next
        self.finished = False  # the restore has sent all descriptors, and all memory is registered

    def add(self, fd: int) -> None:
        """The descriptor of process `pid` has come. A process without missing memory gets an empty table."""
        empty = Table(self.pid, Pieces(), Pieces())
        self.open[fd] = self.initial.pop(self.pid, empty)
        self.pid = 0

    def apply(self, fd: int, event: int, first: int, second: int, third: int) -> list[Piece]:
        """Apply an event of a userfaultfd (uffd.parse): return what is no longer missing."""
        table = self.open[fd]
        if event == uffd.FORK:
            self.open[first] = table.fork()
        elif event == uffd.REMAP:
            return table.moved(first, second, third)
        elif event == uffd.REMOVE:
            return table.removed(first, second)
        elif event == uffd.UNMAP:
            return table.unmapped(first, second)
        return []

    def dump(self) -> bytes:
        """Return all tables as bytes."""
        initial = {space: table.plain() for space, table in self.initial.items()}
        opened = {fd: table.plain() for fd, table in self.open.items()}
        return marshal.dumps((initial, opened, self.pid, self.finished))

    @classmethod
    def load(cls, data: bytes | memoryview) -> Self:
        """Return what `dump` has made."""
        initial, opened, pid, finished = marshal.loads(data)
        new = cls({space: Table.of(plain) for space, plain in initial.items()})
        new.open = {fd: Table.of(plain) for fd, plain in opened.items()}
        new.pid, new.finished = pid, finished
        return new
