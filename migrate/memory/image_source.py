"""CRIU's own images as a source of memory (sources.py), as a snapshot has them: read and verified, never changed.

All pages-ID.img of a directory, in the order of their names, are divided into blocks, each file from its start. A block
is compared with its digest (block_digests.py) after it has been read, and before anything of it is used.
"""

import array
import bisect
import marshal
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from criu_rpc import pagemap
from criu_rpc.errors import CriuError
from migrate.errors import TargetError
from migrate.memory import block_digests, lazy_ranges, uffd
from migrate.memory.layout import BLOCK, PAGE, Range
from migrate.memory.sources import Part, Unreadable
from migrate.memory.tables import Table

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_pages(name: str) -> bool:
    """Return whether an image has this name that holds pages."""
    return name.startswith("pages-") and name.endswith(".img")


class Run(NamedTuple):
    """`size` bytes of memory in a row from `address` on; `place` is where the file has them."""

    address: int
    size: int
    place: int
    is_lazy: bool  # a lazy restore leaves it to the page handler


class Space(NamedTuple):
    """The memory of one process in its pages image `name`."""

    name: str
    runs: list[Run]


def read(directory: int) -> dict[int, Space]:
    """Read the page maps of all processes in a directory behind a descriptor, by pid in the container.

    Raises CriuError for one that does not fit its pages image, OSError.
    """
    found = {}
    for name, pid in pagemap.names(directory):
        page_map = pagemap.read(directory, name)
        pages, place = f"pages-{page_map.pages_id}.img", 0
        runs: list[Run] = []
        for entry in page_map.entries:
            size = entry.pages * PAGE
            if entry.flags & pagemap.PRESENT:
                runs.append(Run(entry.address, size, place, bool(entry.flags & pagemap.LAZY)))
                place += size
            elif entry.flags & (pagemap.LAZY | pagemap.PARENT):
                raise CriuError(f"{name}: has pages that are not in {pages}")
        if runs and place != os.stat(pages, dir_fd=directory, follow_symlinks=False).st_size:
            raise CriuError(f"{name}: does not fit {pages}")
        found[pid] = Space(pages, runs)
    return found


