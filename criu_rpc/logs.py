"""What CRIU's log says about a failure."""

import os
import re
from pathlib import Path

_ERROR = re.compile(r"^\(\d+\.\d+\)\s*(?:\d+:\s*)?Error\s+\(([^)]*)\):\s*(.*)$")
# Printed at every start without CAP_SYS_RESOURCE; CRIU goes on.
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE",)
_TAIL = 256 << 10


def error_lines(text: str, *, count: int = 5) -> tuple[str, ...]:
    """The last `count` error lines, oldest first, without time stamps and without harmless ones."""
    found = []
    for line in text.splitlines():
        match = _ERROR.match(line)
        if match and not match[2].startswith(_HARMLESS):
            found.append(match[2].strip())
    return tuple(found[-count:])


def tail(directory_fd: int, name: str) -> tuple[tuple[str, ...], Path | None]:
    """Error lines of the log `name` in an open directory, and its path; nothing if there is no log."""
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
