"""Room on disks, and files that are written whole or not at all."""

import errno
import os
from pathlib import Path

from migrate.errors import MigrateError, NoSpace

FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_LITTLE = 64 << 10  # bytes free at which a failure is put down to the disk


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or will be made."""
    usage = os.statvfs(existing(path))
    return usage.f_bavail * usage.f_frsize


def existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def is_full(path: Path, error: BaseException) -> bool:
    """Whether `error`, which may be that of a program that says no more, comes of a full disk at `path`."""
    return getattr(error, "errno", None) in FULL or free_bytes(path) < _LITTLE


def no_space(path: Path, needed: int = 0) -> NoSpace:
    """The error of a write to `path` of this host, which takes `needed` bytes more (0: not known)."""
    wanted = f"{size(needed)} more needed, " if needed > 0 else ""
    host, directory = os.uname().nodename, existing(path.parent)
    free = f"{wanted}{size(free_bytes(directory))} free"
    return NoSpace(f"no room at {host} for {path}: {free}", remedy=f"make room at {host} where {directory} is")


def explained(error: OSError) -> MigrateError:
    """An error of the system as a sentence that names the file, if it is known."""
    if error.errno in FULL and isinstance(error.filename, str):
        return no_space(Path(error.filename))
    words = error.strerror or str(error)
    return MigrateError(f"{error.filename}: {words}" if isinstance(error.filename, str) else words)


def size(count: int) -> str:
    """Bytes for people: MiB, or KiB below 1 MiB; rounded up."""
    if count > 1023 << 10:
        return f"{-(-count >> 20)} MiB"
    return f"{-(-count >> 10)} KiB"


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, wait for the disk, rename. The file is 0600. Raises OSError, which names it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(fd)
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
