"""Relay the page stream of a dump from CRIU into the connection, parsed as CRIU's page server would.

CRIU waits for an answer after opening each task's page map, and at the end. Asking the target would cost a round trip
per task while the container is frozen, so the answers are given here: a stop-and-copy dump has no parent image, and
size and digest (PagesEnd) show once, before anything is restored, whether the target has everything.

The stream (criu/page-xfer.c, struct page_server_iov): records {u32 command | flags << 16, pages, u64 address, u64
image}, and after an ADD with the flag PRESENT that many pages. `pages` is a u32 up to CRIU 4.1 and an aligned u64 from
4.2 on. The two are incompatible, which preflight checks.

CRIU sends all shared memory, whatever the target has of it. So the relay takes the pages of such an object out of the
stream (`Objects`), and says of each that it is lazy: the target has it, or it comes in a MEMORY frame.
"""

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from migrate.errors import DeadlineExceeded, ProtocolError
from migrate.limits import PAGES_CLOSE_TIMEOUT
from migrate.memory import layout
from migrate.memory.clean_pages import CleanPages
from migrate.memory.layout import Range
from migrate.wire import frames, protocol
from migrate.wire.carrier import Carrier
from migrate.wire.native import Buffer

_BUFFER = 64 << 20  # bytes that CRIU may be ahead of the connection
_SO_SNDBUFFORCE = 32
_RECORD_4_2 = struct.Struct("=I4xQQQ")
_RECORD_BEFORE = struct.Struct("=IIQQ")
_ADD, _HOLE, _OPEN2, _PARENT, _ADD_F = 1, 2, 4, 5, 6
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024
_HOLE_FLAG, _LAZY, _PRESENT = 1, 1 << 1, 1 << 2  # PE_PARENT, PE_LAZY, PE_PRESENT
_CLEAN = _ADD_F | _HOLE_FLAG << 16
_KIND_BITS = 8  # of `image`: the memory of the process with this pid, or the object of shared memory with this id
_PROCESS, _SHARED = 1, 2
_NO_PARENT, _HAS_PARENT = b"\0", b"\1"
_STATUS_OK = struct.pack("=i", 0)


def has_wide_records(version: tuple[int, ...]) -> bool:
    """Which of the two page-server protocols a CRIU speaks; both ends of a move must speak the same."""
    return version >= (4, 2)


