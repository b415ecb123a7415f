"""A mark on the bundle of an engine's container that a move has taken away. The engine only sees it exit.

Engines restart containers that have exited: by a restart policy, for a systemd unit, for their user. The restarted one
would be a second copy of a container that runs elsewhere. And a container that an engine deletes by its id may have
come back by a move. The mark prevents both until the engine forgets the container, because it then removes the bundle.
"""

from __future__ import annotations

import os

from runtime.errors import Conflict, NotFound
from runtime.linux import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.record import State

_MARK = "moved-by-pymigrate"


def note(state: State) -> None:
    """Mark the bundle of a container that is about to leave this host, if an engine owns it. Raises OSError."""
    if not state.monitor_pid:  # only an engine monitors a detached container itself
        os.close(os.open(_path(state.bundle), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def erase(bundle: str) -> None:
    """Remove the mark, because the container stays after all."""
    try:
        os.unlink(_path(bundle))
    except OSError:
        pass  # no engine owns it, or it is gone


def is_marked(bundle: str) -> bool:
    """Return True if an engine of this host takes a container of this bundle, which was moved away, for exited."""
    return os.path.exists(_path(bundle))


def require_not_moved(container_id: str, bundle: str) -> None:
    """Raise Conflict for an engine's `create` of a container that was moved away."""
    if is_marked(bundle):
        raise Conflict(
            f"container {container_id} was moved by pymigrate: a restart here would make a second one",
            remedy=f"remove the engine's (podman rm, ctr task delete); if the moved one is gone, rm {_path(bundle)}",
        )


def require_not_returned(state: State) -> None:
    """Check a `delete`, which an engine calls to forget a container that has exited, or whose start failed.

    Raises NotFound, which engines take for success, when the container lives but the engine no longer owns it.
    """
    if state.monitor_pid and processes.is_alive(state.pid, state.pid_start_time):
        for bundle in filter(is_marked, state.bundle_hints):
            raise NotFound(
                # containerd looks for "does not exist".
                f"the container of {bundle} does not exist: the {state.id} that runs here has come by a move",
                remedy=f"have the engine forget it (podman rm, ctr task delete), or `pymigrate kill {state.id} KILL`",
            )


def _path(bundle: str) -> str:
    return os.path.join(bundle, _MARK)
