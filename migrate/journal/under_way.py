"""The moves out of this host that are under way, as other processes see them: find one, watch it, cancel it.

/run/pymigrate/moving/<migration id>        which move it is, and the process that makes it
/run/pymigrate/moving/<migration id>.json   its progress: the last event of each kind

The process locks the first file for as long as the move lasts, so a file without a lock is what a killed process has
left. A request to cancel is a line more in that file, with a signal that interrupts the process. The file names the
move, so a request cannot hit the next move of the same process. `require_wanted` looks for the line once more before
the point of no return, because a signal can be lost.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from migrate.errors import Cancelled, MigrateError, ProtocolError
from migrate.events import Event, Monitor, PhaseStarted, Progress
from migrate.interrupts import CANCEL, SIGNALS
from migrate.model import check_migration_id
from migrate.paths import MOVING
from runtime.linux import files, processes, syscalls

_INTERVAL = 0.25  # seconds between two reports of progress
_REQUEST = b"cancel\n"
_LARGEST = 64 << 10  # bytes of a file that are read


class UnderWay:
    """One move of this process. It is a context manager, and the monitor that the move reports to.

    `monitor` gets every event. Raises MigrateError on entering if the file cannot be written.
    """

    _current: "UnderWay | None" = None

    def __init__(self, monitor: Monitor, migration: str, *, id: str, root: str, target: str) -> None:
        self._monitor = monitor
        self._path = MOVING / check_migration_id(migration)
        self._progress = MOVING / f"{migration}.json"
        self._fields = {"id": id, "root": root, "target": target}
        self._fd, self._size = -1, 0
        self._handlers: dict[int, Any] = {}
        self._shown: dict[str, dict[str, Any]] = {}
        self._written = 0.0

    def __enter__(self) -> Self:
        pid = os.getpid()
        line = json.dumps({**self._fields, "pid": pid, "started": processes.start_time(pid)}).encode() + b"\n"
        try:
            MOVING.mkdir(mode=0o700, parents=True, exist_ok=True)
            _prune()
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            UnderWay._current = self
            signal.signal(CANCEL, _cancelled)  # stays: a late request must not end the process
            self._size = len(line)
            os.write(self._fd, line)
        except OSError as error:
            self._end()
            raise MigrateError(f"{self._path}: cannot be written: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _end(self) -> None:
        UnderWay._current = None
        for path in (self._progress, self._path):
            path.unlink(missing_ok=True)
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # a process forked meanwhile may still have the descriptor
            os.close(self._fd)
            self._fd = -1

    def require_wanted(self) -> None:
        """Raise Cancelled if the move is to be cancelled."""
        if self._fd >= 0 and os.fstat(self._fd).st_size > self._size:
            raise Cancelled("cancelled by `pymigrate cancel`")

    def emit(self, event: Event) -> None:
        """Pass an event on, and publish it."""
        self._monitor.emit(event)
        if isinstance(event, PhaseStarted):
            self._shown.pop(Progress.event, None)
        self._shown[event.event] = dataclasses.asdict(event)
        now = time.monotonic()
        if self._fd >= 0 and (not isinstance(event, Progress) or now - self._written >= _INTERVAL):
            self._written = now
            with contextlib.suppress(OSError):  # the move is worth more than a look at it
                files.replace(str(self._progress), json.dumps(self._shown).encode())

    def close(self) -> None:
        self._monitor.close()

    def _cancel(self) -> None:
        """Interrupt the move if that was asked for, and nothing else has. The clean-up is then not interrupted."""
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # SIGINT is ignored in a shell's background, too
            try:
                self.require_wanted()
            except Cancelled:
                self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
                raise


def _cancelled(_signum: int, _frame: FrameType | None) -> None:
    if UnderWay._current is not None:
        UnderWay._current._cancel()


@dataclass(frozen=True)
class Mover:
    """A move out of this host that is under way, and the process that makes it."""

    migration: str
    id: str
    root: str
    target: str
    pid: int
    started: int

    def cancel(self) -> None:
        """Ask the process to cancel this move, and no other. Harmless if the move has ended."""
        with _locked(self.migration) as fd:
            if fd < 0:
                return
            os.write(fd, _REQUEST)
            pidfd = processes.open_process(self.pid, self.started)
            if pidfd is not None:
                try:
                    signal.pidfd_send_signal(pidfd, CANCEL)
                except ProcessLookupError:
                    pass  # it has just exited
                finally:
                    os.close(pidfd)

    def progress(self) -> dict[str, dict[str, Any]]:
        """Return the fields of the last event of each kind, by kind; {} if there is none."""
        try:
            with open(MOVING / f"{self.migration}.json", "rb") as file:
                shown = json.loads(file.read(_LARGEST))
        except (OSError, ValueError):
            return {}
        return shown if isinstance(shown, dict) else {}

    def is_under_way(self) -> bool:
        return is_under_way(self.migration)


class Watch:
    """Waits until something has happened to the moves of this host. A context manager: leaving it ends the watch."""

    def __init__(self) -> None:
        self._pidfds: dict[tuple[int, int], int] = {}
        self._poll = select.poll()
        try:
            self._changes = syscalls.inotify(MOVING, syscalls.IN_MOVED_TO | syscalls.IN_DELETE)
        except OSError as error:
            raise MigrateError(f"{MOVING}: cannot be watched: {error.strerror}") from None
        self._poll.register(self._changes, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._changes, *self._pidfds.values()):
            os.close(fd)

    def add(self, mover: Mover) -> None:
        """Notice when the process of this move exits."""
        process = mover.pid, mover.started
        if process not in self._pidfds and (pidfd := processes.open_process(*process)) is not None:
            self._pidfds[process] = pidfd
            self._poll.register(pidfd, select.POLLIN)

    @property
    def has_processes(self) -> bool:
        """Whether a process that was added has not exited."""
        return bool(self._pidfds)

    def wait(self, timeout: float) -> None:
        """Wait until a move shows progress or ends, or a process exits, at most `timeout` seconds."""
        ready = {fd for fd, _ in self._poll.poll(timeout * 1000)}
        if self._changes in ready:
            os.read(self._changes, 1 << 16)
        for process, pidfd in list(self._pidfds.items()):
            if pidfd in ready:
                self._poll.unregister(pidfd)
                os.close(self._pidfds.pop(process))

    def wait_end(self, mover: Mover, timeout: float) -> bool:
        """Wait until a move has ended, at most `timeout` seconds. Return whether it has."""
        self.add(mover)
        deadline = time.monotonic() + timeout
        while mover.is_under_way():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self.wait(left)
        return True


def movers(root: str, container_id: str | None = None) -> list[Mover]:
    """Return the moves that are under way out of the store at `root`, of one container or of all, oldest first."""
    found = []
    for name in _names():
        mover = _read(name)
        if mover is not None and mover.root == root and container_id in (None, mover.id) and mover.is_under_way():
            found.append(mover)
    return found


def _names() -> list[str]:
    """Return the migration ids in MOVING, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(MOVING) if _is_migration(name))
    return []


def _is_migration(name: str) -> bool:
    try:
        check_migration_id(name)
    except ProtocolError:
        return False
    return True


def _read(migration: str) -> Mover | None:
    try:
        with open(MOVING / migration, "rb") as file:
            fields = json.loads(file.readline(_LARGEST))
        return Mover(migration, **fields)
    except (OSError, ValueError, TypeError):
        return None  # it has ended, or has just begun


def is_under_way(migration: str) -> bool:
    """Return whether a process of this host makes this move out of it."""
    with _locked(migration) as fd:
        return fd >= 0


@contextlib.contextmanager
def _locked(migration: str) -> Iterator[int]:
    """Yield a descriptor of a move's file, to append to it; -1 if the move has ended."""
    try:
        fd = os.open(MOVING / migration, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield -1
        return
    try:
        yield fd if _is_locked(fd) else -1
    finally:
        os.close(fd)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _prune() -> None:
    """Remove what killed processes have left."""
    for name in _names():
        mover = _read(name)
        if mover is not None and not mover.is_under_way() and not processes.is_alive(mover.pid, mover.started):
            for left in (f"{name}.json", name):
                (MOVING / left).unlink(missing_ok=True)
