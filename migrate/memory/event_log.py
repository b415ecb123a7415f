"""What the page handler has learned, in memory that outlives each of its processes.

A log is a file in memory: a snapshot of the tables (tables.py), then slots that are appended. The kernel writes what is
read straight into the next slot, and only then the slot counts, so nothing that was read can be lost with its reader:

    u64 number of slots that count | u64 size of the snapshot | slots | snapshot

A slot, 64 bytes: u32 kind, u32 descriptor that was read from, 56 bytes that depend on the kind:
    EVENT       struct uffd_msg. One that is a PAGEFAULT never counts: the thread waits, and faults again when woken
    PID         i32: CRIU names the process whose descriptor comes next; or a zombie, or the end
    DESCRIPTOR  u8 that comes with it, then struct cmsghdr with the descriptor
    QUIET       nothing is under way in this address space
    CLOSED      the descriptor is about to be closed
"""

import contextlib
import enum
import os
import struct
from typing import Self

from migrate.memory import uffd
from migrate.memory.tables import Piece, Tables

SLOTS = 4096
_HEAD, _SLOT = 64, 64
_START = struct.Struct("=II")
_PID = struct.Struct("=i")
_CONTROL = struct.Struct("=QiiI")  # struct cmsghdr with one descriptor: length, level, type, data
_CONTROL_AT, _CONTROL_SIZE = 16, 24  # in the slot
_FINISHED = 0x52535446  # CRIU's LAZY_PAGES_RESTORE_FINISHED


class Kind(enum.IntEnum):
    EVENT = 1
    PID = 2
    DESCRIPTOR = 3
    QUIET = 4
    CLOSED = 5


class EventLog:
    """One log; `fd` is its file. A full one is replaced by a new one, with a snapshot of the tables as they are."""

    def __init__(self, fd: int) -> None:
        """Open a log that `create` has made, in whichever process. Raises OSError."""
        self.fd, self._size = fd, os.fstat(fd).st_size
        self._address = uffd.map_shared(fd, self._size)
        uffd.lock(self._address, _HEAD + SLOTS * _SLOT)
        self._view = uffd.view(self._address, self._size)
        self._words = self._view[:_HEAD].cast("Q")

    @classmethod
    def create(cls, tables: Tables) -> Self:
        """Make a log that begins with these tables. Raises OSError."""
        snapshot = tables.dump()
        fd = os.memfd_create("pymigrate-page-events", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _HEAD + SLOTS * _SLOT + len(snapshot))
            os.pwrite(fd, struct.pack("=QQ", 0, len(snapshot)), 0)
            at = _HEAD + SLOTS * _SLOT
            while snapshot:
                written = os.pwrite(fd, snapshot, at)
                at, snapshot = at + written, snapshot[written:]
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def unmap(self) -> None:
        """Unmap the log, and leave its file open."""
        self._words.release()
        self._view.release()
        uffd.unmap(self._address, self._size)

    def close(self) -> None:
        """Unmap the log and close its file."""
        self.unmap()
        os.close(self.fd)

    @property
    def is_full(self) -> bool:
        """Whether another slot would not fit."""
        return self._words[0] >= SLOTS

    def replay(self) -> Tables:
        """Count the slot that a killed process has filled; return the tables that follow from the log."""
        if not self.is_full and self._is_filled(self._words[0]):
            self._words[0] += 1
        start = _HEAD + SLOTS * _SLOT
        tables = Tables.load(self._view[start : start + self._words[1]])
        for number in range(self._words[0]):
            self._apply(number, tables)
        return tables

    def read_event(self, fd: int, tables: Tables) -> tuple[int, int, list[Piece]] | None:
        """Read a userfaultfd: return event, address (of PAGEFAULT) or new descriptor (FORK), what is not missing now.

        None if there is nothing to read. Raises OSError.
        """
        slot = self._begin(Kind.EVENT, fd)
        try:
            if not os.readv(fd, [slot[8 : 8 + uffd.MESSAGE_SIZE]]):
                return None
        except BlockingIOError:
            return None
        event, first, second, _ = uffd.parse(slot[8 : 8 + uffd.MESSAGE_SIZE])
        if event == uffd.PAGEFAULT:
            return event, second, []
        return event, first, self._end(tables)

    def read_pid(self, fd: int, tables: Tables) -> bool:
        """Read from CRIU which process comes next; False at the end of the connection. Raises OSError."""
        slot = self._begin(Kind.PID, fd)
        with contextlib.suppress(ConnectionResetError):
            if os.readv(fd, [slot[8 : 8 + _PID.size]]) == _PID.size:
                self._end(tables)
                return True
        return False

    def read_descriptor(self, fd: int, tables: Tables) -> bool:
        """Read the descriptor of the process; False at the end of the connection. Raises OSError."""
        slot = self._begin(Kind.DESCRIPTOR, fd)
        at = self._address + _HEAD + self._words[0] * _SLOT
        if not uffd.receive_descriptor(fd, at + 8, at + _CONTROL_AT, _CONTROL_SIZE):
            return False
        if not self._is_filled(self._words[0]):
            raise OSError(0, "criu sent no descriptor")
        slot.release()
        self._end(tables)
        return True

    def note(self, kind: Kind, fd: int, tables: Tables) -> list[Piece]:
        """Add a slot of kind QUIET or CLOSED: return what is no longer missing."""
        self._begin(kind, fd)
        return self._end(tables)

    def _begin(self, kind: Kind, fd: int) -> memoryview:
        """Clear the next slot: an earlier page fault is in it, perhaps."""
        at = _HEAD + self._words[0] * _SLOT
        slot = self._view[at : at + _SLOT]
        slot[:4] = bytes(4)
        slot[8:] = bytes(_SLOT - 8)
        slot[4:8] = fd.to_bytes(4, "little" if _START.pack(1, 0)[0] else "big")
        slot[:4] = _START.pack(kind, 0)[:4]
        return slot

    def _end(self, tables: Tables) -> list[Piece]:
        number = self._words[0]
        self._words[0] = number + 1
        return self._apply(number, tables)

    def _is_filled(self, number: int) -> bool:
        at = _HEAD + number * _SLOT
        kind = _START.unpack(self._view[at : at + 8])[0]
        if kind == Kind.EVENT:
            return self._view[at + 8] not in (0, uffd.PAGEFAULT)
        if kind == Kind.PID:
            return bool(_PID.unpack(self._view[at + 8 : at + 12])[0])
        if kind == Kind.DESCRIPTOR:
            return bool(_CONTROL.unpack(self._view[at + _CONTROL_AT : at + _CONTROL_AT + _CONTROL.size])[0])
        return False

    def _apply(self, number: int, tables: Tables) -> list[Piece]:
        at = _HEAD + number * _SLOT
        slot = self._view[at : at + _SLOT]
        kind, fd = _START.unpack(slot[:8])
        if kind == Kind.EVENT:
            return tables.apply(fd, *uffd.parse(slot[8 : 8 + uffd.MESSAGE_SIZE]))
        if kind == Kind.PID:
            pid = _PID.unpack(slot[8:12])[0]
            tables.pid = 0 if pid < 0 or pid == _FINISHED else pid
            if pid == _FINISHED:
                tables.finished = True
                tables.initial.clear()
        elif kind == Kind.DESCRIPTOR:
            tables.add(_CONTROL.unpack(slot[_CONTROL_AT : _CONTROL_AT + _CONTROL.size])[3])
        elif kind == Kind.QUIET:
            return tables.open[fd].settled()
        elif kind == Kind.CLOSED:
            tables.open.pop(fd, None)
        return []
