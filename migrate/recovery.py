"""Finishing a move that was interrupted after its point of no return: `pymigrate recover`."""

import contextlib
import json
import socket
from pathlib import Path

from migrate import treestore
from migrate.errors import MigrateError
from migrate.interrupts import uninterruptible
from migrate.journal import Entry, Journal, entries, require_whole
from migrate.phases import Phase
from migrate.settlement import call_off, clean_source, settle
from migrate.trees import Owner
from runtime import container, departed, netlock, processes, undump, veth
from runtime.errors import ContainerError
from runtime.spec import load_kept
from runtime.state import State, Store

LOCK_TIMEOUT = 5.0
_RUNS, _ENDED = "runs on here", "has gone on and ended here"


class NothingToRecover(MigrateError):
    kind = "not-found"


def recover(store: Store, container_id: str) -> str:
    """Bring the newest undecided move of this container out of this host to its end; returns where it is, in words.

    The decision to give the container up is on the disk (COMMITTED), and as a rule carried out: the target is told to
    run it. But a coordinator that was killed between the two has let it run on here. Then what the target has is old,
    and the target undoes the move: the container stays here, or has ended here since.

    Without such a move, a dump that was cut short is undone.

    Raises NothingToRecover, InDoubt when the target still cannot be asked.
    """
    with store.lock(container_id, LOCK_TIMEOUT):
        entry = undecided(store, container_id)
        state = store.look(container_id) if container_id in store.ids() else None
        mended = state is not None and undump.mend_left(state)
        if entry is None and mended:
            return f"{container_id}: runs at {socket.gethostname()}"
        if entry is None:
            raise NothingToRecover(
                f"no move of container {container_id} is in doubt here", remedy="see `pymigrate migrations`"
            )
        with uninterruptible():
            if state is not None and state.created != entry.fields.get("created", state.created):
                state = None  # another container, which has been given the name since
            log = Journal.resume(entry)
            where = _here(entry, state)
            if where and call_off(log, entry, where):
                if state is not None:
                    departed.erase(state.bundle)
            else:
                if state is not None:
                    _end(state)
                settle(log, entry.id, entry.target, str(store.root), entry.migration)
                if state is not None:  # otherwise somebody else may use by now what it has left
                    owner = Owner(state.id, state.created, store.root)
                    treestore.leave(entry.fields.get("leaving", {}), owner, entry.migration)
                    if failure := clean_source(store, state, None):
                        raise failure
        if log.phase is Phase.ABORTED and where == _ENDED:
            return f"{entry.id}: has ended at {entry.source}"
        return f"{entry.id}: runs at {entry.source if log.phase is Phase.ABORTED else entry.target}"


def _here(entry: Entry, state: State | None) -> str:
    """What has become of a container that ran on here after the decision; "" when it did not: the move has killed it.

    Who kills it says so in the journal at once; between the two its monitor sees it end frozen (attached.py). When the
    machine has been started anew since the decision, it may have ended with it.
    """
    if state is not None and processes.runs(state.pid, state.pid_start_time):
        return _RUNS
    if entry.fields.get("killed") or entry.fields.get("boot") != boot_id():
        return ""
    return "" if state is not None and _ended_frozen(state) else _ENDED


def _ended_frozen(state: State) -> bool:
    """Whether a monitor of ours has seen the container end while it was frozen."""
    container.wait_monitor(state, container.MONITOR_TIMEOUT)
    try:
        record = json.loads((Path(state.log_path).parent / "exit.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("frozen") is True


def boot_id() -> str:
    """What tells this start of the machine from others (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def undecided(store: Store, container_id: str) -> Entry | None:
    """The newest move of this container out of this host that has no end.

    Raises DamagedJournal when one may have none, and its journal does not tell.
    """
    require_whole(container_id)
    found = [
        entry
        for entry in entries()
        if (entry.id, entry.role, entry.fields.get("root", str(store.root)))
        == (container_id, "source", str(store.root))
        and entry.phase in (Phase.COMMITTED, Phase.IN_DOUBT)
    ]
    return found[-1] if found else None


def _end(state: State) -> None:
    with contextlib.suppress(OSError):
        departed.note(state)
    if state.has_bridge:
        veth.take_down(state)  # its peers are to hear of it at the target only
    container.end(state)
    with contextlib.suppress(ContainerError):
        netlock.ended(load_kept(state), state.id)