def eager_blocks(spaces: dict[int, Space]) -> dict[str, set[int]]:
    """Return which blocks of the pages images of processes CRIU reads itself in a lazy restore; numbers in the file."""
    found: dict[str, set[int]] = {}
    for name, runs in spaces.values():
        blocks = found.setdefault(name, set())
        for run in runs:
            if not run.is_lazy:
                blocks.update(range(run.place // BLOCK, block_digests.count(run.place + run.size)))
    return found


def lazy_bytes(spaces: dict[int, Space]) -> int:
    """Return how many bytes of memory a lazy restore leaves to the page handler."""
    return sum(run.size for _, runs in spaces.values() for run in runs if run.is_lazy)


class _File(NamedTuple):
    name: str
    first: int  # number of its first block
    size: int
    fd: int


class ImageSource:
    """Use `open`, and `parse` in another process that shares the descriptors."""

    def __init__(self, place: str, files: list[_File], runs: "dict[int, _Runs]", digests: bytes) -> None:
        self._place, self._files, self._runs, self._digests = place, files, runs, digests
        self._firsts = [file.first for file in files]
        self._buffer = mmap.mmap(-1, BLOCK)
        self._view, self._address = memoryview(self._buffer), uffd.address_of(self._buffer)
        self._held = -1  # the block in the buffer

    @classmethod
    def open(cls, images: Path, digests: bytes) -> tuple[Self, dict[int, Table]]:
        """Open the images in a directory; return also which memory is missing at first, by space.

        `digests` are those of all blocks. Raises TargetError, CriuError, OSError.
        """
        directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            spaces = read(directory)
            lazy = {pid: _lazy(space) for pid, space in spaces.items()}
            tables = lazy_ranges.tables(directory, {pid: ranges for pid, ranges in lazy.items() if ranges})
            files, count = [], 0
            for name in filter(is_pages, sorted(os.listdir(directory))):
                fd = os.open(name, _OPEN, dir_fd=directory)
                files.append(_File(name, count, os.fstat(fd).st_size, fd))
                count += block_digests.count(files[-1].size)
        finally:
            os.close(directory)
        if len(digests) != count * block_digests.SIZE:
            raise TargetError(f"{images}: has {count} blocks of pages, not {len(digests) // block_digests.SIZE}")
        firsts = {file.name: file.first for file in files}
        runs = {pid: _Runs.of(spaces[pid], firsts[spaces[pid].name]) for pid in tables}
        return cls(str(images), files, runs, digests), tables

    def dump(self) -> bytes:
        """Return all but the digests as bytes, for `parse`."""
        runs = {space: runs.plain() for space, runs in self._runs.items()}
        return marshal.dumps((self._place, [tuple(file) for file in self._files], runs))

    @classmethod
    def parse(cls, data: bytes, digests: bytes) -> Self:
        """Return what `dump` was called on."""
        place, files, runs = marshal.loads(data)
        known = {space: _Runs.from_plain(plain) for space, plain in runs.items()}
        return cls(place, [_File(*file) for file in files], known, digests)

    @property
    def count(self) -> int:
        return len(self._digests) // block_digests.SIZE

    def blocks(self, space: int, origin: int, size: int) -> Iterator[tuple[int, int]]:
        return ((part.number, part.size) for part in self.parts(space, origin, size))

    def around(self, space: int, origin: int) -> tuple[int, int]:
        before, place, after = self._runs[space].find(origin)
        return min(before, place % BLOCK), min(after, BLOCK - place % BLOCK)

    def parts(self, space: int, origin: int, size: int) -> Iterator[Part]:
        runs, end = self._runs[space], origin + size
        while origin < end:
            _, place, after = runs.find(origin)
            length = min(end - origin, after, BLOCK - place % BLOCK)
            yield Part(place // BLOCK, place % BLOCK, length, False)
            origin += length

    def read(self, part: Part) -> int:
        if part.number != self._held:
            self._held = -1
            self._load(part.number)
            self._held = part.number
        return self._address + part.offset

    def _load(self, number: int) -> None:
        """Read a block into the buffer, and verify it."""
        file = self._files[bisect.bisect_right(self._firsts, number) - 1]
        place = (number - file.first) * BLOCK
        size = min(BLOCK, file.size - place)
        try:
            done = os.preadv(file.fd, [self._view[:size]], place)
        except OSError as error:
            raise Unreadable(f"{self._place}/{file.name}: cannot be read at byte {place}: {error.strerror}") from None
        digest = self._digests[number * block_digests.SIZE : (number + 1) * block_digests.SIZE]
        if done != size or block_digests.one(self._view[:size]) != digest:
            raise Unreadable(damaged(f"{self._place}/{file.name}", place, size))

    def free(self, number: int, count: int) -> None:
        """A snapshot stays as it is."""


def damaged(path: str, place: int, size: int) -> str:
    """Return what is said of a block whose digest is another."""
    return f"{path}: is damaged between byte {place} and {place + size}"


def _lazy(space: Space) -> list[Range]:
    return [(run.address, run.address + run.size) for run in space.runs if run.is_lazy]


class _Runs:
    """The lazy memory of a space, in order of addresses, and where it is: file after file, each from a new block on."""

    def __init__(self, starts: "array.array[int]", ends: "array.array[int]", places: "array.array[int]") -> None:
        self._starts, self._ends, self._places = starts, ends, places

    @classmethod
    def of(cls, space: Space, first: int) -> Self:
        """`first` is the number of its file's first block."""
        lazy = [run for run in space.runs if run.is_lazy]
        return cls(
            array.array("Q", [run.address for run in lazy]),
            array.array("Q", [run.address + run.size for run in lazy]),
            array.array("Q", [first * BLOCK + run.place for run in lazy]),
        )

    def find(self, address: int) -> tuple[int, int, int]:
        """Return how many bytes of the run are before an address, where it is, and how many bytes follow."""
        index = bisect.bisect_right(self._starts, address) - 1
        before = address - self._starts[index]
        return before, self._places[index] + before, self._ends[index] - address

    def plain(self) -> tuple[bytes, ...]:
        """Return it for marshal."""
        return self._starts.tobytes(), self._ends.tobytes(), self._places.tobytes()

    @classmethod
    def from_plain(cls, plain: tuple[bytes, ...]) -> Self:
        """Return what `plain` was made of."""
        return cls(*(array.array("Q", part) for part in plain))
