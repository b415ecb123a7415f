"""What a target replies to the calls of protocol.py, as records, and the failure that it may report instead."""

from typing import Annotated

from migrate.errors import ProtocolError
from migrate.wire.questions import MAX_FILES, MAX_PORTS, Seen
from migrate.wire.records import Most
from runtime.light.records import Record

_FAILURE_TEXT = 4000  # characters


class Done(Record):
    """The call was carried out."""


class Welcome(Record):
    """Which protocol the agent speaks, its host's name, and its pid. The same in every version."""

    version: int
    host: str
    pid: int


class Opened(Record):
    """Where the bundle is, and what of the files is there.

    `complete`: the constant root file system is there, and so is each of `trees`. `renewed`: the root file system, then
    each tree: has the target an older copy? `notes`: what was left alone, in words.
    """

    bundle: str
    rootfs: str
    complete: bool
    trees: list[bool]
    renewed: list[bool]
    notes: list[str]

    def __post_init__(self) -> None:
        for name, path in (("bundle", self.bundle), ("rootfs", self.rootfs)):
            if not path.startswith("/") or "\0" in path:
                raise ProtocolError(f"{name} is not an absolute path")


class TreeProblem(Record):
    """Why a tree cannot be put at `path`, or what is missing there; `rule` is one of preflight/rules.py."""

    rule: str
    path: str
    text: str


class TreesChecked(Record):
    """`found` are the names of trees that are taken as they are there."""

    problems: list[TreeProblem]
    found: list[str]


class FilesSeen(Record):
    """The files of CheckFiles as they are at the target, in the same order."""

    files: Annotated[list[Seen], Most(MAX_FILES)]


class PortProblem(Record):
    """Why the container cannot have a port."""

    port: str
    text: str


class PortsChecked(Record):
    problems: Annotated[list[PortProblem], Most(MAX_PORTS)]


class Prepared(Record):
    """`tmpfs`: place in the container -> path at the target, of the mounts that the target has made.

    What comes into them is charged to `cgroup`, a directory, or "". `on_disk`: why images cannot be in memory, or "".
    """

    tmpfs: dict[str, str]
    cgroup: str
    on_disk: str


class MemoryReady(Record):
    """The target takes memory.

    `lazy_problem`: why it cannot restore before memory is in place, or ""; `remapped`: it can do so in user namespaces.
    `stream`: the command that hands its input to the agent as one more stream; a number from 1 on follows it.
    """

    lazy_problem: str
    remapped: bool
    stream: list[str] = []


class Restored(Record):
    """The container's init at the target; nothing of the container has run yet."""

    pid: int


class Resumed(Record):
    """The container's init at the target; it runs."""

    pid: int


class Settled(Record):
    """Where the container is: TARGET, SOURCE, NEITHER or UNKNOWN.

    `since`: when it was resumed, if that was before the call; `reason`: why it is NEITHER.
    """

    workload: str
    since: str = ""
    reason: str = ""


class Failure(Record):
    """A call failed: an exception's `kind` (errors.py), message and remedy, or ""."""

    kind: str
    message: Annotated[str, Most(_FAILURE_TEXT)]
    remedy: Annotated[str, Most(_FAILURE_TEXT)]

    @classmethod
    def of(cls, kind: str, message: str, remedy: str) -> "Failure":
        """One that is cut to the lengths that a failure may have."""
        return cls(kind, message[:_FAILURE_TEXT], remedy[:_FAILURE_TEXT])
