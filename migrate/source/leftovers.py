"""What earlier moves have left at a target because it could not be told of their end."""

from collections.abc import Iterator

from migrate.events import Reporter
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.limits import DISCARD_TIMEOUT
from migrate.phases import Phase, workload
from migrate.wire import protocol
from migrate.wire.peer import Peer, RemoteFailure


def discard(peer: Peer, log: Journal, reporter: Reporter) -> None:
    """Have the target of a move that begins remove what it has of aborted moves whose end it was not told."""
    uncleaned = list(_uncleaned(log.entry))
    if not uncleaned:
        return
    try:
        peer.call(protocol.Discard([entry.migration for entry in uncleaned]), DISCARD_TIMEOUT)
    except RemoteFailure as error:
        reporter.warn(f"{log.entry.target} still has images of a move that was aborted: {error}")
        return
    for entry in uncleaned:
        Journal.resume(entry).record(Phase.ABORTED, cleaned=True)


def _uncleaned(current: Entry) -> Iterator[Entry]:
    """Yield moves to this host that were aborted without its knowledge, or whose source process was killed.

    An undecided move of the same container cannot be under way, because the caller holds the container's lock.
    """
    for entry in journal.entries():
        if (entry.role, entry.target) != ("source", current.target) or entry.migration == current.migration:
            continue
        untold = entry.phase is Phase.ABORTED and entry.fields.get("cleaned") is False
        same = (entry.id, entry.fields.get("root")) == (current.id, current.root)
        if untold or (same and workload(entry.phase) == "SOURCE" and entry.phase is not Phase.ABORTED):
            yield entry
