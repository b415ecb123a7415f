"""Memory as it travels: the payload of a MEMORY or PAGES frame is a body, as it is or compressed.

That of a MEMORY frame is told in memory/layout.py, that of a PAGES frame is a piece of CRIU's page stream.

    u8 0 | body
    u8 1 | u32 size of the body, big endian | one zstd frame

The sender decides for each body. The receiver believes the u32 only up to the limit for bodies, and makes no more room
than that.
"""

import struct
import time
from collections.abc import Iterable

from migrate.errors import MigrateError, ProtocolError
from migrate.model import Compression
from migrate.wire import digests, zstd
from migrate.wire.frames import MAX_MEMORY
from migrate.wire.native import Buffer
from runtime.light.records import Record

PLAIN, ZSTD = 0, 1
OFFER = "zstd"  # the name of this compression among what a host offers
_PLAIN_HEAD = bytes([PLAIN])
_ZSTD_HEAD = struct.Struct(">BI")
MAX_BODY = MAX_MEMORY - _ZSTD_HEAD.size
_SAMPLE = 1 << 20  # bytes on which compression is tried
_AGAIN = 64 << 20  # bytes after which it is tried again
_SETTLED = 4 << 20  # bytes that the connection takes before its own speed shows: more than sshd's window of 2 MiB
_MEASURED = 4 << 20  # bytes whose time is measured then,
_LONG_ENOUGH = 0.25  # or seconds
_GAIN = 0.85  # of the time without compression must suffice with it
_WORTH = 15 / 16  # of a body: if it does not become smaller than that it is sent as it is


def offers() -> tuple[str, ...]:
    """Return the names of the digests and compressions that this host computes."""
    return (*digests.available(), *([OFFER] if zstd.is_available() else []))


def settle(wanted: Compression, theirs: Iterable[str], host: str) -> Compression:
    """Return the compression for a move to `host`, which offers `theirs`: none where one end cannot, unless it must.

    Raises MigrateError if it was asked for and one end lacks the library.
    """
    lacking = "this host" if not zstd.is_available() else host if OFFER not in theirs else ""
    if not lacking:
        return wanted
    if wanted is Compression.ZSTD:
        raise MigrateError(
            f"--compress zstd: {lacking} does not have the library libzstd.so.1",
            remedy="apt-get install libzstd1 there, or use --compress auto",
        )
    return Compression.NONE


class Trial(Record):
    """What compressing some bytes of memory has cost and brought."""

    size: int = 0
    compressed: int = 0
    seconds: float = 0.0

    def pays(self, bandwidth: float) -> bool:
        """Return whether compressing and sending takes less time than sending at `bandwidth` bytes per second."""
        return self.seconds + self.compressed / bandwidth < self.size / bandwidth * _GAIN


class Packer:
    """Turns bodies into payloads. It is told what sending them has cost, and compresses if that pays."""

    def __init__(self, compress: Compression) -> None:
        """Raises MigrateError if compression is asked for and the library is missing."""
        self._compressor = None if compress is Compression.NONE else zstd.Compressor()
        self.compresses = compress is Compression.ZSTD
        self._room = bytearray(zstd.bound(MAX_BODY)) if self._compressor is not None else bytearray()
        self._trial = Trial()
        self._sent = 0  # bytes since compression was tried first, or again
        self._measured, self._took = 0, 0.0  # bytes and seconds of sending, once the connection has settled

    def pack(self, body: Buffer) -> tuple[Buffer, ...]:
        """Return the parts of a payload. They are valid until the next call."""
        if self._compressor is None or not body:
            return _PLAIN_HEAD, body
        if self.compresses:
            size = self._compressor.compress(body, self._room)
            if not size or size > len(body) * _WORTH:
                return _PLAIN_HEAD, body
            return _ZSTD_HEAD.pack(ZSTD, len(body)), memoryview(self._room)[:size]
        if self._sent > _SETTLED and self._trial.size < _SAMPLE:  # a short stream does not pay for the trial
            self._try(body)
        return _PLAIN_HEAD, body

    def _try(self, body: Buffer) -> None:
        assert self._compressor is not None
        begun = time.thread_time()
        size = self._compressor.compress(body, self._room) or len(body)
        trial, seconds = self._trial, time.thread_time() - begun
        self._trial = Trial(trial.size + len(body), trial.compressed + size, trial.seconds + seconds)

    def sent(self, size: int, seconds: float) -> None:
        """Take note that sending `size` bytes took `seconds`, with the wait for a bandwidth limit."""
        if self._compressor is None or self.compresses:
            return
        self._sent += size
        if self._sent <= _SETTLED:
            return
        self._measured, self._took = self._measured + size, self._took + seconds
        if (self._measured < _MEASURED and self._took < _LONG_ENOUGH) or self._trial.size < _SAMPLE:
            return
        if self._trial.pays(self._measured / max(self._took, 1e-6)):
            self.compresses = True
        elif self._measured >= _AGAIN:
            self._trial, self._measured, self._took = Trial(), 0, 0.0


class Unpacker:
    """Turns payloads into bodies."""

    def __init__(self) -> None:
        self._decompressor: zstd.Decompressor | None = None
        self._room = memoryview(b"")

    def unpack(self, payload: Buffer) -> memoryview:
        """Return the body, which is valid until the next call.

        Raises ProtocolError for a payload that is malformed, damaged, or too large.
        """
        view = memoryview(payload)
        if len(view) and view[0] == PLAIN:
            return view[1:]
        if len(view) < _ZSTD_HEAD.size or view[0] != ZSTD:
            raise ProtocolError("a piece of memory is in an unknown form")
        _, size = _ZSTD_HEAD.unpack_from(view)
        if not 0 < size <= MAX_BODY:
            raise ProtocolError(f"a piece of memory claims {size} bytes, more than {MAX_BODY}")
        if self._decompressor is None:
            if not zstd.is_available():
                raise ProtocolError("a piece of memory is compressed, and libzstd.so.1 is missing here")
            self._decompressor, self._room = zstd.Decompressor(), memoryview(bytearray(MAX_BODY))
        body = self._room[:size]
        self._decompressor.decompress(view[_ZSTD_HEAD.size :], body)
        return body
