"""state.json: the record of one container."""

from __future__ import annotations

import os

from runtime.errors import Conflict, InvalidId, StateError
from runtime.light.records import Record
from runtime.linux import processes
from runtime.state.status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.2.0"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-")


def check_id(value: str) -> str:
    """Return `value` if it is a container id: fit to be a directory's name (runc's rule). Raises InvalidId."""
    if not 0 < len(value) <= 200 or not _ID_CHARACTERS.issuperset(value) or value.startswith("."):
        raise InvalidId(
            f"invalid container id {value[:80]!r}",
            remedy="an id is made of letters, digits, _ + . and -, at most 200, and does not begin with a dot",
        )
    return value


class State(Record):
    """state.json. `pid` is 0 until there is an init; the start times defeat the reuse of pids.

    `hooks` are those of later points, poststart and poststop, because the bundle may be gone by then; `cgroup_paths`
    maps a v1 controller (or "" for v2) to the directory; `systemd_unit` is the unit of these cgroups if systemd made
    them; `monitor_pid` is the monitor's pid, 0 if the caller of `create` is the monitor; `stdio` are the init's
    descriptors 0 to 2 as /proc shows them; `bundle_hints` are the bundle's places on hosts that the container came
    from; `move` is the id of the migration that has brought it or is bringing it, `moved_from` the host that it comes
    from, None otherwise; `releasing` says that CRIU, which holds the container, is being told to resume it, and may do
    so even if this process dies; `resources` are the changes of `update` to linux.resources.
    """

    id: str
    bundle: str
    rootfs: str
    created: str
    log_path: str
    pid: int = 0
    pid_start_time: int | None = None
    monitor_pid: int = 0
    monitor_start_time: int | None = None
    started: bool = False
    releasing: bool = False
    hooks: dict[str, list[dict[str, Any]]] = {}
    cgroup_paths: dict[str, str] = {}
    systemd_unit: str | None = None
    namespace_paths: dict[str, str] = {}
    stdio: tuple[str, str, str] = ("", "", "")
    annotations: dict[str, str] = {}
    bundle_hints: tuple[str, ...] = ()
    move: str | None = None
    moved_from: str | None = None
    resources: dict[str, Any] = {}

    @property
    def directory(self) -> str:
        """The directory that holds the container's files (see store.py)."""
        return os.path.dirname(self.log_path)

    @property
    def status(self) -> Status:
        """The status, derived from the processes that live now, not from the file."""
        if self.pid and processes.is_alive(self.pid, self.pid_start_time):
            if not self.started:
                return Status.CREATED if self.move is None else Status.CREATING
            from runtime.cgroups.cgroup import Cgroup

            return Status.PAUSED if Cgroup.of(self).frozen else Status.RUNNING
        if not self.pid and self.monitor_pid and processes.is_alive(self.monitor_pid, self.monitor_start_time):
            return Status.CREATING
        return Status.STOPPED

    def require_here(self) -> None:
        """Raise Conflict for a container that is being moved here: its source may still resume it.

        Once its held processes are dead, it counts as stopped and can be deleted.
        """
        if self.move is None or self.started or self.status is Status.STOPPED:
            return
        source = self.moved_from[:64] if self.moved_from and self.moved_from.isprintable() else "another host"
        raise Conflict(
            f"{self.id} is being moved here from {source}: no verb can act on it until it runs here",
            remedy=f"wait for the end of the move; if it does not end, `pymigrate recover {self.id}` at {source}",
        )

    @property
    def has_bridge(self) -> bool:
        """Whether the container has its own network on a bridge of the host."""
        from runtime.spec.annotations import NET

        return self.annotations.get(NET, "").startswith("bridge=")

    @property
    def owner(self) -> bytes:
        """The mark of its cgroups. An id alone does not do: it can be used again, later or below another --root."""
        return f"{self.id} {self.created}".encode()

    def oci(self, status: str | None = None) -> dict[str, Any]:
        """Return the state as the runtime-spec (and runc) shows it, and as hooks get it on stdin."""
        status = self.status if status is None else status
        shown: dict[str, Any] = {"ociVersion": OCI_VERSION, "id": self.id}
        shown |= {"pid": 0 if status == "stopped" else self.pid, "status": str(status), "bundle": self.bundle}
        return shown | {
            "rootfs": self.rootfs, "created": self.created, "annotations": self.annotations,
            "owner": _owner(self.directory),
        }  # fmt: skip


def _owner(directory: str) -> str:
    """Return the owner of a container: the user that has made its directory."""
    try:
        uid = os.stat(directory).st_uid
    except OSError:  # it is being deleted
        uid = os.geteuid()
    if uid == 0:
        return "root"
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "bundle", "rootfs", "created", "log_path"), (str,)),
    **dict.fromkeys(("pid", "monitor_pid"), (int,)),
    **dict.fromkeys(("pid_start_time", "monitor_start_time"), (int, type(None))),
    **dict.fromkeys(("started", "releasing"), (bool,)),
    **dict.fromkeys(("hooks", "cgroup_paths", "namespace_paths", "annotations", "resources"), (dict,)),
    **dict.fromkeys(("stdio", "bundle_hints"), (list,)),
    **dict.fromkeys(("move", "moved_from", "systemd_unit"), (str, type(None))),
}


# Fields that states of earlier versions lack, with their values. Containers of those versions live on under this one.
_ADDED: dict[str, Any] = {"resources": {}, "releasing": False, "moved_from": None}
# Field names of earlier versions.
_RENAMED = {"shim_pid": "monitor_pid", "shim_start_time": "monitor_start_time"}
_STRINGS = ("cgroup_paths", "namespace_paths", "annotations")
_PID_MAX = 1 << 22  # PID_MAX_LIMIT (proc(5), pid_max)


def parse(value: Any, path: str, container_id: str, remedy: str) -> State:
    """Return the state that the JSON of a state.json holds. Raises StateError, which names `path` and the field."""
    if isinstance(value, dict):
        value = _ADDED | {_RENAMED.get(name, name): item for name, item in value.items()}
    if not isinstance(value, dict) or value.pop("ociVersion", None) != OCI_VERSION or set(value) != set(_KINDS):
        raise StateError(f"{path}: is not a state of this version", remedy=remedy)
    for name, kinds in _KINDS.items():
        if type(value[name]) not in kinds:
            raise StateError(f"{path}: {name}: has the wrong type", remedy=remedy)
    for name in _STRINGS:
        if not all(isinstance(item, str) for item in value[name].values()):
            raise StateError(f"{path}: {name}: must hold strings", remedy=remedy)
    if value["id"] != container_id:
        raise StateError(f"{path}: id: is the id of another container", remedy=remedy)
    if not all(0 <= value[name] <= _PID_MAX for name in ("pid", "monitor_pid")):
        raise StateError(f"{path}: pid: is not a process id", remedy=remedy)
    stdio = (*map(str, value["stdio"]), "", "", "")[:3]
    return State(**{**value, "stdio": stdio, "bundle_hints": tuple(map(str, value["bundle_hints"]))})
