"""Send the shared memory of a container while it runs, and in the freeze only what differs from that.

Writes to an object (memory/shared_objects.py) cannot be tracked: a process that writes and exits takes its page tables
along, and descriptors write as well. So each object is read in each round, and a digest of each page says what the
target has. In the freeze CRIU hands over every object, inside this host: what still has its digest does not travel
again.

    with SharedMemory(init, send) as shared:
        shared.send()                     a round; `changed` says how much of it the target did not have
        PageRelay(..., objects=shared)    in the freeze
        shared.images                     what the target needs to know: image of CRIU -> number of the object

The digests of pages take 4 MiB for each GiB, up to 4 GiB of shared memory. Of more memory there is only one for each
block of 256 KiB, and beyond 256 GiB none: that is sent again in each round and in the freeze.
"""

import os
from collections.abc import Callable

from migrate.memory import layout, shared_objects
from migrate.memory.layout import BLOCK, PAGE, Range
from migrate.memory.reader import runs_of_zeros
from migrate.memory.shared_objects import Key
from migrate.wire.digests import PieceDigests
from runtime.linux import processes

_MOST_GROUPS = 1 << 14  # of each kind, of all objects: 4 GiB of pages, and 256 GiB of blocks
_BODY_DATA = 3 * BLOCK
_DIGEST = 16
_NONE = bytes(_DIGEST)  # of what the target does not have, as far as is known
_GROUP = 64  # digests


class _Room:
    """How many groups of digests may still be made."""

    def __init__(self) -> None:
        self.left = _MOST_GROUPS


class _Digests:
    """Digests of pieces of `unit` bytes each, in groups of _GROUP."""

    def __init__(self, unit: int, room: _Room) -> None:
        self._unit, self._room = unit, room
        self._groups: dict[int, bytearray] = {}

    def group(self, offset: int) -> tuple[bytearray, int] | None:
        """Return the group that has the piece at `offset`, and where in it; None if there is no room for it."""
        number, inside = divmod(offset, self._unit * _GROUP)
        group = self._groups.get(number)
        if group is None:
            if not self._room.left:
                return None
            self._room.left -= 1
            group = self._groups[number] = bytearray(_GROUP * _DIGEST)
        return group, inside // self._unit * _DIGEST

    def clear(self) -> None:
        """Forget all digests."""
        self._room.left += len(self._groups)
        self._groups.clear()


class _Object:
    """What the target has of one object."""

    def __init__(self, space: int, pages: _Room, blocks: _Room) -> None:
        self.space = space
        self.is_there = False  # whether the target has heard of it: an object without a page does not travel
        self.pages, self.blocks = _Digests(PAGE, pages), _Digests(BLOCK, blocks)


class SharedMemory:
    """The objects of a container, whose init is `init`. `send` takes the bodies of frames (layout.py)."""

    def __init__(self, init: int, send: Callable[[bytes], None]) -> None:
        self._init, self._send = init, send
        room = bytearray(BLOCK)
        self.buffer, self._digests = memoryview(room), PieceDigests(room)
        self._objects: dict[Key, _Object] = {}
        self._given = 0  # numbers that were given to objects; none is used twice
        self._current: _Object | None = None
        self._image: int | None = None  # of CRIU, in the freeze
        self._runs: list[tuple[int, bytes, bool]] = []  # what `_flush` sends: offset, data, whether it is all zeros
        self._waiting = 0  # bytes of data in `_runs`
        self._rooms = _Room(), _Room()
        self.size = shared_objects.size(init)  # bytes of all objects, in the last round if there was one
        self.changed = self.size  # those of them that the target did not have
        self.images: dict[int, int] = {}

    def send(self) -> int:
        """Read all objects, and send what the target does not have. Return how many bytes of memory were sent."""
        found = shared_objects.find(sorted(processes.descendants(self._init)))
        for key in self._objects.keys() - found.keys():
            self._forget(key)
        self.size = self.changed = 0
        for key, paths in found.items():
            fd = shared_objects.open_one(key, paths)
            if fd < 0:
                self._forget(key)
                continue
            try:
                self._read(key, fd)
            finally:
                os.close(fd)
        return self.changed

    def _read(self, key: Key, fd: int) -> None:
        """Read an object, and send what has changed."""
        if key not in self._objects:
            self._objects[key] = _Object(layout.OBJECTS + self._given, *self._rooms)
            self._given += 1
        self._current = self._objects[key]
        for start, pages in layout.split(shared_objects.data(fd)):
            try:
                got = os.preadv(fd, [self.buffer[: pages * PAGE]], start)
            except OSError:  # damaged memory, which CRIU will report
                continue
            size = -(-got // PAGE) * PAGE
            self.buffer[got:size] = bytes(size - got)
            self.size += size
            if size:
                self.take(start, size)
        self.end()

    def _forget(self, key: Key) -> None:
        """Have the target drop an object that has gone."""
        if gone := self._objects.pop(key, None):
            gone.pages.clear()
            gone.blocks.clear()
            if gone.is_there:
                self._send(layout.head(gone.space, []))

    # What PageRelay calls in the freeze (wire/pages.py).

    def begin(self, image: int) -> bool:
        """CRIU is about to send an object, and waits. It has that object mapped, and no other one."""
        mapped = {key for pid in processes.descendants(os.getpid()) for key, _ in shared_objects.mapped(pid)}
        keys = mapped & self._objects.keys()
        if len(keys) != 1:
            return False
        self._current = self._objects.pop(keys.pop())  # never for two images: they would overwrite each other
        self._image = image
        return True

    def take(self, address: int, size: int) -> None:
        """Send what the target does not have of the first `size` bytes in the buffer, which are at this offset."""
        for start, end in self._compare(address, size):
            data = bytes(self.buffer[start - address : end - address])
            self.changed += len(data)
            for first, last, is_zero in runs_of_zeros(data):
                self._runs.append((start + first, data[first:last], is_zero))
                self._waiting += 0 if is_zero else last - first
        if self._waiting > _BODY_DATA - BLOCK or len(self._runs) > _BODY_DATA // PAGE:
            self._flush()

    def end(self) -> None:
        """All of the object has been taken."""
        self._flush()
        if self._image is not None and self._current is not None and self._current.is_there:
            self.images[self._image] = self._current.space
        self._current = self._image = None

    def _compare(self, address: int, size: int) -> list[Range]:
        """Return the pages in the buffer that the target does not have, and take note that it will have them."""
        assert self._current is not None
        if found := self._current.blocks.group(address):
            group, at = found
            digest = self._digests.of(0, size) if size == BLOCK else _NONE
            if digest == group[at : at + _DIGEST] != _NONE:
                return []
            group[at : at + _DIGEST] = digest
        found = self._current.pages.group(address)
        if found is None:
            return [(address, address + size)]
        group, at = found
        changed = []
        for start in range(0, size, PAGE):
            digest = self._digests.of(start, PAGE)
            if group[at : at + _DIGEST] != digest:
                group[at : at + _DIGEST] = digest
                changed.append((address + start, address + start + PAGE))
            at += _DIGEST
        return layout.unite(changed)

    def _flush(self) -> None:
        """Send what `take` has found."""
        assert self._current is not None
        if self._runs:
            words = [layout.word(start, len(data) // PAGE, zero=is_zero) for start, data, is_zero in self._runs]
            parts = [data for _, data, is_zero in self._runs if not is_zero]
            self._send(b"".join((layout.head(self._current.space, words), *parts)))
            self._current.is_there = True
            self._runs, self._waiting = [], 0
