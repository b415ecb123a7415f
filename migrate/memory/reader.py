"""Read the memory of a process and turn it into the bodies of frames, with pages of zeros left out.

A page that changes while it is read counts as written, and is read again in the next round.
"""

import os
from collections.abc import Iterable, Iterator

from migrate.memory import layout
from migrate.memory.layout import BLOCK, PAGE, Range

_BODY_DATA = 3 * BLOCK  # bytes of pages that are read for one body
_BODY_RUNS = 4096
_ZEROS = bytes(PAGE)


class Reader:
    """Reads the memory behind a descriptor of /proc/PID/mem. `read` has the ranges that could be read, in order."""

    def __init__(self, memory: int, space: int) -> None:
        self._memory, self._space = memory, space
        self.read: list[Range] = []

    def bodies(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Yield the bodies of frames for page-aligned ranges. Memory that cannot be read is left out."""
        words: list[int] = []
        parts: list[bytes] = []
        size = 0
        for address, pages in layout.split(ranges):
            for start, data in self._runs(address, pages):
                self.read.append((start, start + len(data)))
                for at, end, is_zero in runs_of_zeros(data):
                    words.append(layout.word(start + at, (end - at) // PAGE, zero=is_zero))
                    if not is_zero:
                        parts.append(data[at:end] if end - at < len(data) else data)
                        size += end - at
            if size + BLOCK > _BODY_DATA or len(words) >= _BODY_RUNS:
                yield b"".join((layout.head(self._space, words), *parts))
                words, parts, size = [], [], 0
        if words:
            yield b"".join((layout.head(self._space, words), *parts))

    def _runs(self, address: int, pages: int) -> Iterator[tuple[int, bytes]]:
        """Yield what can be read of a run: (address, data)."""
        end = address + pages * PAGE
        while address < end:
            try:
                data = os.pread(self._memory, end - address, address)
            except OSError:
                data = b""
            whole = len(data) // PAGE * PAGE
            if whole:
                yield address, data if whole == len(data) else data[:whole]
            address += whole
            if address < end:
                address += PAGE  # unmapped meanwhile, or a guard page


def runs_of_zeros(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, is zero) for the runs of pages in `data` that are, or are not, all zeros."""
    firsts = data[::PAGE]
    if 0 not in firsts:  # the usual case: no page begins with a zero
        yield 0, len(data), False
        return
    start, last = 0, False
    for number, first in enumerate(firsts):
        at = number * PAGE
        is_zero = not first and data[at : at + PAGE] == _ZEROS
        if is_zero != last and at > start:
            yield start, at, last
            start = at
        last = is_zero
    yield start, len(data), last
