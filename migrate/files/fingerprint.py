"""Recognise a file tree by a fingerprint, and measure its size."""

import hashlib
import os
import stat
from pathlib import Path

from migrate.errors import MigrateError


def fingerprint(root: Path) -> str:
    """Return the SHA-256 over every entry's path, type, mode, owner, size, mtime (ns), link target and device number.

    Contents are not read: rsync compares no more, and CRIU checks less (size, mtime, build-id). Times and sizes of
    directories are left out, and so is the root's own mode. Raises MigrateError.
    """
    seen = hashlib.sha256()
    try:
        for path, info in _walk(os.fspath(root)):
            parts: list[object] = [stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid]
            if stat.S_ISREG(info.st_mode):
                parts += [info.st_size, info.st_mtime_ns]
            elif stat.S_ISLNK(info.st_mode):
                parts.append(os.readlink(path))
            elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                parts.append(info.st_rdev)
            entry = os.fsencode(os.path.relpath(path, root)) + b"\0" + repr(parts).encode()
            seen.update(len(entry).to_bytes(4, "big") + entry)
    except OSError as error:
        raise MigrateError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    return seen.hexdigest()


def size(root: Path) -> int:
    """Return the bytes that a tree takes on disk; count files with several links once. Raises MigrateError."""
    total, counted = 0, set()
    try:
        for _, info in _walk(os.fspath(root), living=True):
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in counted:
                    continue
                counted.add((info.st_dev, info.st_ino))
            total += info.st_blocks * 512
    except OSError as error:
        raise MigrateError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    return total


def _walk(root: str, *, living: bool = False) -> "list[tuple[str, os.stat_result]]":
    """Return every entry below `root` in a fixed order, without following links; for a file, the file itself.

    `living`: entries may vanish meanwhile.
    """
    if not stat.S_ISDIR(os.stat(root).st_mode):
        return [(root, os.stat(root))]
    found = []
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    found.append((entry.path, entry.stat(follow_symlinks=False)))
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:
            if not living or directory == root:
                raise
    return sorted(found, key=lambda item: os.fsencode(item[0]))
