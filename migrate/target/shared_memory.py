"""Shared memory that arrives: the objects of a container, filled while it runs at the source.

The source sends objects in MEMORY frames, before the freeze and in it. What CRIU's page maps of them list is lazy: its
data is not in CRIU's images. When everything has come, `SharedStores.finish` checks that it has every page that CRIU
lists, and turns the store of an object into the image with its pages. From then on these are ordinary images.

CRIU restores an object entry by entry of its page map, in whatever order (do_restore_shmem_content), and the data is in
the order of the entries. So the order of a store will do: it is not copied, but for blocks of which CRIU lists a part.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from criu_rpc import pagemap
from criu_rpc.pagemap import LAZY, PRESENT, Entry, Pagemap
from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout
from migrate.memory.layout import BLOCK, BLOCK_PAGES, PAGE
from migrate.memory.store import Block, Quota, Store

_MOST_OBJECTS = 256
_ALL = (1 << BLOCK_PAGES) - 1


class SharedStores:
    """A store for each object, by its space (layout.py), in the directory of a move's images."""

    def __init__(self, images: Path, quota: Quota) -> None:
        self._images, self._quota = images, quota
        self._stores: dict[int, Store] = {}

    def add(self, body: memoryview) -> None:
        """Take the body of one frame. Raises ProtocolError, OSError when it is too much."""
        space = layout.space(body)
        if space not in self._stores:
            if len(self._stores) >= _MOST_OBJECTS:
                raise ProtocolError(f"the source sends more than {_MOST_OBJECTS} objects of shared memory")
            self._stores[space] = Store(self._images, self._quota, _name(space))
        store = self._stores[space]
        store.add(body)
        if not store.has(space):
            self._drop(space)

    def _drop(self, space: int) -> None:
        self._stores.pop(space).close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._images / _name(space))

    def finish(self, shared: Mapping[str, int]) -> None:
        """Turn the stores into images: `shared` has the space of an object for the id of its image. Drop the others.

        Raises TargetError unless all has come that CRIU lists, ProtocolError, OSError.
        """
        if len(set(shared.values())) != len(shared):
            raise ProtocolError("two images are about the same object of shared memory")
        directory = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for image, space in shared.items():
                if not (image.isascii() and image.isdecimal()) or space not in self._stores:
                    raise ProtocolError(f"object {space} of shared memory, image {image[:20]!r}, has not come")
                self._finish(directory, f"pagemap-shmem-{image}.img", space)
        finally:
            os.close(directory)
        for space in list(self._stores):
            self._drop(space)

    def _finish(self, directory: int, name: str, space: int) -> None:
        """Turn one store into the pages of the page map `name`."""
        found = pagemap.read(directory, name)
        store = self._stores[space]
        blocks = store.blocks(space)
        if sum(entry.pages for entry in found.entries) > len(blocks) * BLOCK_PAGES:
            raise TargetError(f"{name}: lists more shared memory than has come")
        wanted = _wanted(name, found.entries)
        for address, bits in wanted.items():
            block = blocks.get(address)
            if block is None or bits & ~(block.present | block.zero):
                raise TargetError(f"{name}: shared memory at {address:#x} has not come")
        entries = list(_entries(_arrange(store.data, wanted, blocks)))
        data = f"pages-{found.pages_id}.img"
        if os.stat(data, dir_fd=directory, follow_symlinks=False).st_size:
            raise TargetError(f"{data}: has pages of an object that were to come otherwise")
        os.rename(_name(space), data, src_dir_fd=directory, dst_dir_fd=directory)
        pagemap.write(directory, name, Pagemap(found.pages_id, entries))

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def _name(space: int) -> str:
    return f"pymigrate-shared-{space - layout.OBJECTS}.img"


def _wanted(name: str, entries: Iterable[Entry]) -> dict[int, int]:
    """Return the pages that a page map lists, by block: bit i is page i. Raises TargetError."""
    wanted: dict[int, int] = {}
    for entry in entries:
        if entry.flags & (LAZY | PRESENT) != LAZY:
            raise TargetError(f"{name}: lists pages of an object that were to come otherwise")
        for start, pages in layout.split([(entry.address, entry.address + entry.pages * PAGE)]):
            address = start // BLOCK * BLOCK
            wanted[address] = wanted.get(address, 0) | ((1 << pages) - 1) << (start - address) // PAGE
    return wanted


def _arrange(data: int, wanted: Mapping[int, int], blocks: Mapping[int, Block]) -> list[tuple[int, int]]:
    """Arrange a store so that it has all wanted pages and nothing else. Return them in order: (address, pages).

    Whole blocks stay where they are, or take the places of those that are not wanted whole, whose pages go to the end.
    Raises OSError.
    """
    whole = {blocks[address].number: address for address, bits in wanted.items() if bits == _ALL}
    count = len(whole)
    parts = [
        (address + first * PAGE, pages)
        for address, bits in sorted(wanted.items())
        if bits != _ALL
        for first, pages in layout.runs_of_bits(bits)
    ]
    with open(os.memfd_create("pymigrate-parts", os.MFD_CLOEXEC), "w+b") as saved:
        for address, pages in parts:
            block = address // BLOCK * BLOCK
            saved.write(_read(data, blocks[block].number * BLOCK + address - block, pages * PAGE))
        last = sorted(number for number in whole if number >= count)
        for place in range(count):
            if place not in whole:
                number = last.pop()
                _write(data, place * BLOCK, _read(data, number * BLOCK, BLOCK))
                whole[place] = whole.pop(number)
        os.truncate(data, count * BLOCK)
        saved.seek(0)
        end = count * BLOCK
        for _, pages in parts:
            _write(data, end, saved.read(pages * PAGE))
            end += pages * PAGE
        os.truncate(data, end)  # the last block may be zeros, which take no room
    return [*((whole[place], BLOCK_PAGES) for place in range(count)), *parts]


def _entries(runs: Iterable[tuple[int, int]]) -> Iterator[Entry]:
    """Yield entries of a page map for runs of pages, joined where they follow one another."""
    start, pages = 0, 0
    for address, count in runs:
        if pages and start + pages * PAGE == address:
            pages += count
            continue
        if pages:
            yield Entry(start, pages, PRESENT)
        start, pages = address, count
    if pages:
        yield Entry(start, pages, PRESENT)


def _read(data: int, offset: int, size: int) -> bytes:
    """Return bytes of a store, which beyond its end are zeros."""
    return os.pread(data, size, offset).ljust(size, b"\0")


def _write(data: int, offset: int, body: bytes) -> None:
    while body:
        written = os.pwrite(data, body, offset)
        offset, body = offset + written, body[written:]
