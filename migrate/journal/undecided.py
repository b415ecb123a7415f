"""Which moves of a container have no end yet at this host, by its journals.

A container is (id, created), wherever it runs; a move is its migration id. The tree that a move freezes is known by
pid and start time of its init, the boot id, and the move that had brought it here before. What carries only the same
id is another container.
"""

from typing import Any

from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.phases import FINAL, OPEN, Phase
from runtime.linux.processes import boot_id
from runtime.state.record import State
from runtime.state.store import Store

_UNDECIDED_THERE = frozenset({Phase.STOP_AND_COPY, Phase.PREPARED, Phase.COMMITTED})


def frozen_tree(state: State) -> dict[str, Any]:
    """Return the journal's fields that say which tree a move freezes."""
    return {"init": [state.pid, state.pid_start_time], "boot": boot_id(), "before": state.move}


def is_tree(entry: Entry, state: State) -> bool | None:
    """Return whether a state is that of the tree which the move has frozen.

    None where that is not known: the journals of earlier versions say only which container it was.
    """
    if state.created != entry.fields.get("created", state.created):
        return False
    if "init" not in entry.fields:
        return None
    return (entry.fields["init"], entry.fields["before"]) == ([state.pid, state.pid_start_time], state.move)


def undecided(store: Store, container_id: str, created: str | None = None) -> Entry | None:
    """Return the newest move of this container out of this host that has no end; only of the one `created` then.

    Journals the end of those that have one by what has happened since. Raises DamagedJournal when one may have no end,
    and its journal does not tell.
    """
    journal.require_whole(container_id)
    moves = [entry for entry in journal.entries() if entry.id == container_id]
    state = store.look(container_id) if container_id in store.ids() else None
    for entry in reversed(moves):
        root, its = entry.fields.get("root", store.root), entry.fields.get("created")
        if (entry.role, root) != ("source", store.root) or entry.phase not in OPEN or created not in (None, its):
            continue
        if not _is_closed(entry, moves, state):
            return entry
        Journal.resume(entry).record(Phase.RESUMED, reason="the container has come back since")
    return None


def undecided_here(store: Store, container_id: str) -> Entry | None:
    """Return the newest move of this container into this host of which only its source knows the outcome.

    Raises DamagedJournal when one may be that, and its journal does not tell.
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


def _is_closed(entry: Entry, moves: list[Entry], state: State | None) -> bool:
    """Return whether the container has come back since, which a move can only do after this one has ended well.

    Its journal says so, or the container itself. The clock may have been set back: the move that had brought the frozen
    tree here is not a later one, whatever its time, nor is another attempt to move that tree.
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
