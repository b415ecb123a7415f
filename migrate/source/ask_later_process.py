"""What ask_later.py starts: ask a target about one move, with pauses, until there is a verdict or LASTS is over."""

import contextlib
import os
import signal
import time

from criu_rpc.errors import Error
from migrate.errors import MigrateError
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.limits import ASKING_LOCK_TIMEOUT
from migrate.phases import OPEN, Phase
from migrate.source.ask_later import file_of
from migrate.source.recover import finish
from migrate.source.settle import discard
from runtime.state.store import Store

LASTS = 3600.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 1.0, 60.0, 1.5


def main(argv: list[str]) -> int:
    """Ask about one move: `argv` is the state directory and the migration id."""
    root, migration = argv
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the process that has started this one may ignore it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    until, pause = time.monotonic() + LASTS, FIRST_PAUSE
    try:
        while time.monotonic() < until:
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * GROWTH)
            with contextlib.suppress(Error, OSError):
                if _attempt(Store(root), migration):
                    return 0
        with contextlib.suppress(MigrateError):
            entry = journal.load(migration)
            if entry is not None and entry.phase is Phase.IN_DOUBT:
                reason = f"{entry.fields.get('reason')}; asked for {LASTS:.0f} s without an answer, and stopped asking"
                Journal.resume(entry).record(Phase.IN_DOUBT, reason=reason)
        return 0
    finally:
        file_of(migration).unlink(missing_ok=True)


def _attempt(store: Store, migration: str) -> bool:
    """Ask once. Return True if there is nothing left to ask."""
    entry = journal.load(migration)
    if entry is None:
        return True
    with store.lock(entry.id, ASKING_LOCK_TIMEOUT):
        entry = journal.load(migration) or entry
        if entry.phase is Phase.ABORTED:
            return _discarded(entry)
        if entry.phase not in OPEN or entry.phase is Phase.LOST:
            return True
        finish(store, entry.with_root(store.root), patience=0.0)
    return True


def _discarded(entry: Entry) -> bool:
    return entry.fields.get("cleaned") is not False or discard(entry)
