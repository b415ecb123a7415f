"""What both ends say to each other about file trees: which go along, where they are put, what must be there already."""

import dataclasses
import os
import re
import typing
from dataclasses import dataclass
from typing import Any, Self

from migrate.errors import ProtocolError

OWN = "/var/lib/pymigrate/volumes"  # where a tree is put that cannot have the same place as at the source
MAX_TREES = 200
_FORBIDDEN = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot", "/var/lib/pymigrate")
_DIGEST = re.compile(r"([0-9a-f]{64})?")


def is_place(path: str) -> bool:
    """Whether a tree may be put at `path`: absolute, plain, and no place of the system's or of ours."""
    if not path.startswith("/") or "\0" in path or len(path) > 4000 or os.path.normpath(path) != path:
        return False
    if path.startswith("//") or path == "/":
        return False
    if path.startswith(f"{OWN}/"):
        return True
    return not any(path == place or path.startswith(f"{place}/") for place in _FORBIDDEN)


def from_json(cls: Any, value: Any) -> Any:
    """A dataclass of plain fields out of what came over the wire. Raises ProtocolError."""
    kinds = typing.get_type_hints(cls)
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise ProtocolError(f"{cls.__name__}: the fields are not those of this version")
    for name, item in value.items():
        if type(item) is not kinds[name]:
            raise ProtocolError(f"{cls.__name__}: {name} is not of type {kinds[name].__name__}")
    return cls(**value)


@dataclass(frozen=True)
class Tree:
    """One tree that goes along, beside the root file system.

    `name` is for people; `source` is where it lies here, `place` where it is put there. `single`: it is one file.
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

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises ProtocolError."""
        tree: Self = from_json(cls, value)
        if not is_place(tree.place):
            raise ProtocolError(f"{tree.place!r} is no place for a tree")
        if not _DIGEST.fullmatch(tree.fingerprint) or tree.size < 0 or not os.path.isabs(tree.source):
            raise ProtocolError(f"tree {tree.name!r} is malformed")
        return tree


@dataclass(frozen=True)
class Needed:
    """What must be at the target already: `path`, a `directory` or not.

    `network` is the kind of network file system that it must lie on, `export` what it must be of that
    (mountinfo.Mount); "" where that is no matter.
    """

    name: str
    path: str
    directory: bool = False
    network: str = ""
    export: str = ""

    def __post_init__(self) -> None:
        if not os.path.isabs(self.path) or "\0" in self.path or len(self.path) > 4000:
            raise ProtocolError(f"{self.path!r} is no absolute path")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises ProtocolError."""
        needed: Self = from_json(cls, value)
        return needed


@dataclass(frozen=True)
class Owner:
    """Whose a tree is: the container, by its id and the time when it was created, whichever host it was on.

    `root` is the directory of container states that it is in, the same at every host.
    """

    id: str
    created: str
    root: str


def checked_list(cls: type[Any], values: list[Any]) -> list[Any]:
    """`cls.from_json` of each. Raises ProtocolError."""
    if len(values) > MAX_TREES:
        raise ProtocolError(f"{len(values)} trees are too many")
    return [cls.from_json(value) for value in values]
