"""Finishing a move that was interrupted after its point of no return: `pymigrate recover`."""

import contextlib
import enum
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from criu_rpc.errors import Error
from migrate.errors import InDoubt, MigrateError
from migrate.files import marks
from migrate.files.trees import Owner
from migrate.interrupts import uninterruptible
from migrate.journal.journal import Entry, Journal
from migrate.journal.undecided import is_tree, undecided, undecided_here
from migrate.source import ask_later
from migrate.source.settle import call_off, clean_source, settle
from runtime.freeze import mend, network_lock
from runtime.lifecycle import delete
from runtime.linux import processes
from runtime.linux.processes import boot_id
from runtime.network import veth
from runtime.state import moved_mark
from runtime.state.kept_config import load_kept
from runtime.state.record import State
from runtime.state.store import Store

LOCK_TIMEOUT = 5.0


class NothingToRecover(MigrateError):
    kind = "not-found"


class Fate(enum.StrEnum):
    """What has become at the source of the tree that a move has frozen, in words."""

    RUNS = "runs on here"
    ENDED = "has gone on and ended here"
    KILLED = "was ended here"


@dataclass(frozen=True)
class Left:
    """What is at the source of the tree that a move has frozen.

    `state` is None when nothing of it is here. It is `proven` unless the journal is too old to say which tree it was.
    When the machine was `restarted` since, pids and cgroups in it may be anybody's by now.
    """

    state: State | None
    fate: Fate
    alive: bool
    proven: bool
    restarted: bool

    @classmethod
    def of(cls, entry: Entry, store: Store) -> Self:
        """The decision to end it is on the disk, and as a rule carried out.

        Who ends it says so in the journal at once; between the two its monitor sees it end frozen (clients.py). A
        coordinator that was killed between the decision and that has let it run on. When the machine has been started
        anew since the decision, it may have ended with it.
        """
        state = store.look(entry.id) if entry.id in store.ids() else None
        same = is_tree(entry, state) if state is not None else False
        if same is False:
            state = None
        restarted = entry.fields.get("boot") != boot_id()
        alive = state is not None and not restarted and processes.is_alive(state.pid, state.pid_start_time)
        proven = same is not None
        if alive and state is not None and processes.runs(state.pid, state.pid_start_time):
            fate = Fate.RUNS
        elif entry.fields.get("killed") or restarted or (state is not None and _ended_frozen(state)):
            fate = Fate.KILLED
        else:
            fate = Fate.ENDED
        return cls(state, fate, alive, proven, restarted)


def recover(store: Store, container_id: str) -> str:
    """Bring the newest undecided move of this container out of this host to its end; returns where it is, in words.

    Without such a move, a dump that was cut short is undone.

    Raises NothingToRecover, InDoubt when the target still cannot be asked, Lost.
    """
    if (entry := undecided(store, container_id)) is not None:
        ask_later.stop(entry.migration)
    with store.lock(container_id, LOCK_TIMEOUT):
        entry = undecided(store, container_id)
        if entry is not None:
            with uninterruptible():
                return finish(store, entry)
        state = store.look(container_id) if container_id in store.ids() else None
        if state is not None and mend.repair_left(state):
            return f"{container_id}: runs at {socket.gethostname()}"
    raise nothing_to_recover(store, container_id)


def nothing_to_recover(store: Store, container_id: str) -> NothingToRecover:
    """Return the error for a container none of whose moves out of this host is undecided."""
    words, remedy = f"no move of container {container_id} is in doubt here", "see `pymigrate migrations`"
    if (entry := undecided_here(store, container_id)) is not None:
        words += f", but one into this host, which {entry.source} decides"
        remedy = f"at {entry.source}: pymigrate recover {container_id}\n"
        remedy += f"if {entry.source} is gone for good: pymigrate recover --force-target {container_id}"
    return NothingToRecover(words, remedy=remedy)


def finish(store: Store, entry: Entry, *, patience: float | None = None) -> str:
    """Bring an undecided move to its end, the container's lock being held; returns where the container is, in words.

    As a rule the source has ended it, and the target is told to run it. Where it has run on here, what the target has
    is old: the target undoes the move. Nothing is ended here but the tree that this move has frozen.

    Tries for `patience` seconds. Raises InDoubt when the target cannot be asked, Lost.
    """
    log, left, source = Journal.resume(entry), Left.of(entry, store), socket.gethostname()
    if left.fate is not Fate.KILLED and call_off(log, entry, left.fate, patience=patience):
        return stays(entry, left, source)
    if left.fate is Fate.RUNS:
        raise InDoubt(
            f"container {entry.id} {left.fate}, and {entry.target} says that it was resumed there, "
            "as after `recover --force-target`",
            remedy="choose one of them, and `pymigrate delete --force` the other\n"
            f"to close the entry: pymigrate recover --forget {entry.id}",
        )
    if left.state is not None and not left.restarted and (left.proven or not left.alive):
        _end(left.state)
    since = settle(log, entry.id, entry.target, str(store.root), entry.migration, patience=patience)
    with uninterruptible():
        _clean(store, entry, left)
    if since:
        return f"{entry.id}: was resumed at {entry.target} at {since}"
    return f"{entry.id}: runs at {entry.target}"


def stays(entry: Entry, left: Left, source: str) -> str:
    """The container belongs to this host: it goes on if a dump has left it frozen. Returns where it is, in words."""
    if left.state is not None:
        moved_mark.erase(left.state.bundle)
        mend.repair_left(left.state)
    return f"{entry.id}: {'runs' if left.fate is Fate.RUNS else 'has ended'} at {source}"


def _clean(store: Store, entry: Entry, left: Left) -> None:
    """Remove what is left here of a container that has gone on at the target."""
    if left.state is None:  # somebody else may use by now what it has left
        return
    owner = Owner(left.state.id, left.state.created, store.root)
    marks.leave(entry.fields.get("leaving", {}), owner, entry.migration)
    if left.restarted:
        store.remove(entry.id)
    elif failure := clean_source(store, left.state, None):
        raise failure


def _ended_frozen(state: State) -> bool:
    """Whether a monitor of ours has seen the container end while it was frozen."""
    delete.wait_monitor(state, delete.MONITOR_TIMEOUT)
    try:
        record = json.loads((Path(state.directory) / "exit.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("frozen") is True


def _end(state: State) -> None:
    """End the tree and what was locked for it, as far as the coordinator has not done so."""
    with contextlib.suppress(OSError):
        moved_mark.note(state)
    if state.has_bridge:
        veth.take_down(state)  # its peers are to hear of it at the target only
    delete.end(state)
    with contextlib.suppress(Error):
        network_lock.ended(load_kept(state), state.id)
