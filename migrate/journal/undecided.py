"""Find the undecided moves of a container in the journals of this host.

A container is (id, created), wherever it runs; a move is its migration id. The tree that a move freezes is identified
by pid and start time of its init, the boot id, and the move that had brought it here before. A container with only the
same id is another container.
"""

from typing import Any

from migrate.errors import MigrateError
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.phases import FINAL, OPEN, Phase
from runtime.linux.processes import boot_id
from runtime.state.record import State
from runtime.state.store import Store

_UNDECIDED_THERE = frozenset({Phase.STOP_AND_COPY, Phase.PREPARED, Phase.COMMITTED})


class NothingToRecover(MigrateError):
    kind = "not-found"


def frozen_tree(state: State) -> dict[str, Any]:
    """Return the journal fields that identify the tree that a move freezes."""
    return {"init": [state.pid, state.pid_start_time], "boot": boot_id(), "before": state.move}


def is_tree(entry: Entry, state: State) -> bool | None:
    """Return whether a state is the one of the tree that the move froze.

    Return None if that is unknown: journals of earlier versions say only which container it was.
    """
    if state.created != entry.fields.get("created", state.created):
        return False
    if "init" not in entry.fields:
        return None
    return (entry.fields["init"], entry.fields["before"]) == ([state.pid, state.pid_start_time], state.move)


def undecided(store: Store, container_id: str, created: str | None = None) -> Entry | None:
    """Return the newest undecided move of a container out of this host. `created`: when it was created, if known.

    Also journal the end of moves that later events have decided.

    Raises DamagedJournal when a damaged journal may be of an undecided move.
    """
    journal.require_whole(container_id)
    moves = [entry for entry in journal.entries() if entry.id == container_id]
    state = store.look(container_id) if container_id in store.ids() else None
    for entry in reversed(moves):
        root, its = entry.fields.get("root", store.root), entry.fields.get("created")
        if (entry.role, root) != ("source", store.root) or entry.phase not in OPEN or created not in (None, its):
            continue
        if not _is_closed(entry, moves, state):
            return entry.with_root(store.root)
        Journal.resume(entry).record(Phase.RESUMED, reason="the container has come back since")
    return None


def undecided_here(store: Store, container_id: str) -> Entry | None:
    """Return the newest move of this container into this host whose outcome only its source knows.

    Raises DamagedJournal when a damaged journal may be of such a move.
    """
    moves = []
    for found in journal.scan():
        entry = found if isinstance(found, Entry) else found.entry
        if entry is not None and entry.id == container_id:
            if not isinstance(found, Entry) and entry.role == "target" and entry.phase not in FINAL:
                raise found
            moves.append(entry)
    for entry in reversed(moves):
        root = entry.fields.get("root", store.root)
        if (entry.role, root) == ("target", store.root) and entry.phase in _UNDECIDED_THERE:
            return None if _is_closed(entry, moves, None) else entry
    return None


def nothing_to_recover(store: Store, container_id: str) -> NothingToRecover:
    """Return the error for a container that has no undecided move out of this host."""
    words, remedy = f"no move of container {container_id} is in doubt here", "see `pymigrate migrations`"
    if (entry := undecided_here(store, container_id)) is not None:
        words += f", but one into this host, which {entry.source} decides"
        remedy = f"at {entry.source}: pymigrate recover {container_id}\n"
        remedy += f"if {entry.source} is gone for good: pymigrate recover --force-target {container_id}"
    return NothingToRecover(words, remedy=remedy)


def _is_closed(entry: Entry, moves: list[Entry], state: State | None) -> bool:
    """Return whether the container has come back since, which a move can do only after this one has ended well.

    A journal says so, or the container itself. The clock may have been set back: the move that had brought the frozen
    tree here is not a later one, whatever its time, and neither is another attempt to move that tree.
    """
    if (created := entry.fields.get("created")) is None:
        return False
    before = entry.fields.get("before")
    same = state is not None and (state.created, state.started) == (created, True)
    if same and state is not None and "init" in entry.fields and state.move not in (None, before):
        return True
    for other in moves:
        if other.fields.get("created") != created or other.started <= entry.started or other.migration == before:
            continue
        if other.role == "target" and other.phase is Phase.RESUMED:
            return True
        trees = entry.fields.get("init"), other.fields.get("init")
        if other.role == "source" and None not in trees and trees[0] != trees[1]:
            return True
    return False
