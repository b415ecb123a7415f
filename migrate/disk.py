"""Room on disks, and files that survive a power cut."""

import errno
import os
from pathlib import Path

from migrate.errors import MigrateError, NoSpace
from runtime.linux import files

FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_LITTLE = 64 << 10  # with fewer free bytes, a failure is attributed to the disk


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that `path` is on, or will be made on."""
    usage = os.statvfs(existing(path))
    return usage.f_bavail * usage.f_frsize


def existing(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def is_full(path: Path, error: BaseException) -> bool:
    """Return True if a full disk at `path` caused `error`, which may come from a program that does not say so."""
    return getattr(error, "errno", None) in FULL or free_bytes(path) < _LITTLE


def no_space(path: Path, needed: int = 0) -> NoSpace:
    """Return the error of a write to `path` on this host, which needs `needed` more bytes (0: not known)."""
    wanted = f"{size(needed)} more needed, " if needed > 0 else ""
    host, directory = os.uname().nodename, existing(path.parent)
    free = f"{wanted}{size(free_bytes(directory))} free"
    return NoSpace(f"no room at {host} for {path}: {free}", remedy=f"make room at {host} where {directory} is")


def explained(error: OSError) -> MigrateError:
    """Return an error of the system as a sentence that names the file, if it is known."""
    if error.errno in FULL and isinstance(error.filename, str):
        return no_space(Path(error.filename))
    words = error.strerror or str(error)
    return MigrateError(f"{error.filename}: {words}" if isinstance(error.filename, str) else words)


def size(count: int) -> str:
    """Format a number of bytes for people: MiB, or KiB below 1 MiB; rounded up."""
    if count > 1023 << 10:
        return f"{-(-count >> 20)} MiB"
    return f"{-(-count >> 10)} KiB"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file, with mode 0600, once the disk has its data. Raises OSError, which names it."""
    files.replace(str(path), data, durable=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file's data, or the names in a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
