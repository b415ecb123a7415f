"""The page handler's worker: serve page faults, follow events, and fill the rest of the memory in the background.

One loop, without threads. It may be killed between any two instructions: what it knows is in the log of events
(event_log.py), in the shared numbers (control.py), and in the kernel's page tables. A successor makes a new worker from
those. Descriptors are plain numbers (uffd.py says why).
"""

import contextlib
import errno
import os
import select
import socket
import stat
import time
from pathlib import Path

from criu_rpc.errors import Error
from migrate.errors import TargetError
from migrate.limits import HANDLER_PAUSE, HANDLER_RETRY
from migrate.memory import ending, lazy_ranges, uffd
from migrate.memory.control import NONE, Control, Word
from migrate.memory.event_log import EventLog, Kind
from migrate.memory.filler import Filler
from migrate.memory.image_source import ImageSource
from migrate.memory.layout import PAGE
from migrate.memory.sources import Source, StoreSource, Unreadable
from migrate.memory.store import INDEX, Pages
from migrate.memory.tables import Table, Tables
from migrate.memory.uffd import Outcome
from runtime.state import lazy

LOAD, RESUMED = b"l", b"r"  # what the agent says
READY, LOADED, FAILED = b"s", b"k", b"e"  # what it hears; FAILED with a text
SOCKET = "lazy-pages.socket"  # beside the images, where CRIU looks for it

_BURST = 64  # events of one address space that are read before faults are served
_NOTE_PERIOD = 0.25


