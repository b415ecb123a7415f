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
    """Takes bytes in pieces of any size, and yields whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[FrameType, bytes]]:
        """Take `data`, and yield each frame that is now complete. Raises ProtocolError."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                number, length = _HEADER.unpack_from(self._buffer, start)
                try:
                    kind = FrameType(number)
                except ValueError:
                    raise ProtocolError(f"a frame of unknown type {number} came over the connection") from None
                if length > _LIMITS[kind]:
                    raise ProtocolError(f"a {kind.name} frame of {length} bytes is over the limit of {_LIMITS[kind]}")
                end = start + _HEADER.size + length
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[start + _HEADER.size : end])
                start = end
                yield kind, payload
        finally:
            del self._buffer[:start]
