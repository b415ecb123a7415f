"""Which memory a restore leaves to the page handler, by CRIU's images: what their page maps call lazy.

CRIU registers whole private anonymous mappings; memory in them that the images do not have reads as zeros.
(criu/include/vma.h, vma_entry_can_be_lazy)
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from criu_rpc import mappings, pagemap
from migrate.errors import TargetError
from migrate.memory.layout import PAGE, Range
from migrate.memory.tables import Piece, Pieces, Table

_LOCKED, _HUGETLB = 0x2000, 0x40000
_MUST, _MUST_NOT = mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE, _LOCKED | _HUGETLB
_TOP = 1 << 63


def read(images: Path) -> dict[int, Table]:
    """Return the missing memory of each process whose memory is lazy, by its pid in the container.

    No interval crosses the border of a mapping: one UFFDIO_COPY cannot either. Raises TargetError, CriuError, OSError.
    """
    directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = {}
        for name, pid in pagemap.names(directory):
            lazy = [
                (entry.address, entry.address + entry.pages * PAGE)
                for entry in pagemap.lazy(pagemap.read(directory, name).entries)
            ]
            if lazy:
                found[pid] = lazy
        return tables(directory, found)
    finally:
        os.close(directory)


def tables(images: int, lazy: Mapping[int, list[Range]]) -> dict[int, Table]:
    """Return the tables of processes with these lazy ranges, as `read` does; `images` is a descriptor."""
    found = {}
    for pid, ranges in lazy.items():
        areas = list(_areas(images, pid))
        registered = Pieces((start, end, start) for start, end in areas)
        found[pid] = Table(pid, Pieces(_split(ranges, areas, pid)), registered)
    return found


def _areas(images: int, pid: int) -> Iterator[Range]:
    """Yield the mappings that can be lazy, in order."""
    last = 0
    for start, end, flags, status in mappings.read(images, pid):
        kernel = status & (mappings.VDSO | mappings.VVAR | mappings.VSYSCALL)
        if flags & _MUST == _MUST and not flags & _MUST_NOT and not kernel:
            _require(last <= start < end <= _TOP and not (start | end) % PAGE, f"the mappings of process {pid}")
            last = end
            yield start, end


def _split(lazy: list[Range], areas: list[Range], pid: int) -> Iterator[Piece]:
    """Yield the lazy ranges, split where one mapping ends and the next begins."""
    rest = iter(areas)
    area = next(rest, None)
    last = 0
    for start, end in lazy:
        _require(last <= start < end <= _TOP, f"the page map of process {pid}")
        last = end
        while start < end:
            while area is not None and area[1] <= start:
                area = next(rest, None)
            if area is None or area[0] > start:
                raise TargetError(f"the page map of process {pid}: {start:#x} is lazy, and in no mapping that can be")
            stop = min(end, area[1])
            yield start, stop, start
            start = stop


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise TargetError(f"{what}: CRIU's images contradict each other")
