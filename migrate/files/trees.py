"""The records about file trees that both ends exchange: trees to send, where to put them, what must exist already."""

import os
import re
import stat
from typing import Self

from migrate.errors import ProtocolError
from migrate.paths import DATA, VOLUMES
from runtime.light.records import Record

MAX_TREES = 200
_FORBIDDEN = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot", str(DATA))
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_OPTIONS = re.compile(
    r"(?:ro|(?:size|nr_inodes)=[0-9]+[kmgKMG]?|mode=[0-7]{1,4}|[ug]id=[0-9]+|inode(?:32|64)"
    r"|huge=(?:never|always|within_size|advise))"
)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


def is_place(path: str) -> bool:
    """Return whether `path` may hold a tree: absolute, plain, and not in a directory of the system or of pymigrate."""
    if not path.startswith("/") or "\0" in path or len(path) > 4000 or os.path.normpath(path) != path:
        return False
    if path.startswith("//") or path == "/":
        return False
    if path.startswith(f"{VOLUMES}/"):
        return True
    return not any(path == place or path.startswith(f"{place}/") for place in _FORBIDDEN)


class Tree(Record):
    """One tree that is sent besides the root file system.

    `name` is for messages; `source` is its path here, `place` its path at the target. `single`: it is one file.
    `fingerprint` (files.fingerprint) of a tree that does not change, "" if it may. `empty`: only the directory itself
    is made. `found`: a file that exists at the place is taken as it is. `upper`: an overlay's upper directory.
    """

    name: str
    source: str
    place: str
    single: bool = False
    fingerprint: str = ""
    size: int = 0
    empty: bool = False
    found: bool = False
    upper: bool = False

    @property
    def writable(self) -> bool:
        return not self.fingerprint and not self.empty

    def check(self) -> None:
        """Raise ProtocolError unless this is a tree that can be sent beside a root file system."""
        if not is_place(self.place):
            raise ProtocolError(f"no tree may be put at {self.place!r}")
        if not _DIGEST.fullmatch(self.fingerprint) or self.size < 0 or not os.path.isabs(self.source):
            raise ProtocolError(f"tree {self.name!r} is malformed")


class Needed(Record):
    """A `path` that must exist at the target, a `directory` or a file.

    `network`: the kind of network file system that it must be on; `export`: its place there (mountinfo.Mount); "" if
    that does not matter.
    """

    name: str
    path: str
    directory: bool = False
    network: str = ""
    export: str = ""

    def __post_init__(self) -> None:
        if not os.path.isabs(self.path) or "\0" in self.path or len(self.path) > 4000:
            raise ProtocolError(f"{self.path!r} is not an absolute path")


class Mounted(Record):
    """A tmpfs at `place` in the container: its options but "rw", as mount(2) takes them, and the name of its source."""

    place: str
    options: str
    source: str

    def __post_init__(self) -> None:
        if not all("\0" not in text and len(text) <= 4000 for text in (self.place, self.options, self.source)):
            raise ProtocolError("a tmpfs mount is malformed")
        if not self.place.startswith("/") or not are_tmpfs_options(self.options):
            raise ProtocolError(f"{self.place!r}: the options {self.options!r} are not those of a tmpfs")


def is_tmpfs_option(option: str) -> bool:
    """Return whether an option of a tmpfs can be used on another host."""
    return _OPTIONS.fullmatch(option) is not None


def are_tmpfs_options(options: str) -> bool:
    """Return whether all of the comma-separated options can be used on another host (is_tmpfs_option)."""
    return all(is_tmpfs_option(option) for option in options.split(",") if option)


class Root(Record):
    """The attributes of the root directory of a tmpfs: `xattrs` are in hex, POSIX ACLs among them."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[str, str]

    def __post_init__(self) -> None:
        if not all(_HEX.fullmatch(text) for text in self.xattrs.values()):
            raise ProtocolError("the root of a tmpfs is malformed")

    @classmethod
    def of(cls, path: str) -> Self:
        """Read the attributes of the directory `path`. Raises OSError."""
        info = os.stat(path)
        xattrs = {name: os.getxattr(path, name).hex() for name in os.listxattr(path)}
        return cls(stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns, xattrs)

    def give(self, path: str) -> None:
        """Give the directory `path` these attributes. Raises OSError."""
        os.chown(path, self.uid, self.gid)
        for name in os.listxattr(path):
            if name not in self.xattrs:
                os.removexattr(path, name)
        for name, text in self.xattrs.items():
            os.setxattr(path, name, bytes.fromhex(text))
        os.chmod(path, self.mode)
        os.utime(path, ns=(self.mtime_ns, self.mtime_ns))


class Owner(Record):
    """The container that owns a tree, by its id and its creation time, whichever host it was created on.

    `root` is its directory of container states, the same at every host.
    """

    id: str
    created: str
    root: str
