"""Records about file trees that both ends of a move exchange: which go along, where to, what must be there already."""

import os
import re
import stat
from dataclasses import dataclass
from typing import Self

from migrate.errors import ProtocolError
from migrate.paths import DATA, VOLUMES

MAX_TREES = 200
_FORBIDDEN = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot", str(DATA))
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_OPTIONS = re.compile(
    r"(?:(?:size|nr_inodes)=[0-9]+[kmgKMG]?|mode=[0-7]{1,4}|[ug]id=[0-9]+|inode(?:32|64)"
    r"|huge=(?:never|always|within_size|advise))"
)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


def is_place(path: str) -> bool:
    """Return whether a tree may be put at `path`: absolute, normalized, not the system's, not pymigrate's."""
    if not path.startswith("/") or "\0" in path or len(path) > 4000 or os.path.normpath(path) != path:
        return False
    if path.startswith("//") or path == "/":
        return False
    if path.startswith(f"{VOLUMES}/"):
        return True
    return not any(path == place or path.startswith(f"{place}/") for place in _FORBIDDEN)


@dataclass(frozen=True)
class Tree:
    """One tree that goes along, beside the root file system.

    `name` is for people; `source` is its path at the source, `place` that at the target. `single`: it is one file.
    `fingerprint` (files.fingerprint) is that of one that does not change, "" for one that may. `empty`: only the
    directory itself is made. `found`: what lies at the place already is taken as it is. `upper`: an overlay's.
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


@dataclass(frozen=True)
class Needed:
    """A path that must exist at the target already, as a `directory` or not.

    `network` is the kind of network file system that it must lie on, `export` what it must be of that
    (mountinfo.Mount); "" where that does not matter.
    """

    name: str
    path: str
    directory: bool = False
    network: str = ""
    export: str = ""

    def __post_init__(self) -> None:
        if not os.path.isabs(self.path) or "\0" in self.path or len(self.path) > 4000:
            raise ProtocolError(f"{self.path!r} is not an absolute path")


@dataclass(frozen=True)
class Mounted:
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
    """Return whether it is an option of a tmpfs that another host may mount with."""
    return _OPTIONS.fullmatch(option) is not None


def are_tmpfs_options(options: str) -> bool:
    """The same for options separated by commas."""
    return all(is_tmpfs_option(option) for option in options.split(",") if option)


@dataclass(frozen=True)
class Root:
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
        """Read them from the directory `path`. Raises OSError."""
        info = os.stat(path)
        xattrs = {name: os.getxattr(path, name).hex() for name in os.listxattr(path)}
        return cls(stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns, xattrs)

    def give(self, path: str) -> None:
        """Make the directory `path` have these. Raises OSError."""
        os.chown(path, self.uid, self.gid)
        for name in os.listxattr(path):
            if name not in self.xattrs:
                os.removexattr(path, name)
        for name, text in self.xattrs.items():
            os.setxattr(path, name, bytes.fromhex(text))
        os.chmod(path, self.mode)
        os.utime(path, ns=(self.mtime_ns, self.mtime_ns))


@dataclass(frozen=True)
class Owner:
    """The container that a tree belongs to, by its id and the time when it was created, whichever host it was on.

    `root` is the directory of container states that it is in, the same at every host.
    """

    id: str
    created: str
    root: str
