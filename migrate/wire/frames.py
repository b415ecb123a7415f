"""Frames: the units that travel between the two ends of a move, each with a kind, a length and a payload."""

import enum
import struct
from collections.abc import Iterator

from migrate.errors import ProtocolError

MAX_CALL = 4 << 20
MAX_REPLY = 1 << 20
MAX_FAILURE = 128 << 10
MAX_DATA = 1 << 20
MAX_MEMORY = 1 << 20
MAX_PULSE = 32
MAX_IMAGE = 1 << 40  # bytes of one image, in as many DATA frames as that takes
MAX_TRIAL = 256 << 20  # bytes of the bodies of all MEMORY frames of a trial
CHUNK = 256 << 10  # bytes that this version puts into one PAGES or DATA frame
_HEADER = struct.Struct(">BI")


class FrameType(enum.IntEnum):
    CALL = 1
    REPLY = 2
    FAILURE = 3
    PAGES = 4
    DATA = 5
    PULSE = 6
    MEMORY = 7


# Bytes of a payload. Decoded JSON takes at most 25 times as much memory: that is the figure for lists of lists.
_LIMITS = {
    FrameType.CALL: MAX_CALL,
    FrameType.REPLY: MAX_REPLY,
    FrameType.FAILURE: MAX_FAILURE,
    FrameType.PAGES: MAX_DATA,
    FrameType.DATA: MAX_DATA,
    FrameType.PULSE: MAX_PULSE,
    FrameType.MEMORY: MAX_MEMORY,
}


def header(kind: FrameType, length: int) -> bytes:
    """Return the five bytes that precede a payload of `length` bytes."""
    return _HEADER.pack(kind, length)


class FrameDecoder:
    """Puts frames together. Read into `room`, and say by `filled` how much has come; or `feed` bytes.

    Reading into the place where a payload belongs, instead of cutting payloads out of what was read, takes a quarter of
    the processor time.
    """

    def __init__(self) -> None:
        self._head = bytearray(_HEADER.size)
        self._buffer = bytearray(CHUNK)  # of payloads; as large as the largest so far
        self._kind: FrameType | None = None  # None: the header comes
        self._room, self._come = memoryview(self._head), 0

    def room(self) -> memoryview:
        """Return where the next bytes belong. It is never empty."""
        return self._room[self._come :]

    def filled(self, size: int) -> tuple[FrameType, memoryview] | None:
        """Take note that `size` bytes have come into `room`. Return the frame that is complete now, if one is.

        Its payload is valid until more comes. Raises ProtocolError.
        """
        self._come += size
        if self._come < len(self._room):
            return None
        if self._kind is None:
            self._kind, length = _parse(self._head)
            if length > len(self._buffer):
                self._buffer = bytearray(length)
            self._room, self._come = memoryview(self._buffer)[:length], 0
            if length:
                return None
        kind, payload = self._kind, self._room
        self._kind, self._room, self._come = None, memoryview(self._head), 0
        return kind, payload

    def feed(self, data: bytes) -> Iterator[tuple[FrameType, bytes]]:
        """Take `data`, and yield each frame that is now complete. Raises ProtocolError."""
        left = memoryview(data)
        while left:
            room = self.room()
            size = min(len(room), len(left))
            room[:size], left = left[:size], left[size:]
            if frame := self.filled(size):
                yield frame[0], bytes(frame[1])


def _parse(head: bytearray) -> tuple[FrameType, int]:
    """Return kind and length of a frame. Raises ProtocolError."""
    number, length = _HEADER.unpack(head)
    try:
        kind = FrameType(number)
    except ValueError:
        raise ProtocolError(f"a frame of unknown type {number} came over the connection") from None
    if length > _LIMITS[kind]:
        raise ProtocolError(f"a {kind.name} frame of {length} bytes is over the limit of {_LIMITS[kind]}")
    return kind, length
