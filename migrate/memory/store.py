"""The store: memory of a container at the target, by space and address; of each page only the latest counts.

Two files beside CRIU's images, so that whatever keeps, checks and removes images does that to the store as well:

    pymigrate-memory.img         the data: block i at i * BLOCK, sparse
    pymigrate-memory-index.img   entry i: u32 space, u32 0, u64 address of block i, u64 present pages, u64 zero pages

A page is in the store if its bit is set in one of the two bitmaps. A zero page has no data, and reads as zeros.

The objects of shared memory have a store each (target/shared_memory.py).
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout
from migrate.memory.layout import BLOCK, PAGE, Range
from runtime.linux import syscalls

DATA, INDEX = "pymigrate-memory.img", "pymigrate-memory-index.img"
_ENTRY = struct.Struct("=IIQQQ")
_MOST_BLOCKS = 1 << 20  # 256 GiB, or less in scattered pages; each takes 200 bytes here


class Block(NamedTuple):
    """Block `number` of the store; bit i of `present` and of `zero` is its page i."""

    number: int
    present: int
    zero: int


def exists(images: Path) -> bool:
    """Return whether a directory of images has a store."""
    return (images / INDEX).exists()


class Quota:
    """How much may still come into the stores of one move: pages of data, and blocks."""

    def __init__(self, size: int) -> None:
        """`size` is in bytes of pages."""
        self.pages, self.blocks = size // PAGE, _MOST_BLOCKS


class Store:
    """A store that is being filled: `add` what comes. `finish` writes the index."""

    def __init__(self, images: Path, quota: Quota, name: str = DATA) -> None:
        """Make the file `name` for the data. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._images, self._quota = images, quota
        self._data = os.open(images / name, flags, 0o600)
        self._numbers: dict[int, dict[int, int]] = {}  # space -> address of a block -> its number
        self._unused: list[int] = []  # numbers of blocks that were dropped
        self._present: list[int] = []
        self._zero: list[int] = []

    @property
    def data(self) -> int:
        """The descriptor of the data."""
        return self._data

    def has(self, space: int) -> bool:
        """Return whether anything of a space is here."""
        return bool(self._numbers.get(space))

    def blocks(self, space: int) -> dict[int, Block]:
        """Return what a space has: address of a block -> Block."""
        numbers = self._numbers.get(space, {})
        return {address: Block(i, self._present[i], self._zero[i]) for address, i in numbers.items()}

    def add(self, body: bytes | memoryview) -> None:
        """Take the body of one frame. Raises ProtocolError for one that is malformed, OSError when it is too much."""
        space, runs, data = layout.parse(body)
        if not runs:
            self._forget(space)
            return
        numbers = self._numbers.setdefault(space, {})
        at = 0
        for address, pages, is_zero in runs:
            offset = address % BLOCK
            number = numbers.get(address - offset)
            if number is None:
                number = numbers[address - offset] = self._new_block()
            bits = ((1 << pages) - 1) << offset // PAGE
            if is_zero:
                if old := bits & self._present[number]:
                    syscalls.punch_hole(self._data, number * BLOCK + offset, pages * PAGE)
                    self._quota.pages += old.bit_count()
                self._present[number] &= ~bits
                self._zero[number] |= bits
                continue
            new = (bits & ~self._present[number]).bit_count()
            if new > self._quota.pages:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._quota.pages -= new
            self._present[number] |= bits
            self._zero[number] &= ~bits
            size = pages * PAGE
            written = os.pwrite(self._data, data[at : at + size], number * BLOCK + offset)
            while written < size:  # OSError comes with the next piece when the memory is full
                written += os.pwrite(self._data, data[at + written : at + size], number * BLOCK + offset + written)
            at += size

    def _new_block(self) -> int:
        """Return the number of an empty block. Raises ProtocolError if there are too many."""
        if self._unused:
            return self._unused.pop()
        number = len(self._present)
        if not self._quota.blocks:
            raise ProtocolError(f"the source sends memory from more than {_MOST_BLOCKS} places")
        self._quota.blocks -= 1
        self._present.append(0)
        self._zero.append(0)
        return number

    def _forget(self, space: int) -> None:
        """Drop a space: its process has exited, or has executed another program."""
        numbers = self._numbers.pop(space, {})
        self._unused += numbers.values()
        for number in numbers.values():
            self._quota.pages += self._present[number].bit_count()
            self._present[number] = self._zero[number] = 0
            with contextlib.suppress(OSError):
                syscalls.punch_hole(self._data, number * BLOCK, BLOCK)

    def finish(self) -> None:
        """Write the index. Raises OSError."""
        out = bytearray(_ENTRY.size * len(self._present))
        for space, numbers in self._numbers.items():
            for address, number in numbers.items():
                _ENTRY.pack_into(
                    out, number * _ENTRY.size, space, 0, address, self._present[number], self._zero[number]
                )  # fmt: skip
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(self._images / INDEX, flags, 0o600), "wb") as file:
            file.write(out)

    def close(self) -> None:
        if self._data >= 0:
            os.close(self._data)
            self._data = -1


class Pages:
    """A finished store, read."""

    def __init__(self, data: int, blocks: dict[int, dict[int, Block]]) -> None:
        self.data, self.blocks = data, blocks  # `blocks`: space -> address of a block -> Block

    @classmethod
    def open(cls, images: Path, mode: int = os.O_RDONLY) -> Self:
        """Open the store in a directory; `mode` O_RDWR allows to free blocks. Raises TargetError, OSError."""
        data = os.open(images / DATA, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with open(os.open(images / INDEX, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                return cls.parse(data, file.read())
        except BaseException:
            os.close(data)
            raise

    @classmethod
    def parse(cls, data: int, index: bytes) -> Self:
        """Return the store with the descriptor `data` and this index. Raises TargetError."""
        if len(index) % _ENTRY.size:
            raise TargetError(f"{INDEX}: is malformed")
        blocks: dict[int, dict[int, Block]] = {}
        for number, (space, _, address, present, zero) in enumerate(_ENTRY.iter_unpack(index)):
            if space:
                blocks.setdefault(space, {})[address] = Block(number, present, zero)
        return cls(data, blocks)

    def missing(self, space: int, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yield the parts of page-aligned ranges that the store does not have."""
        blocks = self.blocks.get(space, {})
        for address, pages in layout.split(ranges):
            offset = address % BLOCK
            block = blocks.get(address - offset)
            bits = ((1 << pages) - 1) << offset // PAGE
            absent = bits & ~(block.present | block.zero) if block is not None else bits
            for first, count in layout.runs_of_bits(absent):
                start = address - offset + first * PAGE
                yield start, start + count * PAGE

    def read(self, space: int, address: int, pages: int) -> bytes:
        """Return pages inside one block, which the store must have; a zero page reads as zeros. Raises TargetError."""
        if any(True for _ in self.missing(space, [(address, address + pages * PAGE)])):
            raise TargetError(f"the store lacks memory of process {space} at {address:#x}")
        offset = address % BLOCK
        block = self.blocks[space][address - offset]
        return os.pread(self.data, pages * PAGE, block.number * BLOCK + offset).ljust(pages * PAGE, b"\0")

    def run(self, space: int, address: int, pages: int) -> Iterator[bytes]:
        """Yield the data of pages in a row, piece by piece. Raises TargetError."""
        for start, count in layout.split([(address, address + pages * PAGE)]):
            yield self.read(space, start, count)

    def close(self) -> None:
        os.close(self.data)
