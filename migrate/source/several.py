"""Move several containers to one host, one after the other, over one connection.

A container that cannot move does not keep the others from moving. What concerns the host and not the container does,
as an unreachable host or a lost container: the rest is then not tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from criu_rpc.errors import Error
from migrate.disk import explained
from migrate.errors import Blocked, Cancelled, Interrupted, MoveFailed
from migrate.events import Monitor
from migrate.model import MigrationSpec
from migrate.source.move import move
from migrate.wire.peer import Session
from runtime.state.store import Store

_STOPS = frozenset({"host", "target", "in-doubt", "lost", "interrupted"})
_WORST = ("lost", "in-doubt", "moved-dirty", "rolled-back")  # the exit status is that of the first one found


@dataclass
class Outcome:
    """What has become of each container, by id: `failed` has the error of each move that failed."""

    moved: list[str] = field(default_factory=list)
    failed: dict[str, Error] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The kind of the worst failure, "ok" if there is none."""
        kinds = [error.kind for error in self.failed.values()]
        return next((kind for kind in _WORST if kind in kinds), kinds[0] if kinds else "ok")


def move_all(
    store: Store,
    wanted: Sequence[MigrationSpec],
    monitor: Monitor,
    outcome: Outcome,
    on_failure: Callable[[str, Error], object],
) -> None:
    """Move containers, all to the same host. Keep `outcome` up to date, and call `on_failure` for each failed move.

    Raises NotFound, before anything is touched, if one of them does not exist.
    """
    for spec in wanted:
        store.load(spec.id)
    outcome.untried[:] = [spec.id for spec in wanted]
    with Session(wanted[0].host, len(wanted)) as session:
        for spec in wanted:
            outcome.untried.remove(spec.id)
            try:
                move(store, spec, monitor, session)
                outcome.moved.append(spec.id)
            except (Error, OSError) as caught:
                error = explained(caught) if isinstance(caught, OSError) else caught
                outcome.failed[spec.id] = error
                on_failure(spec.id, error)
                if _stops(error):
                    return
                if not isinstance(error, Blocked):
                    session.close()  # it may be what has failed


def _stops(error: Error) -> bool:
    """Return whether to try no other container after this failure."""
    cause = error.cause if isinstance(error, MoveFailed) else error
    if isinstance(cause, Interrupted):
        return not isinstance(cause, Cancelled)
    return error.kind in _STOPS
