"""Access a thread's own files in the host's /proc, for a process that enters a container.

A container can have anything at /proc: a write to its /proc/self/attr/exec could end in a file of the container, so
that the program would run without its label, or in a dangerous file of the kernel (CVE-2019-19921, CVE-2025-52881).
The host's /proc, opened before, also shows a process that has entered a pid namespace below the host's.
"""

from __future__ import annotations

import os

from runtime.errors import StartFailed
from runtime.linux import syscalls


class OwnProc:
    """The host's /proc. Close it before opening any path of the container, where /proc/self/fd/N would lead to it.

    Raises StartFailed if /proc is not a proc file system.
    """

    def __init__(self) -> None:
        self._fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if not syscalls.is_procfs(self._fd):
            raise StartFailed("/proc: is not a proc file system")

    def close(self) -> None:
        os.close(self._fd)

    def _open(self, name: str, flags: int) -> int:
        return syscalls.open_below(self._fd, f"thread-self/{name}", flags)

    def has(self, name: str) -> bool:
        """Return whether this thread has a file of that name."""
        try:
            os.close(self._open(name, os.O_PATH))
        except FileNotFoundError:
            return False
        return True

    def write(self, name: str, value: str) -> None:
        """Write to a file of this thread. Raises OSError."""
        fd = self._open(name, os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """Return the stripped text of a file of this thread. Raises OSError."""
        fd = self._open(name, os.O_RDONLY)
        try:
            return os.read(fd, 4096).decode().strip()
        finally:
            os.close(fd)
