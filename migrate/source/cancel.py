"""Cancel a move that another process of this host makes: `pymigrate cancel`."""

from migrate.errors import DeadlineExceeded, MigrateError
from migrate.journal import journal
from migrate.journal.journal import Entry
from migrate.journal.undecided import undecided, undecided_here
from migrate.journal.under_way import Mover, Watch, movers
from migrate.limits import CANCEL_TIMEOUT
from migrate.phases import OPEN, Phase
from runtime.checkpoint import options as criu_options
from runtime.errors import NotFound
from runtime.state.store import Store

_DECIDED = OPEN | {Phase.RESUMED}


class NotUnderWay(MigrateError):
    kind = "not-found"


class TooLate(MigrateError):
    """The move has passed its point of no return."""

    kind = "conflict"


def cancel(store: Store, container_id: str) -> str:
    """Cancel the move of a container out of this host, and wait until it has been rolled back.

    Return where the container is, in words. Raises NotFound, NotUnderWay, TooLate, and DeadlineExceeded if the move has
    not ended after CANCEL_TIMEOUT seconds.
    """
    found = movers(store.root, container_id)
    if not found:
        raise _nothing_to_cancel(store, container_id)
    mover = found[-1]
    entry = journal.load(mover.migration)
    if entry is not None and entry.phase in _DECIDED:
        raise _too_late(entry)
    with Watch() as watch:
        mover.cancel()
        if not watch.wait_end(mover, CANCEL_TIMEOUT):
            raise _unanswered(mover)
    return _outcome(store, mover)


def _outcome(store: Store, mover: Mover) -> str:
    """Return where the container is after its move has ended. Raises TooLate."""
    entry = journal.load(mover.migration)
    if entry is not None and entry.phase in _DECIDED:
        raise _too_late(entry)
    exists = mover.id in store.ids()
    where = "runs here" if exists and criu_options.is_running(store.look(mover.id)) else "has exited here"
    why = "" if entry is None or entry.phase is not Phase.ABORTED else f": {entry.fields.get('reason')}"
    return f"{mover.id}: was not moved to {mover.target}, it {where}{why}"


def _too_late(entry: Entry, *, left: bool = False) -> TooLate:
    """`left`: the process that made the move has exited."""
    move = f"the move of container {entry.id} to {entry.target} cannot be cancelled"
    if entry.phase is Phase.RESUMED:
        return TooLate(f"{move}: it runs there already", remedy=f"at {entry.target}: pymigrate move {entry.id} ...")
    waits = entry.phase is Phase.COMMITTED and not left
    remedy = "wait for its end" if waits else f"pymigrate recover {entry.id}"
    return TooLate(f"{move}: it is past the point of no return ({entry.phase})", remedy=remedy)


def _unanswered(mover: Mover) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"container {mover.id}: process {mover.pid}, which moves it, was asked to cancel that and has not ended within "
        f"{CANCEL_TIMEOUT:g} s",
        remedy=f"is {mover.target} cut off, or process {mover.pid} stopped? see `pymigrate migrations --id {mover.id}`",
    )


def _nothing_to_cancel(store: Store, container_id: str) -> MigrateError | NotFound:
    """Return the error for a container that no process of this host moves."""
    if (entry := undecided(store, container_id)) is not None:
        return _too_late(entry, left=True)
    if (entry := undecided_here(store, container_id)) is not None:
        return NotUnderWay(
            f"a move of container {container_id} into this host is not decided yet, and only its source can cancel it",
            remedy=f"at {entry.source}: pymigrate cancel {container_id}",
        )
    if container_id not in store.ids():
        return NotFound.of(container_id)
    return NotUnderWay(f"no move of container {container_id} is under way here", remedy="see `pymigrate migrations`")
