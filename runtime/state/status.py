"""The statuses of a container (runtime-spec, runtime.md), and the statuses that allow each verb."""

from __future__ import annotations

from runtime.errors import Conflict


class Status(str):
    """The status of a container. `require` raises Conflict when it does not allow a verb."""

    __slots__ = ()
    CREATING: Status
    CREATED: Status
    RUNNING: Status
    PAUSED: Status
    STOPPED: Status

    def allows(self, verb: str) -> bool:
        return self in ALLOWED[verb]

    def require(self, container_id: str, verb: str) -> None:
        """Raise Conflict unless this status allows `verb`, which is a key of ALLOWED."""
        if self.allows(verb):
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

ALIVE = (Status.CREATED, Status.RUNNING, Status.PAUSED)  # those of a container that has an init

# Verbs in the words of a message. `delete --force`, and signals to all processes of a container, need no status.
ALLOWED: dict[str, tuple[Status, ...]] = {
    "start": (Status.CREATED,),
    "exec": (Status.CREATED, Status.RUNNING),
    "kill": ALIVE,
    "pause": (Status.RUNNING,),  # not CREATED: `start` would wait for a frozen init
    "resume": (Status.PAUSED,),
    "update": ALIVE,
    "delete": (Status.CREATED, Status.STOPPED),
    "checkpoint": (Status.RUNNING, Status.PAUSED),
    "move": (Status.RUNNING,),
    "attach to": ALIVE,
    "show events of": ALIVE,
}
