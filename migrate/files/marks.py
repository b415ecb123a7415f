"""Record the owners of directories and files that moves have put, or left, on this host.

Each path has a JSON file, its mark, below /var/lib/pymigrate/trees. A mark names the container and the root of its
state, the migration that wrote there last, and the directory by its inode and birth time, because inode numbers are
reused. A directory that was removed and made again at the same path therefore has no mark.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.disk import write_atomically
from migrate.files import marks
from migrate.files.trees import Owner
from migrate.paths import TREE_MARKS as MARKS
from runtime.light.records import Record
from runtime.linux import syscalls

VERSION = 1

Inode = tuple[int, int, int]  # device, number, time of birth in nanoseconds


class Mark(Record):
    """The mark of `path`.

    `root` is the container's state directory, "" in marks of earlier versions. `whole` is false while a move writes
    there, and after one that failed, which also sets `failed`. `made` are the paths that moves have made, outermost
    first; only these are ever removed. The last one is `path` itself, unless it existed before.
    """

    path: str
    id: str
    created: str
    root: str
    migration: str
    inode: Inode
    whole: bool
    failed: bool = False
    made: tuple[tuple[str, Inode], ...] = ()

    def is_of(self, owner: Owner) -> bool:
        """Return whether a move of this very container has put or left the tree there."""
        return (self.id, self.created) == (owner.id, owner.created) and self.root in ("", owner.root)

    @property
    def is_made(self) -> bool:
        """Whether a move has made `path`."""
        return bool(self.made) and self.made[-1][0] == self.path


def inode(path: str) -> Inode:
    """Return the identity of the file at `path`, (0, 0, 0) if it does not exist."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return 0, 0, 0
    return info.st_dev, info.st_ino, syscalls.birth_time(path)


def of(path: str) -> Mark | None:
    """Return the mark of `path`; None if there is none, or if it is about a file that has been replaced."""
    try:
        mark = _parse(path, _file(path).read_bytes())
        info = os.lstat(path)
    except OSError:
        return None
    # A file is replaced while it is renewed; a directory stays.
    same = (stat.S_ISREG(info.st_mode) and not mark.whole) or mark.inode in (inode(path), _UNKNOWN)
    return mark if same and mark.path == path else None


def every() -> Iterator[Mark]:
    """Yield the marks of all files that exist."""
    try:
        files = sorted(MARKS.glob("[!.]*.json"))
    except OSError:
        return
    for file in files:
        try:
            path = json.loads(file.read_bytes())["path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(path, str) and (mark := of(path)) is not None:
            yield mark


def put(
    path: str, owner: Owner, migration: str, *, whole: bool, made: tuple[tuple[str, Inode], ...] | None = None
) -> None:
    """Record the owner of the file or directory `path`. Without `made` keep an earlier mark's. Raises OSError."""
    if made is None:
        earlier = of(path)
        made = earlier.made if earlier is not None else ()
    write(Mark(path, owner.id, owner.created, owner.root, migration, inode(path), whole, made=made))


def write(mark: Mark) -> None:
    """Write a mark to disk. Raises OSError."""
    MARKS.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(_file(mark.path), json.dumps({"version": VERSION, **vars(mark)}).encode())


def drop(path: str) -> None:
    """Remove the mark of a removed path. Harmless if there is none."""
    _file(path).unlink(missing_ok=True)


def key(path: str) -> str:
    """Return a name for files about `path`."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _file(path: str) -> Path:
    return MARKS / f"{key(path)}.json"


_UNKNOWN = (-1, -1, -1)


def _parse(path: str, data: bytes) -> Mark:
    """Parse a mark. One that is malformed, or of a later version, has no owner, so its path is left alone."""
    try:
        value: dict[str, Any] = json.loads(data)
        version = value.pop("version", 0)
        if version == 0:
            value["id"], _, value["created"] = value.pop("owner").partition(" ")
            value["root"] = ""
        elif version != VERSION:
            raise ValueError(version)
        value["inode"] = _inode(value["inode"])
        value["made"] = tuple((str(made), _inode(number)) for made, number in value.get("made", ()))
        return Mark(**value)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Mark(path, "", "", "", "", _UNKNOWN, whole=False)


def _inode(value: Any) -> Inode:
    device, number, birth = map(int, value)
    return device, number, birth


def leave(leaving: dict[str, list[str]], owner: Owner, migration: str) -> None:
    """Mark the trees of a container that has left this host as copies that its next move back may update.

    `leaving`: {"trees": paths, "links": names that CRIU's dump has given to deleted files}; the links are removed.
    """
    for path in leaving.get("links", []):
        with contextlib.suppress(OSError):
            os.unlink(path)
    for path in leaving.get("trees", []):
        with contextlib.suppress(OSError):
            marks.put(path, owner, migration, whole=True)
