"""Finishing a move that was interrupted after its point of no return: `pymigrate recover`."""

import contextlib
from pathlib import Path

from migrate import treestore
from migrate.errors import MigrateError
from migrate.interrupts import uninterruptible
from migrate.journal import Entry, Journal, entries
from migrate.journal import load as load_entry
from migrate.phases import Phase
from migrate.settlement import call_off, clean_source, settle
from migrate.trees import Owner
from runtime import container, departed, netlock, processes, veth
from runtime.errors import ContainerError
from runtime.spec import load
from runtime.state import State, Store

LOCK_TIMEOUT = 5.0


class NothingToRecover(MigrateError):
    kind = "not-found"


def recover(store: Store, container_id: str) -> Entry:
    """Bring the newest undecided move of this container out of this host to its end; returns what it has come to.

    The decision to give the container up is on the disk (COMMITTED), and as a rule carried out: the target is told to
    run it. But a coordinator that was killed between the two has let it run on here. Then what the target has is old,
    and the container stays here: the target undoes the move.

    Raises NothingToRecover, InDoubt when the target still cannot be asked.
    """
    with store.lock(container_id, LOCK_TIMEOUT):
        entry = undecided(store, container_id)
        if entry is None:
            raise NothingToRecover(
                f"no move of container {container_id} is in doubt here", remedy="see `pymigrate migrations`"
            )
        with uninterruptible():
            state = store.load(container_id) if container_id in store.ids() else None
            if state is not None and state.created != entry.fields.get("created", state.created):
                state = None  # another container, which has been given the name since
            log = Journal.resume(entry)
            if state is not None and _runs(state) and call_off(log, entry):
                departed.erase(state.bundle)
            else:
                if state is not None:
                    _end(state)
                settle(log, entry.id, entry.target, str(store.root), entry.migration)
                if state is not None:  # otherwise somebody else may use by now what it has left
                    treestore.leave(entry.fields.get("leaving", {}), Owner(state.id, state.created), entry.migration)
                    if failure := clean_source(store, state, None):
                        raise failure
        return load_entry(entry.migration) or entry


def undecided(store: Store, container_id: str) -> Entry | None:
    """The newest move of this container out of this host that has no end."""
    found = [
        entry
        for entry in entries()
        if (entry.id, entry.role, entry.fields.get("root", str(store.root)))
        == (container_id, "source", str(store.root))
        and entry.phase in (Phase.COMMITTED, Phase.IN_DOUBT)
    ]
    return found[-1] if found else None


def _runs(state: State) -> bool:
    return processes.is_alive(state.pid, state.pid_start_time) and not processes.is_dying(state.pid)


def _end(state: State) -> None:
    with contextlib.suppress(OSError):
        departed.note(state)
    if state.has_bridge:
        veth.take_down(state)  # its peers are to hear of it at the target only
    container.end(state)
    with contextlib.suppress(ContainerError):
        netlock.ended(load(Path(state.bundle), state.annotations), state.id)
