"""Where a target keeps the images of moves: in memory, and on the disk only while the outcome is unknown.

    /run/pymigrate/images/memory/<migration>      in a tmpfs that is mounted while there is something in it
    /var/lib/pymigrate/incoming/<migration>       on the disk: complete, or of a host without memory to spare
    /var/lib/pymigrate/incoming/<migration>.new   a copy to the disk that is being made, or that was cut short

The tmpfs is below a bind mount that is private: a container that shares /run with the host gets no mount of it. One
lock serializes mounting and unmounting it. The directory of a move is locked by the processes that use it.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from criu_rpc.errors import Error
from migrate import paths
from migrate.disk import no_space
from migrate.errors import DeadlineExceeded, MigrateError, NoSpace
from migrate.files import mountinfo
from migrate.limits import IMAGES_LOCK_TIMEOUT
from migrate.memory import meminfo
from migrate.model import check_migration_id
from runtime.light.records import Record
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REMOUNT

PLACE, MEMORY, DISK, LOCK = paths.IMAGES, paths.MEMORY_IMAGES, paths.DISK_IMAGES, paths.IMAGES_LOCK
_NAME = "pymigrate-images"  # tells our tmpfs from others
_UNFINISHED = ".new"
_RESERVE = 64 << 20  # bytes of memory that neither images nor the restored container get
_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC

Kind = Literal["memory", "disk"]


class NoMemory(MigrateError):
    """The images of a move cannot be in memory at this host."""

    kind = "no-space"


class Found(Record):
    """Images of one move. `since` is when they began to come, in seconds since the epoch; `size` is in bytes."""

    migration: str
    path: Path
    kind: Kind
    size: int
    since: float
    in_use: bool


def room(*, freed: bool = False) -> int:
    """Return how many bytes of images fit into memory.

    The restored container needs as many again, unless images are `freed` as their contents come into it: then a quarter
    is left for what is in both.
    """
    free = max(0, meminfo.available(swap=False) - _RESERVE)
    return free * 4 // 5 if freed else free // 2


def make_memory(migration: str, expected: int, *, freed: bool = False) -> Path:
    """A new directory in memory for the images of a move, `expected` bytes by the source's estimate; see `room`.

    Raises NoMemory when they do not fit or there can be no tmpfs, DeadlineExceeded.
    """
    name = check_migration_id(migration)
    with _locked():
        limit = room(freed=freed)
        if expected > limit:
            raise NoMemory(f"{limit >> 20} MiB of memory are free for images, {-(-expected >> 20)} MiB are needed")
        try:
            _mount(limit)
            (MEMORY / name).mkdir(mode=0o700)
        except OSError as error:
            _unmount_empty()
            raise NoMemory(f"{MEMORY}: {error.strerror}") from None
    return MEMORY / name


def make_disk(name: str) -> Path:
    """A new directory on the disk. Raises OSError."""
    DISK.mkdir(mode=0o700, parents=True, exist_ok=True)
    (DISK / name).mkdir(mode=0o700)
    return DISK / name


def full(path: Path, needed: int) -> NoSpace:
    """The error of images at `path` that take `needed` bytes more than there are."""
    error = no_space(path, needed)
    if path.parent == MEMORY:
        error.remedy = "the container has grown since its memory was measured: try again"
    return error


def unfinished(migration: str) -> Path:
    """Return the directory in which a copy to the disk is made."""
    return DISK / f"{check_migration_id(migration)}{_UNFINISHED}"


def remove(migration: str) -> None:
    """Remove all images of a move, wherever they are. Harmless when there are none."""
    name = check_migration_id(migration)
    shutil.rmtree(DISK / name, ignore_errors=True)
    shutil.rmtree(unfinished(name), ignore_errors=True)
    remove_memory(name)


def remove_memory(migration: str) -> None:
    """Remove the images of a move from memory, and unmount the tmpfs when it is empty then."""
    if MEMORY.exists():
        shutil.rmtree(MEMORY / check_migration_id(migration), ignore_errors=True)
        with contextlib.suppress(Error, OSError), _locked():  # otherwise the next one unmounts it
            _unmount_empty()


def lock(path: Path, timeout: float = 0.0) -> int | None:
    """Lock the directory of a move's images; None when another process uses it for `timeout` seconds.

    The lock belongs to all processes that inherit the descriptor, until each has closed it. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if _flock(fd, timeout):
        return fd
    os.close(fd)
    return None


def _flock(fd: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.005)


def found() -> list[Found]:
    """All images at this host, oldest first; of a move that has them in both places, both."""
    return sorted((*_below(MEMORY, "memory"), *_below(DISK, "disk")), key=lambda item: (item.migration, item.kind))


def _below(directory: Path, kind: Kind) -> Iterator[Found]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        migration = name.removesuffix(_UNFINISHED)
        path = directory / name
        try:
            check_migration_id(migration)
            fd = lock(path)
            since = path.stat().st_ctime
            size = sum(info.st_blocks * 512 for info in map(os.stat, os.scandir(path)))
        except (Error, OSError):
            continue  # somebody else's, or removed meanwhile
        if fd is not None:
            os.close(fd)
        yield Found(migration, path, kind, size, since, fd is None)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Nobody else mounts or unmounts the tmpfs. Raises DeadlineExceeded."""
    LOCK.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not _flock(fd, IMAGES_LOCK_TIMEOUT):
            raise DeadlineExceeded(f"{LOCK} is held by another process for {IMAGES_LOCK_TIMEOUT:g} s")
        yield
    finally:
        os.close(fd)


def _mounts(place: Path) -> list[mountinfo.Mount]:
    return [mount for mount in mountinfo.read(os.getpid()) if mount.place == str(place)]


def _mount(more: int) -> None:
    """Mount the tmpfs, or let the one that is there take `more` bytes more. Raises OSError."""
    mounted = _mounts(MEMORY)
    if mounted:
        if (mounted[-1].fstype, mounted[-1].source) != ("tmpfs", _NAME):
            raise OSError(0, f"{mounted[-1].fstype} is mounted there, which pymigrate did not do")
        space = os.statvfs(MEMORY)
        _mount_tmpfs(MS_REMOUNT, (space.f_blocks - space.f_bfree) * space.f_frsize + more)
        return
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _mounts(PLACE):
        syscalls.mount(PLACE, PLACE, None, MS_BIND)
    syscalls.mount(None, PLACE, None, MS_PRIVATE)
    MEMORY.mkdir(mode=0o700, exist_ok=True)
    _mount_tmpfs(0, more)


def _mount_tmpfs(flags: int, size: int) -> None:
    options = f"mode=700,size={max(size, 1 << 20)}"
    try:
        syscalls.mount(_NAME, MEMORY, "tmpfs", _FLAGS | flags, f"{options},noswap")
    except OSError:  # before Linux 6.4
        syscalls.mount(_NAME, MEMORY, "tmpfs", _FLAGS | flags, options)


def _unmount_empty() -> None:
    """Under the lock: unmount the tmpfs unless there are images in it."""
    mounted = _mounts(MEMORY)
    if mounted:
        if mounted[-1].source != _NAME or os.listdir(MEMORY):
            return
        syscalls.umount(MEMORY, syscalls.MNT_DETACH)  # a process that is about to end may have a file in it open
    with contextlib.suppress(OSError):
        os.rmdir(MEMORY)
        for _ in _mounts(PLACE):
            syscalls.umount(PLACE, syscalls.MNT_DETACH)
        os.rmdir(PLACE)
