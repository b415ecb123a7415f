"""Check that files to load or run belong to root or this user, and that no other user can change or replace them."""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_NOBODY = 65534  # /proc/sys/kernel/overflowuid
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def require(path: str) -> None:
    """Raise PermissionError if another user can replace a directory or put files into it.

    It need not exist yet. Symbolic links on the way to it must belong to root or this user as well.
    """
    target = os.path.realpath(path)
    if target != path:
        for place, info in _way(os.path.abspath(path)):
            if stat.S_ISLNK(info.st_mode):
                _require_owner(info, place, host=True)
    for place, info in _way(target):
        _require_owner(info, place, host=True)
        _require_closed(info, place, sticky=place != target)


def _way(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the directories on the way to a path, and the path itself, with lstat; as far as they exist."""
    place = "/"
    for name in path.split("/"):
        place = os.path.join(place, name)
        try:
            yield place, os.lstat(place)
        except FileNotFoundError:
            return


def open_directory(path: str, *, sticky: bool = False) -> int:
    """Return a descriptor of a directory that no other user can write to or replace.

    `path` must be absolute and without symbolic links. With `sticky` other users may have their own files in it, as in
    /tmp. Raises OSError, EPERM if another user could do more.
    """
    fd, place = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "/"
    names = [name for name in path.split("/") if name]
    try:
        for number, name in enumerate(names, 1):
            _require(os.fstat(fd), place, sticky=True)  # no other user can rename this user's entries
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
    """Return what `open_directory` does; make the directory, in an existing one, if it is missing."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return open_directory(path)
    fd = open_directory(path)
    if mode != 0o700:
        os.fchmod(fd, mode)
    return fd


def open_file(path: str, directory: int | None = None) -> int:
    """Return a descriptor for reading a regular file that no other user can change; `path` is relative to `directory`.

    Raises OSError, EPERM if another user could change it, ELOOP for a symbolic link.
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
    _require_owner(info, place)
    _require_closed(info, place, sticky=sticky)


def _require_owner(info: os.stat_result, place: str, *, host: bool = False) -> None:
    """Raise PermissionError unless root or this user is the owner.

    `host`: in a user namespace the owner may also be an unmapped user, such as the host's root.
    """
    if info.st_uid in (0, os.geteuid()) or (host and info.st_uid == _NOBODY and is_remapped()):
        return
    raise PermissionError(errno.EPERM, f"belongs to user {info.st_uid}, not to root", place)


def _require_closed(info: os.stat_result, place: str, *, sticky: bool) -> None:
    if info.st_mode & _BY_OTHERS and not (sticky and info.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "can be changed by other users", place)


def is_remapped() -> bool:
    """Return whether this is a user namespace in which the host's root may be unmapped (user_namespaces(7))."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", "4294967295"]