class Worker:
    """`step` until `is_over`."""

    def __init__(self, control: Control, images: Path, note: Path) -> None:
        """Begin, or continue what a killed worker has begun; `note` is in the container's directory. Raises OSError."""
        self._control, self._images, self._directory = control, images, note.parent
        self._faults: dict[tuple[int, int], None] = {}  # descriptor and page of threads that wait, oldest first
        self._noted = 0.0
        self._pause = 0.0
        self._log: EventLog | None = None
        self._tables = Tables({})
        self._filler: Filler | None = None
        self._is_ended = False
        self._poll = select.poll()
        if control[Word.AGENT] != NONE:
            self._poll.register(control[Word.AGENT], select.POLLIN)
        if control[Word.LOG] != NONE:
            self._take_up()
        if control[Word.COMMAND]:
            self._obey()

    def _take_up(self) -> None:
        """Read the log, and where the memory is."""
        control = self._control
        self._log = EventLog(control[Word.LOG])
        self._tables = self._log.replay()
        closing = control[Word.CLOSING]
        if closing != NONE and closing not in self._tables.open:
            with contextlib.suppress(OSError):  # it is closed already
                os.close(closing)
        control[Word.CLOSING] = NONE
        size = os.fstat(control[Word.DONE]).st_size
        done = uffd.view(uffd.map_shared(control[Word.DONE], size), size)
        self._filler = Filler(self._source(), done, self._tables)
        if control[Word.RESUMED]:
            self._filler.start_freeing()
        if control[Word.CRIU] == NONE and control[Word.LISTENING] != NONE:
            control[Word.CRIU] = _accepted()
        if control[Word.CRIU] != NONE:
            self._poll.register(control[Word.CRIU], select.POLLIN)
            self._stop_listening()
        elif control[Word.LISTENING] != NONE:
            self._poll.register(control[Word.LISTENING], select.POLLIN)
        for fd in self._tables.open:
            self._poll.register(fd, select.POLLIN)
            uffd.wake_all(fd)  # faults that were read and not served are reported again

    def _source(self) -> Source:
        control = self._control
        index = _contents(control[Word.INDEX])
        if control[Word.DIGESTS] != NONE:
            return ImageSource.parse(index, _contents(control[Word.DIGESTS]))
        return StoreSource(Pages.parse(control[Word.DATA], index))

    def watch(self, fd: int) -> None:
        """Let `step` return when this descriptor can be read, too."""
        self._poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        """Watch it no longer."""
        self._poll.unregister(fd)

    def let_go(self) -> None:
        """Unmap the log, in a clone that does not need it; the descriptors are the other process's, too."""
        if self._log is not None:
            self._log.unmap()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do: everything is in place, or the processes are gone."""
        if self._control[Word.FAILED]:
            return self._is_ended
        if self._tables.open:
            return False
        return self._tables.finished or self._has_failed or (self._is_alone and self._control[Word.CRIU] == NONE)

    @property
    def _is_alone(self) -> bool:
        """Whether the agent has ended."""
        return self._control[Word.AGENT] == NONE

    @property
    def _has_failed(self) -> bool:
        """Whether CRIU has ended in the middle of the restore: the processes are dead, or will be killed."""
        control = self._control
        return not self._tables.finished and control[Word.LISTENING] == control[Word.CRIU] == NONE

    @property
    def _may_fill(self) -> bool:
        """Whether memory may be filled that no thread waits for: all of it is registered, and the container runs.

        Without an agent nobody says that it runs. After a failure this finds out when the processes are gone.
        """
        if self._tables.finished:
            return self._is_alone or bool(self._control[Word.RESUMED])
        return self._has_failed

    def step(self) -> set[int]:
        """Wait for something to do, and do it; return those of the watched descriptors that can be read."""
        ready = {fd for fd, _ in self._poll.poll(self._patience())}
        self._pause = 0.0
        control = self._control
        if control[Word.AGENT] in ready:
            self._hear()
        if control[Word.LISTENING] in ready:
            self._accept()
        if control[Word.CRIU] in ready:
            self._read_criu()
        for fd in ready & self._tables.open.keys():
            self._read(fd)
        try:
            self._fill()
        except Unreadable as error:
            self._fail(str(error))
        self._write_note()
        return ready

    def _fill(self) -> None:
        """Serve those that wait for memory, and fill some that nobody waits for. Raises Unreadable."""
        if self._control[Word.FAILED]:
            self._end()
            return
        self._serve()
        if self._may_fill:
            self._advance()

    def _fail(self, words: str) -> None:
        """Memory cannot be read: nobody gets any from here on. Say so, and end the container."""
        control = self._control
        if control[Word.NOTE] != NONE:
            with contextlib.suppress(OSError):
                os.pwrite(control[Word.NOTE], *lazy.describe_failure(words))
        ending.tell(self._directory, f"the container is killed: {words}")
        control[Word.FAILED] = 1
        self._end()

    def _end(self) -> None:
        """Kill the container. Descriptors are closed when no process is left that would read zeros without them."""
        if not ending.end(self._directory):
            self._pause = HANDLER_PAUSE
            return
        for fd in list(self._tables.open):
            self._close(fd)
        self._is_ended = True

    def _patience(self) -> float | None:
        """Return how long to wait, in milliseconds; None if only for an event."""
        if self._pause:
            return self._pause * 1000
        if self._may_fill and self._tables.open:
            return 0
        return HANDLER_RETRY * 1000 if self._faults or any(t.is_unsettled for t in self._tables.open.values()) else None

    # The agent.

    def _hear(self) -> None:
        control = self._control
        fd = control[Word.AGENT]
        try:
            count = os.readv(fd, [control.first_byte(Word.COMMAND)])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            self._obey()
            return
        self._poll.unregister(fd)
        control[Word.AGENT] = NONE
        os.close(fd)

    def _obey(self) -> None:
        """Do what the agent says; doing it twice is harmless."""
        control = self._control
        command = bytes([control[Word.COMMAND] & 0xFF])
        if command == LOAD and control[Word.LOG] == NONE:
            try:
                self._load()
                self._answer(LOADED)
            except (Error, OSError) as error:
                self._answer(FAILED + str(error).encode())
        elif command == LOAD:
            self._answer(LOADED)
        elif command == RESUMED:
            control[Word.RESUMED] = 1
            if self._filler is not None:
                self._filler.start_freeing()
        control[Word.COMMAND] = 0

    def _answer(self, answer: bytes) -> None:
        if self._control[Word.AGENT] != NONE:
            with contextlib.suppress(OSError):  # it has ended, which comes as an end of file
                os.write(self._control[Word.AGENT], answer)

    def _load(self) -> None:
        """Read which memory is lazy. Raises TargetError if the source lacks some of it, CriuError, OSError."""
        control = self._control
        source, tables = self._open_images() if control[Word.DIGESTS] != NONE else self._open_store()
        control[Word.DONE] = os.memfd_create("pymigrate-page-blocks", os.MFD_CLOEXEC)
        os.ftruncate(control[Word.DONE], max(source.count, 1))
        control[Word.TOTAL] = sum(table.missing.size for table in tables.initial.values())
        control[Word.LEFT] = control[Word.TOTAL]
        write_note(control)
        log = EventLog.create(tables)
        log.unmap()
        control[Word.LOG] = log.fd
        self._take_up()

    def _open_store(self) -> tuple[Source, Tables]:
        tables = Tables(lazy_ranges.read(self._images))
        pages = Pages.open(self._images, os.O_RDWR)
        for space, table in tables.initial.items():
            ranges = [(start, end) for start, end, _ in table.missing]
            for start, end in pages.missing(space, ranges):
                raise TargetError(f"the store lacks {end - start} bytes of process {space} at {start:#x}")
        self._control[Word.DATA] = pages.data
        self._control[Word.INDEX] = os.open(self._images / INDEX, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return StoreSource(pages), tables

    def _open_images(self) -> tuple[Source, Tables]:
        source, tables = ImageSource.open(self._images, _contents(self._control[Word.DIGESTS]))
        self._control[Word.INDEX] = os.memfd_create("pymigrate-page-index", os.MFD_CLOEXEC)
        with open(self._control[Word.INDEX], "wb", closefd=False) as file:
            file.write(source.dump())
        return source, Tables(tables)

    # CRIU.

    def _accept(self) -> None:
        control = self._control
        listening = socket.socket(fileno=control[Word.LISTENING])
        try:
            connection, _ = listening.accept()
            control[Word.CRIU] = connection.detach()
        except OSError:
            return
        finally:
            listening.detach()
        self._poll.unregister(control[Word.LISTENING])
        self._poll.register(control[Word.CRIU], select.POLLIN)
        self._stop_listening()

    def _stop_listening(self) -> None:
        fd = self._control[Word.LISTENING]
        if fd != NONE:
            self._control[Word.LISTENING] = NONE
            os.close(fd)

    def _read_criu(self) -> None:
        log, tables, fd = self._rotated(), self._tables, self._control[Word.CRIU]
        before = dict(tables.initial)
        known = set(tables.open)
        try:
            goes_on = log.read_descriptor(fd, tables) if tables.pid else log.read_pid(fd, tables)
        except BlockingIOError:
            return
        except OSError:
            goes_on = False
        for new in tables.open.keys() - known:
            self._poll.register(new, select.POLLIN)
        if tables.finished and self._filler is not None:
            for table in before.values():  # zombies
                self._filler.release(table.space, table.pieces())
        if not goes_on or tables.finished:
            self._poll.unregister(fd)
            self._control[Word.CRIU] = NONE
            os.close(fd)

    # Address spaces.

    def _rotated(self) -> EventLog:
        """Return the log, a new one if it was full."""
        assert self._log is not None
        if self._log.is_full:
            old, self._log = self._log, EventLog.create(self._tables)
            self._control[Word.LOG] = self._log.fd
            old.close()
        return self._log

    def _read(self, fd: int) -> None:
        """Read events and faults of an address space."""
        assert self._filler is not None
        table = self._tables.open[fd]
        for _ in range(_BURST):
            try:
                found = self._rotated().read_event(fd, self._tables)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._pause = HANDLER_PAUSE  # its fork waits until another address space is complete
                return
            if found is None:
                return
            event, number, gone = found
            if event == uffd.PAGEFAULT:
                self._faults[fd, number & -PAGE] = None
            elif event == uffd.FORK:
                self._filler.add(self._tables.open[number])
                self._poll.register(number, select.POLLIN)
            self._filler.release(table.space, gone)

    def _is_settled(self, fd: int, table: Table) -> bool:
        """Return whether the table is right: no move waits for another event."""
        if not table.is_unsettled:
            return True
        assert self._filler is not None
        if uffd.is_quiet(fd):
            self._filler.release(table.space, self._rotated().note(Kind.QUIET, fd, self._tables))
            return True
        return not table.moves

    def _serve(self) -> None:
        """Let those threads go on that can."""
        for fd, address in list(self._faults):
            table = self._tables.open.get(fd)
            if table is not None:
                if not self._is_settled(fd, table):
                    continue
                assert self._filler is not None
                outcome = self._filler.fault(fd, table, address)
                if outcome is Outcome.GONE:
                    self._close(fd)
                elif outcome is not Outcome.DONE:
                    if outcome is Outcome.NO_MEMORY:
                        self._pause = HANDLER_PAUSE
                    continue
            del self._faults[fd, address]

    def _advance(self) -> None:
        """Fill a block of the first address space that can take it; close those that are complete."""
        assert self._filler is not None
        tables = self._tables.open
        pause = HANDLER_RETRY
        for fd, table in list(tables.items()):
            if not self._is_settled(fd, table):
                continue
            if not table.missing:
                self._close(fd)
                pause = 0.0
                continue
            outcome = self._filler.advance(fd, table)
            if outcome is Outcome.DONE:
                return
            if outcome is Outcome.GONE:
                self._close(fd)
            elif outcome is Outcome.NO_MEMORY:
                pause = HANDLER_PAUSE
        self._pause = max(self._pause, pause if tables else 0.0)

    def _close(self, fd: int) -> None:
        """Close an address space: it is complete, or gone. The kernel then serves its faults itself, with zeros."""
        assert self._filler is not None
        table = self._tables.open[fd]
        self._filler.release(table.space, table.pieces())
        self._control[Word.CLOSING] = fd
        self._rotated().note(Kind.CLOSED, fd, self._tables)
        self._poll.unregister(fd)
        os.close(fd)
        self._control[Word.CLOSING] = NONE

    def _write_note(self) -> None:
        control = self._control
        if self._filler is None or control[Word.LEFT] == self._filler.left:
            return
        control[Word.LEFT] = self._filler.left
        now = time.monotonic()
        if now - self._noted > _NOTE_PERIOD:
            self._noted = now
            write_note(control)


def _contents(fd: int) -> bytes:
    """Return all that is in a file."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read()


def write_note(control: Control) -> None:
    """Write into the note how many bytes are left, of how many, and the process group of the page handler."""
    if control[Word.NOTE] != NONE:
        with contextlib.suppress(OSError):  # a full file system: only the figure is old
            os.pwrite(control[Word.NOTE], lazy.describe(control[Word.LEFT], control[Word.TOTAL], os.getpgrp()), 0)


def _accepted() -> int:
    """Return the connection of CRIU's that a killed worker has accepted and not noted; NONE if there is none."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
        except OSError:
            continue  # the descriptor that listed the directory
        sock = socket.socket(fileno=int(name))
        try:
            place = sock.getsockname()
            is_criu = sock.family == socket.AF_UNIX and isinstance(place, str) and place.endswith(SOCKET)
            if is_criu and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return int(name)
        finally:
            sock.detach()
    return NONE
