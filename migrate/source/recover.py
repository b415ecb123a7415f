"""Finish a move that was interrupted after its point of no return: `pymigrate recover`. See phases.py."""

import enum
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from criu_rpc.errors import Error
from migrate.errors import InDoubt
from migrate.files import marks
from migrate.files.trees import Owner
from migrate.interrupts import uninterruptible
from migrate.journal.journal import Entry, Journal
from migrate.journal.undecided import is_tree, nothing_to_recover, undecided
from migrate.limits import CONTAINER_LOCK_TIMEOUT
from migrate.source import ask_later
from migrate.source.ending import end_source
from migrate.source.settle import call_off, clean_source, settle
from runtime import notices
from runtime.freeze import mend
from runtime.lifecycle import delete
from runtime.limits import MONITOR_EXIT_TIMEOUT
from runtime.linux import processes
from runtime.linux.processes import boot_id
from runtime.spec.config import Spec
from runtime.state import moved_mark
from runtime.state.kept_config import load_kept
from runtime.state.record import State
from runtime.state.store import Store


class Fate(enum.StrEnum):
    """What happened at the source to the tree that a move froze, in words."""

    RUNS = "still runs here"
    ENDED = "was resumed here and has exited"
    KILLED = "was killed here"


@dataclass(frozen=True)
class Left:
    """What is left at the source of the tree that a move froze.

    `state` is None if nothing of it is here. It is `proven` unless the journal is too old to say which tree it was. If
    the machine was `restarted` since, its pids and cgroups may belong to others by now.
    """

    state: State | None
    fate: Fate
    alive: bool
    proven: bool
    restarted: bool

    @classmethod
    def of(cls, entry: Entry, store: Store) -> Self:
        """Find out whether the decision to kill it, which is on the disk, was carried out.

        The process that kills it journals that at once. If that process dies between the two, the monitor has seen the
        container exit frozen (exit.json). If that process died before the kill, CRIU has thawed the container. If the
        machine was restarted since the decision, the container has died with it.
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
    """End the newest undecided move of this container out of this host. Return where the container is, in words.

    Without such a move, undo a dump that was cut short. Raises NothingToRecover; InDoubt when the target still cannot
    be asked; Lost.
    """
    if (entry := undecided(store, container_id)) is not None:
        ask_later.stop(entry.migration)
    with store.lock(container_id, CONTAINER_LOCK_TIMEOUT):
        entry = undecided(store, container_id)
        if entry is not None:
            with uninterruptible():
                return finish(store, entry)
        state = store.look(container_id) if container_id in store.ids() else None
        if state is not None and mend.repair_left(state):
            return f"{container_id}: runs at {socket.gethostname()}"
    raise nothing_to_recover(store, container_id)


def finish(store: Store, entry: Entry, *, patience: float | None = None) -> str:
    """End an undecided move. The caller holds the container's lock. Return where the container is, in words.

    As a rule the source has killed the container, and the target is told to run it. If it still runs here, what the
    target has is old, so the target undoes the move. Nothing is killed here except the tree that this move froze.

    Try for `patience` seconds. Raises InDoubt when the target cannot be asked; Lost.
    """
    log, left, source = Journal.resume(entry), Left.of(entry, store), socket.gethostname()
    if left.fate is not Fate.KILLED and call_off(log, left.fate, patience=patience):
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
    since = settle(log, patience=patience)
    with uninterruptible():
        _clean(store, entry, left)
    if since:
        return f"{entry.id}: was resumed at {entry.target} at {since}"
    return f"{entry.id}: runs at {entry.target}"


def stays(entry: Entry, left: Left, source: str) -> str:
    """Keep the container at this host, and resume it if a dump has left it frozen. Return where it is, in words."""
    if left.state is not None:
        moved_mark.erase(left.state.bundle)
        mend.repair_left(left.state)
    return f"{entry.id}: {'runs' if left.fate is Fate.RUNS else 'has exited'} at {source}"


def _clean(store: Store, entry: Entry, left: Left) -> None:
    """Remove what is left here of a container that runs at the target."""
    if left.state is None:  # another container may use by now what it has left
        return
    owner = Owner(left.state.id, left.state.created, store.root)
    marks.leave(entry.fields.get("leaving", {}), owner, entry.migration)
    if left.restarted:
        store.remove(entry.id)
    elif failure := clean_source(store, left.state, None):
        raise failure


def _ended_frozen(state: State) -> bool:
    """Return whether the monitor has seen the container exit while it was frozen."""
    delete.wait_monitor(state, MONITOR_EXIT_TIMEOUT)
    try:
        record = json.loads((Path(state.directory) / "exit.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("frozen") is True


def _end(state: State) -> None:
    """End the tree as far as the move has not done so."""
    end_source(state, _kept_spec(state), lambda: delete.end(state), notices.warn)


def _kept_spec(state: State) -> Spec | None:
    try:
        return load_kept(state)
    except Error:
        return None
