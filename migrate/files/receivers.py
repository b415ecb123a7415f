"""Allow, find and kill the rsyncs at a target that receive a move's files.

sshd starts each of them on its own channel, so they outlive the agent and the connection if they are stopped or slow.
All have the migration's id in their environment, and each starts only while a file of that name exists in DIRECTORY. A
receiver checks for the file when it can already be found by its environment. Removing the file first and then killing
every match therefore cannot miss one.
"""

import os
import signal
import time

from migrate.errors import DeadlineExceeded
from migrate.limits import EXEC_TIMEOUT, RECEIVER_EXIT_TIMEOUT
from migrate.paths import RECEIVING as DIRECTORY
from runtime.linux import processes, trusted

VARIABLE = "PYMIGRATE_MIGRATION"
REFUSED = 125  # exit status: the file does not exist
_START = f'[ -e "$0" ] || exit {REFUSED}; [ -z "$1" ] || echo $$ > "$1" || exit 1; shift; exec "$@"'


def within(migration: str, cgroup: str = "") -> tuple[str, ...]:
    """Return the prefix that makes a command a receiver of this move at the target.

    `cgroup`: directory of a cgroup there to join. The exit status is REFUSED if the move accepts no files.
    """
    # /proc does not show a variable that a shell has set before the shell's exec; hence env.
    start = ("env", f"{VARIABLE}={migration}", "sh", "-c", _START, str(DIRECTORY / migration))
    return (*start, f"{cgroup}/cgroup.procs" if cgroup else "")


def allow(migration: str) -> None:
    """Allow receivers to start; `end` is needed afterwards. Raises OSError."""
    for directory in (DIRECTORY.parent, DIRECTORY):
        os.close(trusted.make_directory(str(directory)))
    os.close(os.open(DIRECTORY / migration, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def forbid(migration: str) -> None:
    """Prevent receivers from starting. Harmless if it was done before."""
    (DIRECTORY / migration).unlink(missing_ok=True)


def end(migration: str) -> None:
    """Prevent receivers from starting, and kill those that run; none of them writes after this returns.

    Raises DeadlineExceeded.
    """
    forbid(migration)
    deadline = time.monotonic() + RECEIVER_EXIT_TIMEOUT
    while found := _find(migration, EXEC_TIMEOUT):
        for pid in found:
            _kill(pid, migration, deadline)


def activity(migration: str) -> int:
    """Return a number that changes while a receiver works."""
    return sum(map(processes.activity, _find(migration)))


def _kill(pid: int, migration: str, deadline: float) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _is_receiver(pid, migration):  # not another process that has got this pid meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not processes.wait_exit(pidfd, max(0.0, deadline - time.monotonic())):
                raise DeadlineExceeded(f"rsync (process {pid}) did not exit after SIGKILL and may still write files")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _find(migration: str, patience: float = 0.0) -> list[int]:
    """Return the receivers' pids; wait, `patience` seconds at most, for processes that are in execve(2)."""
    found, pids = [], [int(name) for name in os.listdir("/proc") if name.isdigit()]
    until = time.monotonic() + patience
    while True:
        known = {pid: _is_receiver(pid, migration) for pid in pids}
        found += [pid for pid in pids if known[pid]]
        pids = [pid for pid in pids if known[pid] is None]
        if not pids or time.monotonic() >= until:
            return found
        time.sleep(0.001)


def _is_outside(pid: int) -> bool:
    """Return whether a process is in no container: one whose memory is not in place yet shows no environment either."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/self/ns/mnt"))
    except OSError:
        return False  # it has exited


def _is_receiver(pid: int, migration: str) -> bool | None:
    """Return whether a process is root's and has the variable in its environment; None while it is in execve(2)."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_uid != 0:
                return False
            environment = file.readall()
    except OSError:
        return False
    if not environment and not processes.is_bare(pid) and _is_outside(pid):
        return None
    return f"{VARIABLE}={migration}".encode() in environment.split(b"\0")
