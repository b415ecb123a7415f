"""The statuses of a container (runtime-spec, runtime.md), and the verbs that each allows."""

from __future__ import annotations

from runtime.errors import Conflict


class Status(str):
    """The status of a container. `require` raises Conflict when a verb does not fit."""

    __slots__ = ()
    CREATING: Status
    CREATED: Status
    RUNNING: Status
    PAUSED: Status
    STOPPED: Status

    def require(self, container_id: str, verb: str, *allowed: Status) -> None:
        if self in allowed:
            return
        if verb == "start" and self == "stopped":
            raise Conflict(f"cannot start a container that has stopped: {container_id}")
        if verb == "start" and self in ("running", "paused"):
            raise Conflict(f"cannot start an already running container: {container_id}")
        if self == "stopped":
            raise Conflict(f"container not running: cannot {verb} {container_id}, it has stopped")
        raise Conflict(f"cannot {verb} container {container_id}: it is {self}")


for _name in ("creating", "created", "running", "paused", "stopped"):
    setattr(Status, _name.upper(), Status(_name))
