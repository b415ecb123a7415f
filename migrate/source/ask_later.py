"""The process that keeps asking a target after the user was told that a move is in doubt: start it, find it, stop it.

`start` locks the move's file in DIRECTORY and starts ask_later_process.py with that descriptor, in a session without a
terminal. The lock on the file says that the process lives. A move therefore has at most one, and none is believed to
live after a power cut. The process holds the container's lock only while it asks. The journal is its log.
"""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

from migrate import relaunch
from migrate.limits import ASKING_STOP_TIMEOUT
from migrate.model import check_migration_id
from migrate.paths import ASKING as DIRECTORY
from runtime.linux import processes

_STOP_STEP = 0.2


def start(root: str, migration: str) -> bool:
    """Start a process that asks about this move, unless there is one. Return False if it cannot be started."""
    try:
        taken = _take(migration)
        if taken < 0:
            return True
        try:
            process = subprocess.Popen(
                relaunch.module("migrate.source.ask_later_process", root, migration),
                cwd="/", start_new_session=True, pass_fds=[taken],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            os.write(taken, b"%d" % process.pid)
        finally:
            os.close(taken)  # the child has the lock from here on
    except OSError:
        return False
    return True


def asker(migration: str) -> int:
    """Return the pid of the process that asks about this move, 0 if there is none."""
    try:
        fd = os.open(file_of(migration), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
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
    """End the process that asks about this move, because a user decides it. Harmless when there is none."""
    pid = asker(migration)
    started = processes.start_time(pid) if pid else None
    pidfd = processes.open_process(pid, started)
    if pidfd is None:
        return
    deadline = time.monotonic() + ASKING_STOP_TIMEOUT
    try:
        while asker(migration) == pid and time.monotonic() < deadline:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)  # it ignores that while it starts and while it cleans up
            if processes.wait_exit(pidfd, _STOP_STEP):
                return
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def file_of(migration: str) -> Path:
    """Return the file that the process which asks about this move locks."""
    return DIRECTORY / check_migration_id(migration)


def _take(migration: str) -> int:
    """Lock the move's file and return its descriptor, or -1 if another process has locked it. Raises OSError."""
    DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(file_of(migration), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        return fd
    except BlockingIOError:
        os.close(fd)
        return -1
