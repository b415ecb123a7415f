"""Which pages of a process were written: the kernel's soft-dirty bits, for kernels before Linux 6.7.

A 4 written to /proc/PID/clear_refs clears the bit of every page, and the next write to a page sets it (Documentation/
admin-guide/mm/soft-dirty.rst). A write between reading the bits and clearing them would be lost, so the process stands
still for that moment: about 10 ms for each GiB in it, at 2 MiB per GiB of entries. Everything else is done while it
runs: the first scan clears before it reads and needs no stop, unless a device may write (direct_io.py); pieces that are
empty are left out; changes are sought afterwards. A process that does not stop in time, or that shares its memory with
another one (vfork(2)), keeps its bits: what they say is still true, but covers more than the last round.

The bits do not tell everything. mremap(2) moves whole page tables as they are, and a first read after madvise(2) can
map a huge page of zeros. Both change the page frame, so a page counts as written, too, when its frame or its place in
swap is another one than in the last scan.

A huge page has one bit, so a write to any of it counts for 2 MiB. Huge pages are split before their bits are cleared:
process_madvise(2) with advice for a part of one does that. The target will have small ones anyway, and the kernel joins
them again where the container stays.

There is one set of bits for all who use them. A program that reads its own, as garbage collectors do, must keep them.
"""

import ctypes
import errno
import functools
import mmap
import os
import struct

from migrate.memory import address_space, direct_io, layout, pagemap, stopping
from migrate.memory.layout import PAGE, Range
from migrate.memory.tracking import ASYNCHRONOUS, Gone, TrackingFailed
from runtime.linux import processes

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_KCMP = {"x86_64": 312, "aarch64": 272}
_SYS_PROCESS_MADVISE = 440
_MADV_COLD = 20
_ADVICES = 1024  # in one call
_KCMP_VM = 1
_CLEAR_SOFT_DIRTY = b"4"
_TIMEOUT = 0.05  # seconds for all threads to stop
_MOST = 128 << 30  # bytes of address space that are looked through


