"""Find and open the shared memory of a container: anonymous memory, memfds, System V segments.

Each is an *object*: a file in a tmpfs of the kernel's own, which has no name in any file system. Several processes may
have it mapped, and a memfd may be open and not mapped.
"""

import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from migrate.memory.layout import PAGE, Range
from runtime.linux import processes

MOST = 256  # objects of a container that count
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) .... [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([0-9]+) *(/SYSV)?")


class Key(NamedTuple):
    """What tells objects apart. Segments have numbers of their own instead of those of inodes."""

    inode: int
    is_segment: bool


Found = dict[Key, list[str]]  # objects, and paths by which each may be opened


def find(pids: Iterable[int]) -> Found:
    """Return the objects that processes have mapped or open."""
    found: Found = {}
    for pid in pids:
        for key, path in (*mapped(pid), *_open_files(pid)):
            if key in found or len(found) < MOST:
                found.setdefault(key, []).append(path)
    return found


def mapped(pid: int) -> Iterator[tuple[Key, str]]:
    """Yield the objects that a process has mapped: (object, path). Yield nothing when it has exited."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            text = file.read()
    except OSError:
        return
    for start, end, major, minor, inode, segment in _LINE.findall(text):
        if os.makedev(int(major, 16), int(minor, 16)) == _device():
            path = f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}"
            yield Key(int(inode), bool(segment)), path


def _open_files(pid: int) -> Iterator[tuple[Key, str]]:
    """Yield the objects that a process has a descriptor of, mapped or not."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_dev == _device() and stat.S_ISREG(status.st_mode):
            yield Key(status.st_ino, is_segment=False), path


def open_one(key: Key, paths: Iterable[str]) -> int:
    """Open an object for reading; return -1 if it has gone."""
    for path in paths:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)  # what it is now may be something else to open
        except OSError:
            continue
        try:
            status = os.fstat(place)
            if (status.st_dev, status.st_ino) == (_device(), key.inode) and stat.S_ISREG(status.st_mode):
                return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        finally:
            os.close(place)
    return -1


def size(init: int) -> int:
    """Return the bytes of pages of all objects of a container, each once."""
    total = 0
    for key, paths in find(sorted(processes.descendants(init))).items():
        fd = open_one(key, paths)
        if fd >= 0:
            total += os.fstat(fd).st_blocks * 512
            os.close(fd)
    return total


def data(fd: int) -> Iterator[Range]:
    """Yield where an object has pages. A page that comes or goes meanwhile may be left out."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: no data until the end
            return
        start, end = start // PAGE * PAGE, -(-end // PAGE) * PAGE
        yield start, end


@functools.cache
def _device() -> int:
    """Return the device of the kernel's own tmpfs."""
    fd = os.memfd_create("pymigrate", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
