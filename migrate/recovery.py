"""Finishing a move that was interrupted after its point of no return: `pymigrate recover`."""

import contextlib
from pathlib import Path

from migrate import treestore
from migrate.errors import MigrateError
from migrate.interrupts import uninterruptible
from migrate.journal import Entry, Journal, entries
from migrate.phases import Phase
from migrate.settlement import clean_source, settle
from migrate.trees import Owner
from runtime import container, netlock, veth
from runtime.errors import ContainerError
from runtime.spec import load
from runtime.state import Store

LOCK_TIMEOUT = 5.0


class NothingToRecover(MigrateError):
    kind = "not-found"


def recover(store: Store, container_id: str) -> Entry:
    """Bring the newest undecided move of this container out of this host to its end at the target.

    The source gave the container up (COMMITTED is journalled), so the target is told to run it. Raises
    NothingToRecover, InDoubt when the target still cannot be asked.
    """
    with store.lock(container_id, LOCK_TIMEOUT):
        undecided = [
            entry
            for entry in entries()
            if entry.id == container_id and entry.role == "source" and entry.phase in (Phase.COMMITTED, Phase.IN_DOUBT)
        ]
        if not undecided:
            raise NothingToRecover(
                f"no move of container {container_id} is in doubt here", remedy="see `pymigrate migrations`"
            )
        entry = undecided[-1]
        with uninterruptible():
            state = store.load(container_id) if container_id in store.ids() else None
            if state is not None and state.created != entry.fields.get("created", state.created):
                state = None  # another container, which has been given the name since
            if state is not None:
                if state.has_bridge:
                    veth.take_down(state)  # its peers are to hear of it at the target only
                container.end(state)
                with contextlib.suppress(ContainerError):
                    netlock.ended(load(Path(state.bundle), state.annotations), state.id)
            settle(Journal.resume(entry), entry.id, entry.target, str(store.root), entry.migration)
            if state is not None:  # otherwise somebody else may use by now what it has left
                treestore.leave(entry.fields.get("leaving", {}), Owner(state.id, state.created), entry.migration)
            if state is not None and (failure := clean_source(store, state, None)):
                raise failure
        return entry
