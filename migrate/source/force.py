"""Decide a move at its source without the target: `pymigrate recover` with --force-source and --forget.

Each warns first, because this host cannot know what the target does.
"""

import socket

from migrate.errors import Lost, MigrateError
from migrate.interrupts import uninterruptible
from migrate.journal.journal import Entry, Journal
from migrate.journal.undecided import nothing_to_recover, undecided
from migrate.limits import CONTAINER_LOCK_TIMEOUT
from migrate.phases import Phase
from migrate.source import ask_later
from migrate.source.recover import Fate, Left, stays
from migrate.source.settle import known_there
from runtime import notices
from runtime.state.store import Store


def force_source(store: Store, container_id: str) -> str:
    """Decide that the container is here or nowhere, because the target is gone for good. Return where it is, in words.

    If it is here, the target is told to discard what it has when it comes back. If the move has killed it here, the
    images at the target are the last copy: they stay, and `recover` restores them when the target comes back.

    Raises NothingToRecover; MigrateError when the target answers; Lost when the move has killed the container here.
    """
    entry = _stopped(store, container_id)
    with store.lock(container_id, CONTAINER_LOCK_TIMEOUT), uninterruptible():
        _require_unanswered(entry)
        notices.warn(f"{entry.target} is taken to be gone for good: if it still runs {entry.id}, there are two of it")
        log, left, words = Journal.resume(entry), Left.of(entry, store), "decided by --force-source"
        if left.fate is Fate.KILLED:
            log.record(Phase.LOST, reason=words)
            raise Lost(
                f"container {entry.id} is lost: it was killed here to continue at {entry.target}, "
                "which is gone for good",
                remedy=f"if {entry.target} comes back after all: pymigrate recover {entry.id}\n"
                f"to close the entry: pymigrate recover --forget {entry.id}",
            )
        log.record(Phase.ABORTED, reason=words, cleaned=False)
        ask_later.start(store.root, entry.migration)
        return stays(entry, left, socket.gethostname())


def forget(store: Store, container_id: str) -> str:
    """Close the newest undecided move of a container, and change nothing else. Return what that means.

    Raises NothingToRecover.
    """
    entry = _stopped(store, container_id)
    with store.lock(container_id, CONTAINER_LOCK_TIMEOUT):
        left = Left.of(entry, store)
        Journal.resume(entry).record(Phase.FORGOTTEN, reason="closed by --forget")
    return (
        f"{container_id}: its move to {entry.target} is closed here, and nothing else is changed: "
        f"the container {left.fate}; what {entry.target} has of it is unknown, and stays there"
    )


def _stopped(store: Store, container_id: str) -> Entry:
    """Return the undecided move, after ending the process that asks about it. Raises NothingToRecover."""
    entry = undecided(store, container_id)
    if entry is None:
        raise nothing_to_recover(store, container_id)
    ask_later.stop(entry.migration)
    entry = undecided(store, container_id)
    if entry is None:
        raise nothing_to_recover(store, container_id)
    return entry


def _require_unanswered(entry: Entry) -> None:
    answer = known_there(entry)
    if answer:
        where = {"TARGET": "it has resumed the container", "SOURCE": "it has nothing of the container"}
        raise MigrateError(
            f"{entry.target} is not gone: it answers that {where.get(answer, 'it holds the container')}",
            remedy=f"pymigrate recover {entry.id}",
        )
