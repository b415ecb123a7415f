"""What is known of a container on this host: state.json, its lock, and which verb each status allows.

<root>/<id>/        0700
    state.json      0600, written beside and renamed
    exec.fifo       between create and start: init waits on it
    exit.json       once init has ended
    log, log.1      what it wrote here, and what it had written elsewhere before
<root>/.<id>.lock   taken by every verb that changes the container
"""

import dataclasses
import enum
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime import processes
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, InvalidId, NotFound, StateError

OCI_VERSION = "1.2.0"
_ID = re.compile(r"[A-Za-z0-9_+.-]{1,200}")


def check_id(value: str) -> str:
    """Return a container id that is fit to be a directory's name (runc's rule). Raises InvalidId."""
    if not _ID.fullmatch(value) or value.startswith("."):
        raise InvalidId(
            f"invalid container id {value[:80]!r}",
            remedy="an id is made of letters, digits, _ + . and -, at most 200, and does not begin with a dot",
        )
    return value


class Status(enum.StrEnum):
    """The status of a container. `require` raises Conflict when a verb does not fit."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"

    def require(self, container_id: str, verb: str, *allowed: "Status") -> None:
        if self in allowed:
            return
        if verb == "start" and self is Status.STOPPED:
            raise Conflict(f"cannot start a container that has stopped: {container_id}")
        if verb in ("kill", "exec") and self is Status.STOPPED:
            raise Conflict(f"container not running: {container_id}")
        raise Conflict(f"cannot {verb} container {container_id}: it is {self}")


@dataclass(frozen=True)
class State:
    """state.json. `pid` is 0 until there is an init; the start times defeat the reuse of pids.

    `cgroup_paths` maps a v1 controller (or "" for v2) to the directory; `stdio` are the init's descriptors 0 to 2 as
    /proc shows them; `bundle_hints` are where the bundle lay on hosts it came from; `move` is the id of a migration
    that is going on, None otherwise.
    """

    id: str
    bundle: str
    rootfs: str
    created: str
    log_path: str
    pid: int = 0
    pid_start_time: int | None = None
    shim_pid: int = 0
    shim_start_time: int | None = None
    started: bool = False
    cgroup_paths: dict[str, str] = field(default_factory=dict)
    namespace_paths: dict[str, str] = field(default_factory=dict)
    stdio: tuple[str, str, str] = ("", "", "")
    annotations: dict[str, str] = field(default_factory=dict)
    bundle_hints: tuple[str, ...] = ()
    move: str | None = None

    @property
    def status(self) -> Status:
        """Derived from what lives now, not from what was written."""
        if self.pid and processes.is_alive(self.pid, self.pid_start_time):
            if not self.started:
                return Status.CREATED
            from runtime.cgroups import Cgroup

            return Status.PAUSED if Cgroup(self.cgroup_paths).frozen else Status.RUNNING
        if not self.pid and self.shim_pid and processes.is_alive(self.shim_pid, self.shim_start_time):
            return Status.CREATING
        return Status.STOPPED

    def oci(self) -> dict[str, Any]:
        """The state as the runtime-spec (and runc) shows it; what hooks get on stdin."""
        status = self.status
        shown = {"ociVersion": OCI_VERSION, "id": self.id, "pid": 0 if status is Status.STOPPED else self.pid}
        shown |= {"status": str(status), "bundle": self.bundle, "rootfs": self.rootfs, "created": self.created}
        return shown | {"owner": "root", "annotations": self.annotations}


_FIELDS = {item.name: item for item in dataclasses.fields(State)}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "bundle", "rootfs", "created", "log_path"), (str,)),
    **dict.fromkeys(("pid", "shim_pid"), (int,)),
    **{name: (int, type(None)) for name in ("pid_start_time", "shim_start_time")},
    "started": (bool,),
    **dict.fromkeys(("cgroup_paths", "namespace_paths", "annotations"), (dict,)),
    **dict.fromkeys(("stdio", "bundle_hints"), (list,)),
    "move": (str, type(None)),
}


class Store:
    """The containers of one root directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, container_id: str) -> Path:
        """Where a container keeps its files. Raises InvalidId."""
        return self.root / check_id(container_id)

    def ids(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        except FileNotFoundError:
            return []

    def load(self, container_id: str) -> State:
        """Raises NotFound, StateError."""
        path = self.directory(container_id) / "state.json"
        try:
            value = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"container does not exist: {container_id}", remedy="`pymigrate list` shows those of this host"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise StateError(
                f"{path}: cannot be read: {error}",
                remedy=f"`pymigrate delete --force {container_id}` removes what is left",
            ) from None
        if not isinstance(value, dict) or value.pop("ociVersion", None) != OCI_VERSION or set(value) != set(_FIELDS):
            raise StateError(f"{path}: is no state of this version", remedy=f"pymigrate delete --force {container_id}")
        for name, kinds in _KINDS.items():
            if type(value[name]) not in kinds:
                raise StateError(
                    f"{path}: {name}: is of the wrong type", remedy=f"pymigrate delete --force {container_id}"
                )
        stdio = (*map(str, value["stdio"]), "", "", "")[:3]
        return State(**{**value, "stdio": stdio, "bundle_hints": tuple(map(str, value["bundle_hints"]))})

    def save(self, state: State) -> None:
        """Write state.json so that a reader sees the old one or the new one, whole."""
        value = {"ociVersion": OCI_VERSION, **dataclasses.asdict(state)}
        path = self.directory(state.id) / "state.json"
        temporary = path.with_name(f".state.json.{os.getpid()}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(fd)
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ContainerError(f"{path}: cannot be written: {error.strerror}") from None

    def create(self, container_id: str) -> Path:
        """Make the directory of a new container. Raises Conflict when the id is in use."""
        directory = self.directory(container_id)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise Conflict(
                f"container with given ID already exists: {container_id}",
                remedy=f"choose another id, or `pymigrate delete {container_id}`",
            ) from None
        return directory

    def remove(self, container_id: str) -> None:
        """Remove a container's directory; harmless when it is gone."""
        shutil.rmtree(self.directory(container_id), ignore_errors=True)

    @contextmanager
    def lock(self, container_id: str, timeout: float = 10.0) -> Iterator[None]:
        """Hold the container's lock; it is released when this process ends, however it ends.

        Raises DeadlineExceeded when another invocation holds it for `timeout` seconds.
        """
        path = self.root / f".{check_id(container_id)}.lock"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same(fd, path):
                    break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise DeadlineExceeded(
                        f"container {container_id} is busy: another pymigrate works on it", remedy="is it being moved?"
                    ) from None
                time.sleep(0.02)
            os.close(fd)
        try:
            yield
        finally:
            if not self.directory(container_id).exists():
                path.unlink(missing_ok=True)
            os.close(fd)


def _is_same(fd: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path` (its last holder may have removed it)."""
    try:
        there, ours = path.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
