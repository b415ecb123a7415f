"""The rsyncs at a target that bring a move's files: whether one may start, and how all of them are ended.

sshd starts each of them over a channel of its own, so they outlive the agent and the connection when they are stopped
or slow. All bear the migration's id in their environment, and each starts only while a file in DIRECTORY of that name
exists: it looks for the file when it can be found by its environment already. So none is missed by who removes the file
first and then ends all that he finds.
"""

import os
import signal
import time

from migrate.errors import DeadlineExceeded
from migrate.paths import RECEIVING as DIRECTORY
from runtime.linux import processes, trusted

VARIABLE = "PYMIGRATE_MIGRATION"
REFUSED = 125  # exit status: the file is not there
END_TIMEOUT = 10.0
_START = f'[ -e "$0" ] || exit {REFUSED}; [ -z "$1" ] || echo $$ > "$1" || exit 1; shift; exec "$@"'
_EXEC_TIMEOUT = 1.0  # for a process in the middle of execve(2), whose environment is not to be seen


def within(migration: str, cgroup: str = "") -> tuple[str, ...]:
    """A command that becomes the one that follows it, at the target and as a receiver of this move.

    `cgroup` is the directory of one there that it goes into. Exit status REFUSED when the move takes no files.
    """
    # A variable that a shell sets is not to be seen in /proc before the shell's exec; hence env.
    start = ("env", f"{VARIABLE}={migration}", "sh", "-c", _START, str(DIRECTORY / migration))
    return (*start, f"{cgroup}/cgroup.procs" if cgroup else "")


def allow(migration: str) -> None:
    """From here on receivers may start, and `end` is needed. Raises OSError."""
    for directory in (DIRECTORY.parent, DIRECTORY):
        os.close(trusted.make_directory(str(directory)))
    os.close(os.open(DIRECTORY / migration, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def forbid(migration: str) -> None:
    """From here on none starts. Harmless when it was forbidden before."""
    (DIRECTORY / migration).unlink(missing_ok=True)


def end(migration: str) -> None:
    """Let none start any more, and kill those that run; nothing is written by them when this returns.

    Raises DeadlineExceeded.
    """
    forbid(migration)
    deadline = time.monotonic() + END_TIMEOUT
    while found := _find(migration, _EXEC_TIMEOUT):
        for pid in found:
            _kill(pid, migration, deadline)


def activity(migration: str) -> int:
    """A number that changes as long as they do something."""
    return sum(map(processes.activity, _find(migration)))


def _kill(pid: int, migration: str, deadline: float) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _is_receiver(pid, migration):  # and no other process that has got this pid meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not processes.wait_exit(pidfd, max(0.0, deadline - time.monotonic())):
                raise DeadlineExceeded(f"rsync (process {pid}) does not end, and may write to what it was to bring")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _find(migration: str, patience: float = 0.0) -> list[int]:
    """Their pids. For those that are just being executed it waits, `patience` seconds at most."""
    found, pids = [], [int(name) for name in os.listdir("/proc") if name.isdigit()]
    until = time.monotonic() + patience
    while True:
        known = {pid: _is_receiver(pid, migration) for pid in pids}
        found += [pid for pid in pids if known[pid]]
        pids = [pid for pid in pids if known[pid] is None]
        if not pids or time.monotonic() >= until:
            return found
        time.sleep(0.001)


def _is_receiver(pid: int, migration: str) -> bool | None:
    """Whether it is one of root's processes and has the variable in its environment; None while it is executed."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_uid != 0:
                return False
            environment = file.readall()
    except OSError:
        return False
    if not environment and not processes.is_bare(pid):
        return None
    return f"{VARIABLE}={migration}".encode() in environment.split(b"\0")
