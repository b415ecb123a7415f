"""A mark on the bundle of an engine's container that a move has taken away: the engine sees it end, and knows no more.

Engines start again what has ended: by a restart policy, for a unit of systemd's, for their user. That would be a second
one of what runs elsewhere. And what they `delete` by its id may have come back by a move. The mark keeps both from
happening until the engine forgets the container, whose bundle it removes then.
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
    """Mark the bundle of a container that is about to leave this host, if it is an engine's. Raises OSError."""
    if not state.monitor_pid:  # nobody else than an engine watches over a detached container of its own
        os.close(os.open(_path(state.bundle), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def erase(bundle: str) -> None:
    """The container has stayed after all."""
    try:
        os.unlink(_path(bundle))
    except OSError:
        pass  # it is none of an engine's, or gone


def is_marked(bundle: str) -> bool:
    """Whether an engine of this host believes that a container of this bundle, which was moved away, has ended."""
    return os.path.exists(_path(bundle))


def require_not_moved(container_id: str, bundle: str) -> None:
    """For an engine's `create`. Raises Conflict."""
    if is_marked(bundle):
        raise Conflict(
            f"container {container_id} was moved by pymigrate: started again here there would be two of it",
            remedy=f"remove the engine's (podman rm, ctr task delete); if the moved one is no more, rm {_path(bundle)}",
        )


def require_not_returned(state: State) -> None:
    """For `delete`, which an engine calls to forget what has ended, and after a start that failed.

    Raises NotFound, which engines take for success, when the container lives, but not as the engine's any more.
    """
    if state.monitor_pid and processes.is_alive(state.pid, state.pid_start_time):
        for bundle in filter(is_marked, state.bundle_hints):
            raise NotFound(
                f"the container of {bundle} does not exist any more: the {state.id} that runs here has come by a move",
                remedy=f"have the engine forget it (podman rm, ctr task delete), or `pymigrate kill {state.id} KILL`",
            )


def _path(bundle: str) -> str:
    return os.path.join(bundle, _MARK)
