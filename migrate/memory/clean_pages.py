"""Pages that a lazy dump need not pin, because they were not written since the last round of a move.

With `lazy_pages` CRIU pins every page that may be lazy with vmsplice(2), for a page server that nobody asks: 80 ms for
each GiB, in the freeze. With `track_mem` and a parent image it leaves out the pages whose soft-dirty bit is clear, and
lists them as *holes*, which the parent is said to have (criu/mem.c, generate_iovs). No parent exists: PageStream
claims one, and makes of a hole what CRIU would have sent. Memory that may be lazy becomes a lazy entry, like that which
CRIU pins; pages of private file mappings and of the vdso are read from the frozen process.

The bits decide only what CRIU pins. Which pages the target still needs is the tracker's to say, whether CRIU lists them
as lazy or as holes. So a bit that is clear and should not be loses nothing. But with `track_mem` CRIU clears the bits
of each process as soon as it has dumped its memory. So every answer waits until the last scan is over, and without one
the dump must fail.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from criu_rpc import pb
from migrate.errors import DeadlineExceeded, ProtocolError
from migrate.limits import LAST_SCAN_TIMEOUT
from migrate.memory import address_space, layout
from migrate.memory.layout import PAGE, Range

WORTH = 16 << 20  # bytes of clean memory in a process: pinning less than that takes no longer than filling holes
PARENT = "tracked"  # a directory beside CRIU's images
_CHUNK = 256 << 10  # bytes that are read at once
_INVENTORY_MAGIC = (0x58313116).to_bytes(4, "little")
_IMAGE_VERSION, _DUMP_UPTIME = 1, 8  # fields of inventory_entry (images/inventory.proto)


class CleanPages:
    """Those of one dump.

    `scan` begins the last scan, unless it has begun; its end is told to `know`, from another thread. CRIU 3.17 does not
    say when the container is frozen; by its first question for the memory of a process it is.
    """

    def __init__(self, scan: Callable[[], None]) -> None:
        self._scan = scan
        self._known = threading.Event()
        self._pids: Mapping[int, int] = {}
        self._lazy: dict[int, list[Range]] = {}

    def know(self, pids: Mapping[int, int]) -> None:
        """The last scan is over. `pids`: processes whose clean pages CRIU may leave out, by their pid in the container.

        Only the first call counts.
        """
        if not self._known.is_set():
            self._pids = pids
            self._known.set()

    def claim(self, space: int) -> bool:
        """Return whether CRIU may leave out the clean pages of a process, which is frozen. Raises DeadlineExceeded."""
        self._scan()
        if not self._known.wait(LAST_SCAN_TIMEOUT):
            raise DeadlineExceeded(f"what the container has written last was not found within {LAST_SCAN_TIMEOUT:g} s")
        if space not in self._pids:
            return False
        pid = self._pids[space]
        try:
            if address_space.locked(pid):  # CRIU restores it before the process runs
                return False
            self._lazy[space] = layout.unite(address_space.anonymous(pid))
        except OSError:
            return False
        return True

    def parts(self, space: int, start: int, end: int) -> Iterator[tuple[Range, bool]]:
        """Yield the parts of a hole in order, with whether each may be lazy. Raises ProtocolError without a claim."""
        if space not in self._lazy:
            raise ProtocolError(f"criu leaves out memory of process {space} that no parent image has")
        eager = layout.subtract([(start, end)], self._lazy[space])
        lazy = layout.subtract([(start, end)], eager)
        yield from sorted([(part, False) for part in eager] + [(part, True) for part in lazy])

    def read(self, space: int, start: int, end: int) -> Iterator[bytes]:
        """Yield what a frozen process has in a range. Raises ProtocolError when it cannot be read, OSError."""
        memory = address_space.open_memory(self._pids[space])
        try:
            while start < end:
                data = os.pread(memory, min(end - start, _CHUNK), start)
                if not data or len(data) % PAGE:
                    raise ProtocolError(f"memory of process {space} at {start:#x} cannot be read")
                yield data
                start += len(data)
        finally:
            os.close(memory)


def make_parent(images: int) -> None:
    """Make the directory PARENT in that of CRIU's images: an inventory that says when tracking began.

    CRIU takes a process that is younger for another one, and pins its pages (criu/mem.c, detect_pid_reuse).
    """
    os.mkdir(PARENT, 0o700, dir_fd=images)
    directory = os.open(PARENT, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images)
    try:
        uptime = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        entry = pb.encode([(_IMAGE_VERSION, pb.VARINT, 2), (_DUMP_UPTIME, pb.VARINT, uptime)])
        pb.write(directory, "inventory.img", _INVENTORY_MAGIC, [entry])
    finally:
        os.close(directory)
