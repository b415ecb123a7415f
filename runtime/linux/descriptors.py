"""Own descriptors, and read and write those that other programs share.

O_NONBLOCK belongs to the open file, not to the descriptor: every program that shares the file can set it at any time.
rsync does so with its remote shell's stdout, Node.js with a terminal. A call that would block waits here instead of
failing.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self


class Owned:
    """Descriptors and sockets of one owner: leaving the `with` closes all of them, on every way out."""

    def __init__(self) -> None:
        self._items: list[int | socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fd(self, fd: int) -> int:
        """Own a descriptor."""
        self._items.append(fd)
        return fd

    def socket(self, sock: socket.socket) -> socket.socket:
        """Own a socket."""
        self._items.append(sock)
        return sock

    def pipe(self) -> tuple[int, int]:
        """Make a pipe, and own both ends: (read end, write end)."""
        reader, writer = os.pipe()
        return self.fd(reader), self.fd(writer)

    def close(self) -> None:
        """Close everything; harmless when that is done."""
        while self._items:
            item = self._items.pop()
            if isinstance(item, int):
                os.close(item)
            else:
                item.close()


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however long that takes. Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            _wait(fd, writable=True)


def read_some(fd: int, size: int) -> bytes:
    """Return the next bytes, `size` at most, however long they take; b"" at end of file. Raises OSError."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            _wait(fd, writable=False)


def _wait(fd: int, *, writable: bool) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT if writable else select.POLLIN)
    poll.poll()
