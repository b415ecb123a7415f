"""End a move whose connection was lost, and clean up at either side afterwards."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from criu_rpc.errors import Error
from migrate.errors import InDoubt, Lost
from migrate.journal.journal import Entry, Journal
from migrate.limits import ABORT_TIMEOUT, MONITOR_TIMEOUT, RECONNECT_TIMEOUT, SETTLE_TIMEOUT, UNDO_TIMEOUT
from migrate.paths import LOGS
from migrate.phases import Phase
from migrate.source import ask_later
from migrate.wire import frames, protocol, records, replies
from migrate.wire.peer import Peer, RemoteFailure, connect
from runtime.lifecycle import delete
from runtime.monitor import logs
from runtime.state.record import State
from runtime.state.store import Store

RETRY_AFTER = 1.0
LOG_LIMIT = 2 << 20  # bytes of the container's log that are sent along


def settle(log: Journal, *, patience: float | None = None) -> str:
    """Have the target run a container that was ended here, over new connections until one works.

    Try for `patience` seconds (RECONNECT_TIMEOUT). Journal RESUMED and return since when the target has run it, ""
    if that is since this call. Journal LOST and raise Lost if the target cannot restore it. Otherwise journal IN_DOUBT,
    start a process that asks again later (source/ask_later.py), and raise InDoubt.
    """
    container, host = log.entry.id, log.entry.target
    try:
        answer = _ask(log.entry, verdict="resume", patience=patience)
    except Error as failure:
        asked = ""
        if log.phase is not Phase.LOST:
            log.record(Phase.IN_DOUBT, reason=str(failure))
            started = ask_later.start(log.entry.root, log.entry.migration)
            asked = "a process here keeps asking for an hour\n" if started else ""
        raise InDoubt(
            f"container {container} was killed here to continue at {host}, which has not confirmed that: {failure}",
            cause=failure,
            remedy=f"{asked}to ask now: pymigrate recover {container}\n"
            f"if {host} is gone for good: pymigrate recover --force-source {container}",
        ) from None
    if answer.workload == "NEITHER":
        reason = answer.reason
        log.record(Phase.LOST, reason=reason)
        raise Lost(
            f"container {container} is lost: it was killed here to continue at {host}, and cannot be restored there: "
            f"{reason}",
            remedy=f"to close the entry: pymigrate recover --forget {container}",
        )
    log.record(Phase.RESUMED)
    return answer.since


def call_off(log: Journal, where: str, *, patience: float | None = None) -> bool:
    """Have the target undo a move that was decided and not carried out. Return False if the container runs there.

    `where` says what the container does here. Journal ABORTED. Raises InDoubt, with nothing changed here, when the
    target cannot be asked.
    """
    entry = log.entry
    try:
        answer = _ask(entry, verdict="abort", patience=patience)
    except Error as failure:
        raise InDoubt(
            f"container {entry.id} {where}, because `pymigrate move` was killed before it killed the container, "
            f"and {entry.target} cannot be told: {failure}",
            cause=failure,
            remedy=f"when {entry.target} is back: pymigrate recover {entry.id}\n"
            f"if it is gone for good: pymigrate recover --force-source {entry.id}",
        ) from None
    if answer.workload != "SOURCE":
        return False
    log.record(Phase.ABORTED, reason="`pymigrate move` was killed before it killed the container", cleaned=True)
    return True


def _ask(entry: Entry, *, verdict: protocol.Verdict, patience: float | None) -> replies.Settled:
    """Have the target end a move, over new connections until one works. Raises the last failure."""
    deadline = time.monotonic() + (RECONNECT_TIMEOUT if patience is None else patience)
    while True:
        try:
            with connect(entry.target, root=entry.root) as peer:
                return peer.call(protocol.Settle(entry.migration, verdict=verdict), SETTLE_TIMEOUT)
        except RemoteFailure:
            raise
        except Error:
            if time.monotonic() + RETRY_AFTER > deadline:
                raise
        time.sleep(RETRY_AFTER)


def known_there(entry: Entry) -> str:
    """Ask the target once what it knows about a move, without changing anything.

    Return its workload, or "" if the target cannot be reached or does not know the move.
    """
    try:
        with connect(entry.target, root=entry.root) as peer:
            return peer.call(protocol.Settle(entry.migration, verdict="ask")).workload
    except Error:
        return ""


def discard(entry: Entry) -> bool:
    """Have the target remove what it has of a move that was aborted here. Return False if it cannot be told."""
    try:
        with connect(entry.target, root=entry.root) as peer:
            peer.call(protocol.Discard([entry.migration]), SETTLE_TIMEOUT)
    except Error:
        return False
    Journal.resume(entry).record(Phase.ABORTED, cleaned=True)
    return True


def clean_target(peer: Peer, log: Journal) -> bool:
    """Have the target undo the move, over a new connection if the old one is lost. Return whether it was told."""
    try:
        peer.call(protocol.Abort(), ABORT_TIMEOUT)
        return True
    except Error:
        peer.close()
    try:
        with connect(log.entry.target, root=log.entry.root) as again:
            again.call(protocol.Settle(log.entry.migration, verdict="abort"), UNDO_TIMEOUT)
        return True
    except Error:
        return False


def clean_source(
    store: Store, state: State, peer: Peer | None, reap: Callable[[], None] = lambda: None
) -> Exception | None:
    """Send the container's log after it, and remove what is left of it here. Return what went wrong, if anything.

    `reap` waits for the end of its processes, if that was not done before. Its errors are returned.
    """
    try:
        reap()
        delete.wait_monitor(state, MONITOR_TIMEOUT)
        if peer is not None:
            with contextlib.suppress(Error):
                peer.call(protocol.History(_log_tail(state)))
        delete.remove(store, state)
    except Exception as error:
        return error
    return None


def _log_tail(state: State) -> str:
    """Return the end of the container's log from the beginning of a line, with what it wrote at earlier hosts."""
    data = b""
    for path in logs.parts(state.log_path):
        with contextlib.suppress(FileNotFoundError):
            data += path.read_bytes()
    if len(data) > LOG_LIMIT:
        data = data[-LOG_LIMIT:].partition(b"\n")[2]
    text = data.decode(errors="replace")
    while len(records.dumps(text)) > frames.MAX_CALL - 1024:  # a byte may take six
        text = text[len(text) // 4 :].partition("\n")[2]
    return text


def save_log(log: bytes, migration: str) -> Path | None:
    """Keep CRIU's log of a failed move, and the nine before it. Return its path, None if there is nothing to keep."""
    if not log:
        return None
    path = LOGS / f"{migration}.log"
    try:
        LOGS.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(log)
        for old in sorted(LOGS.iterdir())[:-10]:
            old.unlink()
    except OSError:
        return None
    return path
