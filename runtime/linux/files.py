"""Replace a file atomically; read, write and watch cgroup files."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def replace(path: str, data: bytes, *, durable: bool = False, mode: int = 0o600) -> None:
    """Write a file so that a reader sees the old contents or the new, whole: write a neighbour, then rename it.

    `durable`: wait until the disk has the data, before the rename. Raises OSError, which names `path`.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            left = memoryview(data)
            while left:  # a full disk takes what fits, and rejects the rest
                left = left[os.write(fd, left) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass  # it was not made
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise


def read(path: str) -> str:
    """Return the file's stripped text. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_again(fd)
    finally:
        os.close(fd)


def read_again(fd: int) -> str:
    """Return the current stripped text of an open file. Raises OSError, ENODEV if its cgroup has been removed."""
    parts, place = [], 0
    while part := os.pread(fd, 1 << 16, place):
        parts.append(part)
        place += len(part)
    return b"".join(parts).decode(errors="replace").strip()


def write(path: str, value: str) -> None:
    """Write to an existing file, without O_CREAT, which the kernel would answer with EACCES. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def flat_keyed(text: str) -> dict[str, int]:
    """Parse lines of a name and a number; leave all other lines out."""
    pairs = [line.split() for line in text.splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def number_list(text: str) -> list[int]:
    """Return the numbers of a list such as "0-2,7" (cpuset(7), formats). Raises ValueError."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return [number for low, _, high in ranges for number in range(int(low), int(high or low) + 1)]


def wait_until(path: str, holds: Callable[[dict[str, int]], bool], timeout: float) -> bool:
    """Wait until `holds` is true of a flat keyed file of version 2; return False after `timeout` seconds.

    The kernel wakes pollers of such a file when it changes (cgroup-v2.rst, "A file modified event"). Raises OSError.
    """
    import select

    deadline = time.monotonic() + timeout
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        while not holds(flat_keyed(read_again(fd))):
            rest = deadline - time.monotonic()
            if rest <= 0:
                return False
            poll.poll(rest * 1000)
        return True
    finally:
        os.close(fd)
