"""How a move is brought to its end when the straight way is lost, and what is cleaned at either side afterwards."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from criu_rpc.errors import Error
from migrate.errors import InDoubt, Lost
from migrate.journal.journal import Entry, Journal
from migrate.phases import Phase
from migrate.source import ask_later
from migrate.wire import frames, protocol
from migrate.wire.peer import Peer, RemoteFailure, connect
from runtime.lifecycle import delete
from runtime.monitor import logs
from runtime.state.record import State
from runtime.state.store import Store

RECONNECT_TIMEOUT = 30.0
RETRY_AFTER = 1.0
SETTLE_TIMEOUT = 240.0  # the target may have to wait for another one that settles the move
ABORT_TIMEOUT = UNDO_TIMEOUT = 30.0
SHIM_TIMEOUT = 10.0
LOG_LIMIT = 2 << 20  # bytes of the container's log that go along
LOGS = Path("/var/lib/pymigrate/logs")


def settle(
    log: Journal, container_id: str, host: str, root: str, migration: str, *, patience: float | None = None
) -> str:
    """The source has ended the container: get the target to run it, over new connections until one works.

    Tries for `patience` seconds (RECONNECT_TIMEOUT). Journals RESUMED and returns since when the target has run it, ""
    when that is since this call. Journals LOST and raises Lost when the target cannot restore it; otherwise journals
    IN_DOUBT, raises InDoubt, and a process of its own goes on asking (source/ask_later.py).
    """
    try:
        answer = _ask(host, root, protocol.Settle(migration, "resume"), patience)
    except Error as failure:
        asked = ""
        if log.phase is not Phase.LOST:
            log.record(Phase.IN_DOUBT, reason=str(failure))
            asked = "a process here goes on asking for an hour\n" if ask_later.start(root, migration) else ""
        raise InDoubt(
            f"container {container_id} was ended here to go on at {host}, which has not confirmed that: {failure}",
            cause=failure,
            remedy=f"{asked}to ask now: pymigrate recover {container_id}\n"
            f"if {host} is gone for good: pymigrate recover --force-source {container_id}",
        ) from None
    if answer["workload"] == "NEITHER":
        reason = answer["reason"]
        log.record(Phase.LOST, reason=reason)
        raise Lost(
            f"container {container_id} is lost: it was ended here to go on at {host}, and cannot be restored there: "
            f"{reason}",
            remedy=f"to close the entry: pymigrate recover --forget {container_id}",
        )
    log.record(Phase.RESUMED)
    return str(answer["since"])


def call_off(log: Journal, entry: Entry, where: str, *, patience: float | None = None) -> bool:
    """Get the target to undo a move that was decided and not carried out. False if it runs there.

    `where` says what has become of the container here.

    Journals ABORTED. Raises InDoubt, with nothing changed here, when the target cannot be asked.
    """
    try:
        answer = _ask(entry.target, str(entry.fields["root"]), protocol.Settle(entry.migration, "abort"), patience)
    except Error as failure:
        raise InDoubt(
            f"container {entry.id} {where}, as `pymigrate move` was killed before it ended it, "
            f"and {entry.target} cannot be told: {failure}",
            cause=failure,
            remedy=f"when {entry.target} is back: pymigrate recover {entry.id}\n"
            f"if it is gone for good: pymigrate recover --force-source {entry.id}",
        ) from None
    if answer["workload"] != "SOURCE":
        return False
    log.record(Phase.ABORTED, reason="the coordinator was killed before it ended the container", cleaned=True)
    return True


def _ask(host: str, root: str, call: protocol.Settle, patience: float | None) -> dict[str, Any]:
    """Have a host end a move, over new connections until one works. Raises the last failure."""
    deadline = time.monotonic() + (RECONNECT_TIMEOUT if patience is None else patience)
    while True:
        try:
            with connect(host, root=root) as peer:
                return peer.call(call, SETTLE_TIMEOUT)
        except RemoteFailure:
            raise
        except Error:
            if time.monotonic() + RETRY_AFTER > deadline:
                raise
        time.sleep(RETRY_AFTER)


def known_there(entry: Entry) -> str:
    """Ask the target once, changing nothing, what it knows of a move.

    Returns its workload; "" when the target cannot be reached or does not know the move.
    """
    try:
        with connect(entry.target, root=str(entry.fields["root"])) as peer:
            return str(peer.call(protocol.Settle(entry.migration, "ask"))["workload"])
    except Error:
        return ""


def discard(entry: Entry) -> bool:
    """Have the target remove what it has of a move that was called off here. False if it cannot be told."""
    try:
        with connect(entry.target, root=str(entry.fields["root"])) as peer:
            peer.call(protocol.Discard([entry.migration]), SETTLE_TIMEOUT)
    except Error:
        return False
    Journal.resume(entry).record(Phase.ABORTED, cleaned=True)
    return True


def clean_target(peer: Peer, host: str, root: str, migration: str) -> bool:
    """Tell the target to undo the move, over a new connection if the old one is lost. False if it cannot be told."""
    try:
        peer.call(protocol.Abort(), ABORT_TIMEOUT)
        return True
    except Error:
        peer.close()
    try:
        with connect(host, root=root) as again:
            again.call(protocol.Settle(migration, "abort"), UNDO_TIMEOUT)
        return True
    except Error:
        return False


def clean_source(store: Store, state: State, peer: Peer | None) -> Exception | None:
    """Send the container's log after it and remove what is left of it here. Returns what went wrong, if anything."""
    try:
        delete.wait_monitor(state, SHIM_TIMEOUT)
        if peer is not None:
            with contextlib.suppress(Error):
                peer.call(protocol.History(_log_tail(state)))
        delete.remove(store, state)
    except Exception as error:
        return error
    return None


def _log_tail(state: State) -> str:
    """The last part of the container's log, from a line's beginning, what it had written elsewhere before included."""
    data = b""
    for path in logs.parts(state.log_path):
        with contextlib.suppress(FileNotFoundError):
            data += path.read_bytes()
    if len(data) > LOG_LIMIT:
        data = data[-LOG_LIMIT:].partition(b"\n")[2]
    text = data.decode(errors="replace")
    while len(protocol.dumps(text)) > frames.MAX_CALL - 1024:  # a byte may take six
        text = text[len(text) // 4 :].partition("\n")[2]
    return text


def save_log(log: bytes, migration: str) -> Path | None:
    """Keep CRIU's log of a move that failed; those of the newest ten are kept. None if there is nothing to keep."""
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
