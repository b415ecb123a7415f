"""The ways out of an undecided move without the other host: `pymigrate recover` with --force-source and the like.

Each says first what it means: nobody can tell here what the other host does.
"""

import socket

from migrate.errors import Lost, MigrateError
from migrate.interrupts import uninterruptible
from migrate.journal.journal import Entry, Journal
from migrate.journal.undecided import undecided, undecided_here
from migrate.phases import Phase
from migrate.source import ask_later
from migrate.source.recover import LOCK_TIMEOUT, Fate, Left, NothingToRecover, nothing_to_recover, stays
from migrate.source.settle import known_there
from runtime import notices
from runtime.linux import processes
from runtime.state.store import Store


def force_source(store: Store, container_id: str) -> str:
    """The target is gone for good: decide that the container is here, or nowhere. Returns where it is, in words.

    If it is here, the target is told to discard what it has when it comes back. If the move has ended it here, the
    images at the target are the last copy: they stay, and `recover` resumes them when the target comes back.

    Raises NothingToRecover; MigrateError when the target answers; Lost when the move has ended the container here.
    """
    entry = _stopped(store, container_id)
    with store.lock(container_id, LOCK_TIMEOUT), uninterruptible():
        _require_unanswered(entry)
        notices.warn(
            f"{entry.target} is taken to be gone for good: if it runs {entry.id} all the same, there are two of it"
        )
        log, left, words = Journal.resume(entry), Left.of(entry, store), "decided by --force-source"
        if left.fate is Fate.KILLED:
            log.record(Phase.LOST, reason=words)
            raise Lost(
                f"container {entry.id} is lost: it was ended here to go on at {entry.target}, which is gone for good",
                remedy=f"if {entry.target} comes back after all: pymigrate recover {entry.id}\n"
                f"to close the entry: pymigrate recover --forget {entry.id}",
            )
        log.record(Phase.ABORTED, reason=words, cleaned=False)
        ask_later.start(store.root, entry.migration)
        return stays(entry, left, socket.gethostname())


def force_target(store: Store, container_id: str) -> str:
    """The source is gone for good, or has lost its journal: restore the container here from the images of its move.

    Returns where it is, in words. Raises NothingToRecover; MigrateError when the move still goes on; Lost when the
    images are not whole.
    """
    from migrate.target.incoming import Incoming

    entry = undecided_here(store, container_id)
    if entry is None:
        raise NothingToRecover(
            f"no move of container {container_id} into this host is undecided", remedy="see `pymigrate migrations`"
        )
    agent = entry.fields.get("agent", {})
    if processes.is_alive(int(agent.get("pid", 0)), agent.get("start_time")):
        raise MigrateError(
            f"container {container_id}: its move from {entry.source} goes on: "
            f"the agent (process {agent['pid']}) still has a connection",
            remedy="an agent whose connection is dead ends by itself within some minutes",
        )
    notices.warn(
        f"{entry.source} is taken to be gone for good: if it runs {entry.id} all the same, or has run it since the "
        "images were made, there are two of it, and the one here is older"
    )
    incoming = Incoming(store)
    try:
        answer = incoming.settle(entry.migration, "resume")
    finally:
        incoming.connection_lost()  # what could not be restored stays, for another attempt
    if answer["workload"] != "TARGET":
        raise Lost(f"container {container_id} cannot be restored here: {answer['reason']}")
    return f"{container_id}: runs at {socket.gethostname()}"


def forget(store: Store, container_id: str) -> str:
    """Close the newest undecided move of a container by hand; nothing else is changed. Returns what that means.

    Raises NothingToRecover.
    """
    entry = _stopped(store, container_id)
    with store.lock(container_id, LOCK_TIMEOUT):
        left = Left.of(entry, store)
        Journal.resume(entry).record(Phase.FORGOTTEN, reason="closed by --forget")
    return (
        f"{container_id}: its move to {entry.target} is closed here, and nothing else is changed: "
        f"the container {left.fate}; what {entry.target} has of it is not known, and stays there"
    )


def _stopped(store: Store, container_id: str) -> Entry:
    """Return the undecided move, about which no process asks by itself from now on. Raises NothingToRecover."""
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
