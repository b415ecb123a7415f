"""Read the errors in CRIU's log."""

import os
import re
from pathlib import Path

from criu_rpc import causes

# With a time, except from CRIU's code inside the processes (pie), and with the pid of a restored process.
_ERROR = re.compile(r"^(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?Error\s+\(([^)]*)\):\s*(.*)$")
_TAIL = 256 << 10
_MOST, _LONGEST = 100, 500


def error_lines(text: str, *, count: int = _MOST) -> tuple[str, ...]:
    """Return the last `count` error lines, oldest first, without time stamps and without noise."""
    found = []
    for line in text.splitlines():
        match = _ERROR.match(line)
        if match and not causes.is_noise(match[2]):
            found.append(_printable(match[2].strip()))
    return tuple(found[-count:])


def _printable(line: str) -> str:
    """Return a line of bounded length, printable because the container chooses the names of files in it."""
    return "".join(character if character.isprintable() else "?" for character in line[:_LONGEST])


def tail(directory_fd: int, name: str) -> tuple[tuple[str, ...], Path | None]:
    """Return the error lines of the log `name` in an open directory, and its path; ((), None) without a log."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
    except OSError:
        return (), None
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        file.seek(max(0, size - _TAIL))
        lines = error_lines(file.read().decode(errors="replace"))
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
    return lines, path
