"""Reading and writing descriptors that we have inherited, or share with other programs.

O_NONBLOCK belongs to the open file, not to the descriptor: whoever shares the file can set it at any time. rsync does
so with its remote shell's stdout, Node.js with a terminal. So a call that would block waits here, instead of failing.
"""

from __future__ import annotations

import os
import select


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however long that takes. Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            _wait(fd, select.POLLOUT)


def read_some(fd: int, size: int) -> bytes:
    """The next bytes, `size` at most, however long they take to come; b"" at the end. Raises OSError."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            _wait(fd, select.POLLIN)


def _wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()
