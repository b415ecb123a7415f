"""Which pages of a process were written: userfaultfd's asynchronous write protection, from outside.

A userfaultfd(2) is made inside the process (injector.py) and taken out of it by pidfd_getfd(2). Its private anonymous
mappings are registered from here. PAGEMAP_SCAN (Linux 6.7) then reports what was written, and protects it again in the
same step. A write to a protected page costs the program some 1.2 us once in each round, and is not seen by it.

What is mapped since the last scan is not registered: `scan` reports all of its pages, and registers it. The process
stands still for that moment, 0.1 ms as a rule. Otherwise it could put another mapping there meanwhile, of which only a
part would be registered: the kernel would split it, and the program's mremap(2) of it would fail with EFAULT. Or it
could carry protected pages there by mremap(2), which would look as if they had not changed.
(include/uapi/linux/{userfaultfd,fs}.h; Documentation/admin-guide/mm/pagemap.rst)
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from migrate.memory import address_space, direct_io, injection, layout, stopping, uffd
from migrate.memory.injector import Injector
from migrate.memory.layout import Range
from migrate.memory.tracking import ASYNCHRONOUS, Gone, TrackingFailed

_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING = 1
_WPALLOWED, _WRITTEN, _PRESENT, _SWAPPED = 1, 2, 8, 16
_SCAN = struct.Struct("=12Q")
_REGIONS = 16384  # that one call reports
_TIMEOUT = 0.05  # seconds for all threads to stop


class WriteProtection:
    """The writes of one process."""

    def __init__(self, pid: int, injector: Injector) -> None:
        """Begin to track. Raises TrackingFailed; the process is unchanged then."""
        self.pid = pid
        self._regions = (ctypes.c_uint64 * (3 * _REGIONS))()
        self._registered: list[Range] = []
        self._again: list[Range] = []  # what the next scan reports in any case
        self._uffd = self._pagemap = -1
        try:
            if direct_io.is_asynchronous(pid):
                raise TrackingFailed(ASYNCHRONOUS)
            self._uffd = injector.userfaultfd(pid)
            uffd.enable(self._uffd, uffd.WRITES)
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise TrackingFailed(str(error)) from None

    def scan(self) -> list[Range]:
        """Return the pages written since the last scan, at first all that exist, and protect them. Raises Gone."""
        try:
            mappings = address_space.anonymous(self.pid)
            is_first = not self._registered
            found = [] if is_first else self._unregistered(mappings)
            if found or mappings != self._registered:
                found += self._register_all(report=not is_first)
                mappings = self._registered or mappings
            protected = self._protect(mappings)
            return layout.unite(self._report(mappings, 0, 0) if is_first else found + protected)
        except OSError:
            raise Gone from None

    def _protect(self, mappings: Sequence[Range]) -> list[Range]:
        """Return the pages that were written, and protect those that no device may write. Raises OSError."""
        again, self._again = self._again, []
        if direct_io.is_asynchronous(self.pid):
            return self._report(mappings, 0, 0)
        if direct_io.is_used(self.pid):
            return again + stopping.standing_still(
                self.pid,
                _TIMEOUT,
                lambda: self._report(mappings, _WP_MATCHING, _WRITTEN),
                otherwise=lambda: self._report(mappings, 0, _WRITTEN),
            )
        found = self._report(mappings, _WP_MATCHING, _WRITTEN)
        if direct_io.is_used(self.pid):  # since when is not known
            self._again = found
        return again + found

    def written(self) -> list[Range]:
        """Return the same of a frozen process, and change nothing. Raises Gone."""
        try:
            mappings = address_space.anonymous(self.pid)
            return layout.unite(self._again + self._unregistered(mappings) + self._report(mappings, 0, _WRITTEN))
        except OSError:
            raise Gone from None

    def _register_all(self, *, report: bool) -> list[Range]:
        """Register all mappings, and return the pages of those that are new if `report`. Raises OSError.

        A process that does not stop is left as it is: what is new is reported again in the next scan.
        """

        def register() -> list[Range]:
            mappings = address_space.anonymous(self.pid)
            found = self._unregistered(mappings) if report else []
            self._register(layout.unite(mappings))
            self._registered = address_space.anonymous(self.pid)  # the kernel has joined some of them
            return found

        return stopping.standing_still(self.pid, _TIMEOUT, register, otherwise=list)

    def _unregistered(self, mappings: Sequence[Range]) -> list[Range]:
        return self._report(mappings, 0, _WPALLOWED, inverted=_WPALLOWED)

    def _register(self, mappings: Sequence[Range]) -> None:
        for start, end in mappings:
            try:
                uffd.register(self._uffd, start, end, uffd.WRITE_PROTECT)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise
                # Unmapped meanwhile, or of a kind that cannot be registered: its pages count as written.

    def _report(self, mappings: Sequence[Range], flags: int, mask: int, *, inverted: int = 0) -> list[Range]:
        """Return pages with memory in them that match a mask of PAGEMAP_SCAN. Raises OSError."""
        found: list[Range] = []
        regions, place = self._regions, ctypes.addressof(self._regions)
        for start, end in mappings:
            while start < end:
                fields = (flags, start, end, 0, place, _REGIONS, 0, inverted, mask, _PRESENT | _SWAPPED, 0)
                request = bytearray(_SCAN.pack(_SCAN.size, *fields))
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, request)
                found += [(regions[3 * i], regions[3 * i + 1]) for i in range(count)]
                start = _SCAN.unpack(request)[4]
                if not start:
                    raise ProcessLookupError(errno.ESRCH, "the address space is gone")
        return found

    def close(self) -> None:
        """End tracking, which takes 17 ms for each GiB of a process that lives."""
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1


def support() -> str:
    """Return why this kernel cannot track writes, "" if it can."""
    if not _is_known():
        return "this processor is not supported"
    fd = -1
    try:
        fd = uffd.create(uffd.USER_MODE_ONLY)
        uffd.enable(fd, uffd.WRITES)
    except OSError:
        return "the kernel's userfaultfd cannot track writes (Linux 6.7 and later can)"
    finally:
        if fd >= 0:
            os.close(fd)
    return ""


def _is_known() -> bool:
    return injection.is_possible() and os.sysconf("SC_PAGE_SIZE") == layout.PAGE
