"""A process that goes on asking a target after the user has been told that a move is in doubt.

    start            lock the file of the move in DIRECTORY, and exec `main` with it, in a session without a terminal
    main             pause and ask once, until there is a verdict or LASTS is over

A lock on the file says that the process lives, so there is one for a move at most, and none is believed to live after a
power cut. It holds the container's lock only while it asks. The journal is its log.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

from criu_rpc.errors import Error
from migrate import relaunch
from migrate.errors import MigrateError
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.model import check_migration_id
from migrate.phases import OPEN, Phase
from runtime.linux import processes
from runtime.state.store import Store

DIRECTORY = Path("/run/pymigrate/asking")
LASTS = 3600.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 1.0, 60.0, 1.5
LOCK_TIMEOUT = 1.0
STOP_TIMEOUT = 10.0
_STOP_STEP = 0.2


def start(root: str, migration: str) -> bool:
    """Start a process that asks about this move, unless there is one. Returns False when it cannot be started."""
    try:
        taken = _take(migration)
        if taken < 0:
            return True
        try:
            process = subprocess.Popen(
                relaunch.module("migrate.source.ask_later", root, migration),
                cwd="/", start_new_session=True, pass_fds=[taken],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            os.write(taken, b"%d" % process.pid)
        finally:
            os.close(taken)  # the lock is the child's from here on
    except OSError:
        return False
    return True


def asker(migration: str) -> int:
    """Return the pid of the process that asks about this move; 0 when there is none."""
    try:
        fd = os.open(_file(migration), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return 0
    except BlockingIOError:
        pid = os.read(fd, 20)
        return int(pid) if pid.isdigit() else 0
    finally:
        os.close(fd)


def stop(migration: str) -> None:
    """End the process that asks about this move: somebody decides it by hand. Harmless when there is none."""
    pid = asker(migration)
    started = processes.start_time(pid) if pid else None
    pidfd = processes.open_process(pid, started)
    if pidfd is None:
        return
    deadline = time.monotonic() + STOP_TIMEOUT
    try:
        while asker(migration) == pid and time.monotonic() < deadline:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)  # it ignores that while it starts and while it cleans up
            if processes.wait_exit(pidfd, _STOP_STEP):
                return
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _file(migration: str) -> Path:
    return DIRECTORY / check_migration_id(migration)


def _take(migration: str) -> int:
    """Lock the move's file, and return its descriptor; -1 when another process has it. Raises OSError."""
    DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(_file(migration), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        return fd
    except BlockingIOError:
        os.close(fd)
        return -1


def _attempt(store: Store, migration: str) -> bool:
    """Ask once. True when there is nothing left to ask."""
    entry = journal.load(migration)
    if entry is None:
        return True
    with store.lock(entry.id, LOCK_TIMEOUT):
        entry = journal.load(migration) or entry
        if entry.phase is Phase.ABORTED:
            return _discarded(entry)
        if entry.phase not in OPEN or entry.phase is Phase.LOST:
            return True
        from migrate.source.recover import finish

        finish(store, entry, patience=0.0)
    return True


def _discarded(entry: Entry) -> bool:
    from migrate.source.settle import discard

    return entry.fields.get("cleaned") is not False or discard(entry)


def main(argv: list[str]) -> int:
    """Ask about one move: `argv` is the state directory and the migration."""
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
                reason = f"{entry.fields.get('reason')}; asked in vain for {LASTS:.0f} s, and stopped asking"
                Journal.resume(entry).record(Phase.IN_DOUBT, reason=reason)
        return 0
    finally:
        _file(migration).unlink(missing_ok=True)