class PageStream:
    """Parses the records in the stream of a CRIU of this version, and returns the answers that CRIU expects.

    `forward` takes what the target gets: the same stream, in which holes are filled (clean_pages.py).
    """

    def __init__(
        self, version: tuple[int, ...], forward: Callable[[Buffer], None], clean: CleanPages | None = None
    ) -> None:
        self._forward, self._clean = forward, clean
        self._format = _RECORD_4_2 if has_wide_records(version) else _RECORD_BEFORE
        self._record = b""
        self._waiting: list[Buffer] = []
        self._size = 0  # bytes in them
        self.lazy: dict[int, list[Range]] = {}  # pages that exist and do not come: pid in the container -> ranges
        self.opened: int | None = None  # the object of shared memory whose OPEN2 ended the last piece
        self._pages_left = 0  # bytes of pages before the next record
        self._page = resource.getpagesize()

    def feed(self, data: bytes) -> bytes:
        """Parse the next piece and return the answers to send now. Raises ProtocolError for an unknown record."""
        data, self._record = self._record + data if self._record else data, b""
        view = memoryview(data)
        start = position = 0  # of what is not forwarded, and not parsed
        answers = b""
        while position < len(data):
            self.opened = None
            if self._pages_left:
                step = min(self._pages_left, len(data) - position)
                self._pages_left -= step
                position += step
                continue
            end = position + self._format.size
            if end > len(data):
                self._record = data[position:]
                break
            word, pages, address, image = self._format.unpack_from(data, position)
            if word == _CLEAN and self._clean is not None:
                self._put(view[start:position])
                self._fill(self._clean, image, address, pages)
                start = end
            else:
                answers += self._take(word, pages, address, image)
            position = end
        self._put(view[start:position])
        self._flush()
        return answers

    def _put(self, piece: Buffer) -> None:
        """Forward a piece with those beside it: fragmented memory has many short ones."""
        if self._waiting and self._size + len(piece) > frames.CHUNK:
            self._flush()
        if piece:
            self._waiting.append(piece)
            self._size += len(piece)

    def _flush(self) -> None:
        if self._waiting:
            self._forward(self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting))
        self._waiting, self._size = [], 0

    def _fill(self, clean: CleanPages, image: int, address: int, pages: int) -> None:
        """Put what CRIU would have sent for a hole. Raises ProtocolError, OSError."""
        space = image >> _KIND_BITS
        for (start, end), is_lazy in clean.parts(space, address, address + pages * self._page):
            word = _ADD_F | (_LAZY if is_lazy else _PRESENT) << 16
            self._put(self._format.pack(word, (end - start) // self._page, start, image))
            if is_lazy:
                self.lazy.setdefault(space, []).append((start, end))
            else:
                for data in clean.read(space, start, end):
                    self._put(data)

    def _take(self, word: int, pages: int, address: int, image: int) -> bytes:
        command, flags = word & 0xFFFF, word >> 16
        if command == _ADD or (command == _ADD_F and flags & _PRESENT):
            self._pages_left = pages * self._page
        elif command == _ADD_F and flags & _LAZY and image & (1 << _KIND_BITS) - 1 == _PROCESS:
            self.lazy.setdefault(image >> _KIND_BITS, []).append((address, address + pages * self._page))
        elif command == _OPEN2:
            if image & (1 << _KIND_BITS) - 1 == _SHARED:
                self.opened = image >> _KIND_BITS
            return _HAS_PARENT if self._is_claimed(image) else _NO_PARENT
        elif command in (_PARENT, _CLOSE, _FORCE_CLOSE):
            return _STATUS_OK
        elif command not in (_ADD_F, _HOLE):
            raise ProtocolError(f"criu's page stream has a record of unknown kind {command:#x}")
        return b""

    def _is_claimed(self, image: int) -> bool:
        is_memory = image & (1 << _KIND_BITS) - 1 == _PROCESS
        return is_memory and self._clean is not None and self._clean.claim(image >> _KIND_BITS)

    def replaced(self, record: bytes) -> tuple[bytes, int, int] | None:
        """Return (the record without its pages, address, bytes of pages) for a record of pages of the object `opened`.

        Return None for any other record.
        """
        word, pages, address, image = self._format.unpack(record)
        if (word & 0xFFFF, image) != (_ADD_F, (self.opened or 0) << _KIND_BITS | _SHARED) or not word >> 16 & _PRESENT:
            return None
        lazy = (word >> 16 & ~_PRESENT | _LAZY) << 16 | _ADD_F
        return self._format.pack(lazy, pages, address, image), address, pages * self._page

    @property
    def record_size(self) -> int:
        """Bytes of a record."""
        return self._format.size


class Objects(Protocol):
    """The objects of shared memory that the target has, as they were some time ago.

    `buffer`: room for the pages of one block of memory (layout.py).
    """

    buffer: memoryview

    def begin(self, image: int) -> bool:
        """CRIU is about to send an object, which it has mapped; return whether the target has it."""
        ...

    def take(self, address: int, size: int) -> None:
        """Send what the target does not have of the first `size` bytes in the buffer, which are at this offset."""
        ...

    def end(self) -> None:
        """CRIU has sent all of the object."""
        ...


class PageRelay:
    """Relays the page stream of one dump to `carrier`, on its own thread.

    CRIU gets `criu_end`. `on_bytes` is called with the number of bytes sent so far. `objects` is shared memory that was
    sent before the freeze; `clean` are pages that CRIU may leave out.
    """

    def __init__(
        self,
        version: tuple[int, ...],
        carrier: Carrier,
        on_bytes: Callable[[int], None],
        objects: Objects | None = None,
        clean: CleanPages | None = None,
    ) -> None:
        self._stream = PageStream(version, carrier.put, clean)
        self._carrier, self._on_bytes, self._objects = carrier, on_bytes, objects
        self._ours, self.criu_end = socket.socketpair()
        with contextlib.suppress(PermissionError):
            self.criu_end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="page-relay", daemon=True)

    @property
    def lazy(self) -> dict[int, list[Range]]:
        """What exists and does not come in the stream (PageStream.lazy); complete after `finish`."""
        return self._stream.lazy

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            while data := self._ours.recv(frames.CHUNK):
                while data:
                    data = self._pass_on(data)
        except Exception as error:  # whatever it is: `finish` raises it
            self.failure = error
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)  # so that CRIU fails now, not at its own time-out

    def _pass_on(self, data: bytes) -> bytes:
        """Send a piece of the stream, and answer it. Return a record that has been read already, or b""."""
        answers = self._stream.feed(data)
        opened = self._stream.opened
        known = opened is not None and self._objects is not None and self._objects.begin(opened)
        if answers:
            self._ours.sendall(answers)
        self._on_bytes(self._carrier.size)
        return self._take_object() if known else b""

    def _take_object(self) -> bytes:
        """Take the pages of an object out of the stream. Return the record after them; b"" at the end of the stream."""
        assert self._objects is not None
        passed = bytearray()
        while True:
            record = self._receive(self._stream.record_size)
            found = self._stream.replaced(record) if record else None
            if found is None:
                break
            header, address, size = found
            passed += header
            if len(passed) >= frames.CHUNK:
                self._carrier.put(bytes(passed))
                passed.clear()
            for start, pages in layout.split([(address, address + size)]):
                self._fill(self._objects.buffer[: pages * layout.PAGE])
                self._objects.take(start, pages * layout.PAGE)
        self._objects.end()
        if passed:
            self._carrier.put(bytes(passed))
        return record

    def _receive(self, size: int) -> bytes:
        """Return the next bytes of the stream; b"" at its end. Raises ProtocolError if it ends among them."""
        room = memoryview(bytearray(size))
        first = self._ours.recv_into(room)
        if first:
            self._fill(room[first:])
        return bytes(room) if first else b""

    def _fill(self, room: memoryview) -> None:
        while room:
            size = self._ours.recv_into(room, 0, socket.MSG_WAITALL)
            if not size:
                raise ProtocolError("criu's page stream ends inside a record")
            room = room[size:]

    def finish(self, timeout: float) -> protocol.PagesEnd:
        """Wait until everything is sent, and return its size and digest. Raises the error that stopped the stream."""
        deadline = time.monotonic() + timeout
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise DeadlineExceeded("the memory pages were not sent in time")
        if self.failure is not None:
            raise self.failure
        self._carrier.flush(max(0.0, deadline - time.monotonic()))
        return protocol.PagesEnd(self._carrier.size, self._carrier.digest())

    def close(self) -> None:
        """End the stream in any state."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._carrier.close()
        if self._thread.is_alive():
            self._thread.join(PAGES_CLOSE_TIMEOUT)
        self._ours.close()
        self.criu_end.close()