class SoftDirty:
    """The writes of one process."""

    def __init__(self, pid: int, init: int) -> None:
        """Begin to track a process of the container whose init is `init`. Raises TrackingFailed; it is unchanged."""
        self.pid, self._init = pid, init
        self._before: pagemap.Pieces | None = None  # entries as the last scan has left them; None: not scanned yet
        self._pagemap = self._clear = self._pidfd = -1
        try:
            self._require_possible()
            self._pidfd = os.pidfd_open(pid)
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._clear = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise TrackingFailed(str(error)) from None

    def scan(self) -> list[Range]:
        """Return the pages written since the last scan, at first all that exist, and clear their bits. Raises Gone."""
        try:
            try:
                self._require_possible()
            except TrackingFailed:
                self._before = {}
                return self.written()
            is_free = self._before is None and not direct_io.is_used(self.pid)
            now = self._clear_and_read() if is_free else self._read_and_clear()
            is_known = not is_free or not direct_io.is_used(self.pid)  # since when it is used is not known
        except OSError:
            raise Gone from None
        found = pagemap.changed(now, self._before or {})
        self._before = {piece: pagemap.clean(entries) for piece, entries in now.items()} if is_known else {}
        return found

    def written(self) -> list[Range]:
        """Return the same of a frozen process, and change nothing. Raises Gone."""
        try:
            return pagemap.changed(self._read(address_space.anonymous(self.pid)), self._before or {})
        except OSError:
            raise Gone from None

    def close(self) -> None:
        """End tracking. Nothing remains of it in the process."""
        for fd in (self._pagemap, self._clear, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._clear = self._pidfd = -1

    def _require_possible(self) -> None:
        """Raises TrackingFailed, OSError."""
        if layout.size(address_space.anonymous(self.pid)) > _MOST:
            raise TrackingFailed(f"has more than {_MOST >> 30} GiB of address space")
        if direct_io.is_asynchronous(self.pid):
            raise TrackingFailed(ASYNCHRONOUS)
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                file = os.readlink(f"/proc/{self.pid}/fd/{name}")
            except FileNotFoundError:
                continue  # it was closed
            if file.endswith(("/clear_refs", "/pagemap")):
                raise TrackingFailed("tracks the writes of processes itself")

    def _read(self, ranges: list[Range]) -> pagemap.Pieces:
        """Raises OSError."""
        parts = pagemap.buffers(layout.unite(ranges))
        pagemap.fill(self._pagemap, parts)
        return pagemap.pieces(parts)

    def _clear_and_read(self) -> pagemap.Pieces:
        """Clear the soft-dirty bits, and return the entries of all pages. Raises OSError."""
        _split(self._pidfd, self._read(address_space.anonymous(self.pid)))
        os.write(self._clear, _CLEAR_SOFT_DIRTY)
        return self._read(address_space.anonymous(self.pid))

    def _read_and_clear(self) -> pagemap.Pieces:
        """Return the entries, and clear the soft-dirty bits while nobody can write. Raises OSError.

        Where no page exists shortly before, no entries are read. A page that appears there meanwhile counts as changed
        in the next scan, because `_before` does not have it.
        """
        mappings = layout.unite(address_space.anonymous(self.pid))
        pieces = self._read(mappings)
        _split(self._pidfd, pieces)
        filled = layout.unite((piece, piece + pagemap.PIECE) for piece in pieces)
        parts = pagemap.buffers(layout.subtract(mappings, layout.subtract(mappings, filled)))

        def read() -> None:
            pagemap.fill(self._pagemap, parts)

        def read_and_clear() -> None:
            read()
            if not self._shares():
                os.write(self._clear, _CLEAR_SOFT_DIRTY)

        stopping.standing_still(self.pid, _TIMEOUT, read_and_clear, otherwise=read)
        return pagemap.pieces(parts)

    def _shares(self) -> bool:
        """Return whether another process of the container has the same address space. Raises OSError."""
        others = processes.descendants(self._init) - {self.pid}
        return any(_compare(self.pid, other) for other in others)


def _split(pidfd: int, pieces: pagemap.Pieces) -> None:
    """Split the huge pages of a process, as far as it can be done: not those that it shares or has locked."""
    places = [piece for piece, entries in pieces.items() if pagemap.is_huge(entries)]
    while places:
        count = min(_ADVICES, len(places))
        vector = b"".join(struct.pack("=QQ", place, PAGE) for place in places[:count])
        done = int(_LIBC.syscall(_SYS_PROCESS_MADVISE, pidfd, vector, ctypes.c_size_t(count), _MADV_COLD, 0))
        del places[: max(1, done // PAGE)]  # it stops at the first that it refuses


def _compare(pid: int, other: int) -> bool:
    """Return whether two processes have the same address space; kcmp(2). Raises OSError."""
    result = int(_LIBC.syscall(_SYS_KCMP[os.uname().machine], pid, other, _KCMP_VM, 0, 0))
    if result < 0 and (number := ctypes.get_errno()) != errno.ESRCH:
        raise OSError(number, f"kcmp: {os.strerror(number)}")
    return result == 0


@functools.cache
def support() -> str:
    """Return why this kernel cannot track writes, "" if it can."""
    if os.uname().machine not in _SYS_KCMP or os.sysconf("SC_PAGE_SIZE") != PAGE:
        return "this processor is not supported"
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        view = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(view)
        del view
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                entry = struct.unpack("=Q", os.pread(file.fileno(), pagemap.ENTRY, address // PAGE * pagemap.ENTRY))[0]
        except (OSError, struct.error):
            return "/proc/self/pagemap cannot be read"
    if not entry & pagemap.SOFT_DIRTY:
        return "the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)"
    return "" if entry & pagemap.FRAME else "page frames cannot be seen (CAP_SYS_ADMIN)"
