"""The address space of one process, as far as memory of it can travel while the program runs."""

import os
import re
from collections.abc import Iterator

from migrate.memory.layout import Range

_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ (\d+) *(.*)")
_KERNELS = (b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]", b"[uprobes]")


def anonymous(pid: int) -> list[Range]:
    """Return the private anonymous mappings of a process in order. Raises OSError when it has exited."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        return list(_anonymous(maps.read()))


def _anonymous(text: bytes) -> Iterator[Range]:
    for start, end, mode, inode, name in _LINE.findall(text):
        if inode == b"0" and mode[3:] == b"p" and name not in _KERNELS:
            yield int(start, 16), int(end, 16)


def locked(pid: int) -> int:
    """Return the bytes of locked mappings of a process (mlock(2)). Raises OSError when it has exited."""
    with open(f"/proc/{pid}/status", "rb") as file:
        found = re.search(rb"VmLck:\s*([0-9]+) kB", file.read())
    return int(found[1]) << 10 if found else 0


def resident(pid: int) -> int:
    """Return the bytes of private anonymous memory of a process. Raises OSError."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return sum(int(size) << 10 for size in re.findall(rb"(?:RssAnon|VmSwap):\s*([0-9]+) kB", file.read()))


def open_memory(pid: int) -> int:
    """Open the memory of a process, as it is now: after execve(2) the descriptor reads nothing. Raises OSError."""
    return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
