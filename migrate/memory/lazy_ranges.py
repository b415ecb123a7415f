"""Which memory a restore leaves to the page handler, by CRIU's images: what their page maps call lazy.

CRIU registers whole private anonymous mappings; memory in them that the images do not have reads as zeros.
(criu/include/vma.h, vma_entry_can_be_lazy; criu/include/pagemap.h; criu/include/image.h)
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from criu_rpc import image_codec
from migrate.errors import TargetError
from migrate.memory.layout import PAGE, Range
from migrate.memory.tables import Piece, Pieces, Table

_LAZY = 1 << 1
_VSYSCALL, _VDSO, _VVAR = 1 << 2, 1 << 3, 1 << 12
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
        for pid in image_codec.address_spaces(directory):
            areas = list(_areas(directory, pid))
            missing = Pieces(_split(_lazy(directory, pid), areas, pid))
            if missing:
                found[pid] = Table(pid, missing, Pieces((start, end, start) for start, end in areas))
        return found
    finally:
        os.close(directory)


def _areas(images: int, pid: int) -> Iterator[Range]:
    """Yield the mappings that can be lazy, in order."""
    last = 0
    for start, end, flags, status in image_codec.mappings(images, pid):
        _require(last <= start < end <= _TOP and not (start | end) % PAGE, f"the mappings of process {pid}")
        last = end
        if flags & _MUST == _MUST and not flags & _MUST_NOT and not status & (_VDSO | _VVAR | _VSYSCALL):
            yield start, end


def _lazy(images: int, pid: int) -> Iterator[Range]:
    """Yield what the page map calls lazy, in order."""
    last = 0
    for start, pages, flags in image_codec.page_map(images, pid):
        end = start + pages * PAGE
        _require(last <= start < end <= _TOP and not start % PAGE, f"the page map of process {pid}")
        last = end
        if flags & _LAZY:
            yield start, end


def _split(lazy: Iterator[Range], areas: list[Range], pid: int) -> Iterator[Piece]:
    """Yield the lazy ranges, split where one mapping ends and the next begins."""
    rest = iter(areas)
    area = next(rest, None)
    for start, end in lazy:
        while start < end:
            while area is not None and area[1] <= start:
                area = next(rest, None)
            _require(area is not None and area[0] <= start, f"lazy memory at {start:#x} of process {pid}")
            assert area is not None
            stop = min(end, area[1])
            yield start, stop, start
            start = stop


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise TargetError(f"{what}: CRIU's images contradict each other")
