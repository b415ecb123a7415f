"""Messages of netlink(7) and their attributes, as sent to the kernel and received from it."""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

REQUEST, ACK, DUMP, CREATE, EXCL, APPEND = 0x1, 0x4, 0x300, 0x400, 0x200, 0x800
NESTED = 0x8000
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LARGEST = 1 << 18


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Return a request with its header."""
    return _HEADER.pack(_HEADER.size + len(body), kind, REQUEST | flags, sequence, 0) + body


def answers(sock: socket.socket, first: int, last: int) -> Iterator[bytes]:
    """Yield the answers to the requests numbered `first` to `last`, without headers, until the last one is answered.

    Raises OSError, with the kernel's errno for the first request that is refused.
    """
    while True:
        data = sock.recv(_LARGEST)
        while data:
            length, kind, _, sequence, _ = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (0,) * 5
            if not _HEADER.size <= length <= len(data):
                raise OSError(errno.EPROTO, "the kernel's answer is malformed")
            body, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
            if not first <= sequence <= last:
                continue
            if kind == _ERROR and (number := -struct.unpack_from("=i", body)[0]):
                raise OSError(number, os.strerror(number))
            if kind not in (_ERROR, _DONE):
                yield body
            elif sequence == last:
                return


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and value of each attribute, up to a malformed one."""
    while len(data) >= 4:
        length, number = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield number & ~NESTED, data[4:length]
        data = data[(length + 3) & ~3 :]
