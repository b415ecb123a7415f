"""Read and write CRIU's page maps: which pages of a process are in its images, and which are lazy.

pagemap-PID.img   pagemap_head {pages_id = 1}, then pagemap_entry {vaddr = 1, compat_nr_pages = 2, flags = 4,
                  nr_pages = 5} in the order of addresses (images/pagemap.proto)
pages-ID.img      the data of the entries that are PRESENT, in the same order
"""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from criu_rpc import pb
from criu_rpc.errors import CriuError

PARENT, LAZY, PRESENT = 1, 2, 4
_PAGES_ID, _ADDRESS, _OLD_COUNT, _FLAGS, _COUNT = 1, 1, 2, 4, 5


class Entry(NamedTuple):
    """`pages` pages in a row from `address` on."""

    address: int
    pages: int
    flags: int


class Pagemap(NamedTuple):
    """`pages_id` names the file with the data."""

    pages_id: int
    entries: list[Entry]


def names(images: int) -> Iterator[tuple[str, int]]:
    """Yield the page maps of processes in a directory: (name, pid in the container)."""
    for name in sorted(os.listdir(images)):
        number = name.removeprefix("pagemap-").removesuffix(".img")
        if name == f"pagemap-{number}.img" and number.isascii() and number.isdecimal():
            yield name, int(number)


def read(images: int, name: str) -> Pagemap:
    """Read a page map in a directory behind a descriptor. Raises CriuError when it is malformed, OSError."""
    head, *entries = [pb.fields(entry) for entry in pb.entries(pb.read(images, name))]
    found = []
    for fields in entries:
        value = pb.value
        pages = value(fields, _COUNT) or value(fields, _OLD_COUNT)
        found.append(Entry(value(fields, _ADDRESS), pages, value(fields, _FLAGS)))
    if any(entry.address % 4096 or not 0 < entry.pages < 1 << 40 for entry in found):
        raise CriuError(f"{name}: is malformed")
    return Pagemap(pb.value(head, _PAGES_ID), found)


def write(images: int, name: str, pagemap: Pagemap) -> None:
    """Replace a page map. Raises OSError."""
    head = pb.read(images, name)[:8]
    encoded = [pb.encode([(_PAGES_ID, 0, pagemap.pages_id)]), *map(_encoded, pagemap.entries)]
    pb.write(images, name, head, encoded)


def _encoded(entry: Entry) -> bytes:
    old = entry.pages if entry.pages < 1 << 32 else 0
    numbers = {_ADDRESS: entry.address, _OLD_COUNT: old, _FLAGS: entry.flags, _COUNT: entry.pages}
    return pb.encode([(number, pb.VARINT, value) for number, value in numbers.items()])


def lazy(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries whose pages are not in the images."""
    return (entry for entry in entries if entry.flags & LAZY and not entry.flags & PRESENT)
