"""What is loaded or run must be root's or ours, and nobody else may be able to change or replace it.

zip_cache.py needs this before anything is cached: nothing else is imported here.
"""

from __future__ import annotations

import errno
import os
import stat

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def open_directory(path: str, *, sticky: bool = False) -> int:
    """A descriptor of a directory that no other user can put anything into, nor into another's place.

    `path` must be absolute and without symbolic links. With `sticky` others may have files of their own in it, as in
    /tmp. Raises OSError, EPERM if another user could do more.
    """
    fd, place = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "/"
    names = [name for name in path.split("/") if name]
    try:
        for number, name in enumerate(names, 1):
            _require(os.fstat(fd), place, sticky=True)  # nobody else can rename what is in it
            access = os.O_RDONLY if number == len(names) else os.O_PATH
            inner = os.open(name, access | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd, place = inner, os.path.join(place, name)
        _require(os.fstat(fd), place, sticky=sticky)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_directory(path: str, mode: int = 0o700) -> int:
    """The same, of a directory that is made if it does not exist, in one that does."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return open_directory(path)
    fd = open_directory(path)
    if mode != 0o700:
        os.fchmod(fd, mode)
    return fd


def open_file(path: str, directory: int | None = None) -> int:
    """A descriptor for reading a regular file that no other user can change; `path` is relative to `directory`.

    Raises OSError, EPERM if another user could, ELOOP for a symbolic link.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", path)
        _require(info, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require(info: os.stat_result, place: str, *, sticky: bool = False) -> None:
    if info.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"belongs to user {info.st_uid}, not to root", place)
    if info.st_mode & _BY_OTHERS and not (sticky and info.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "can be changed by other users", place)
