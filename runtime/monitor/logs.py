"""Read a container's log (monitor/main.py shows its format)."""

import fcntl
import os
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import NotFound
from runtime.linux import processes
from runtime.state.record import State

_INTERVAL = 0.1  # seconds between two looks at a log that is followed


def parts(path: str | Path) -> list[Path]:
    """Return the existing files of a log, oldest first: from other hosts, the part rotated here, the current one."""
    return [part for part in map(Path, (f"{path}.1", f"{path}.0", str(path))) if part.exists()]


class Log:
    """An open log: `read` returns what it holds, once, and `follow` continues from there."""

    def __init__(self, state: State) -> None:
        """Open the log. Raises NotFound if the container has been deleted meanwhile."""
        self._state = state
        # The newest first: if it is rotated before the next one is opened, it is found twice, not missed.
        self._current = _open(state.log_path)
        self._older = [file for end in (".0", ".1") if (file := _open(state.log_path + end)) is not None]
        if self._current is not None:
            here = os.fstat(self._current.fileno())
            self._older = [file for file in self._older if not os.path.samestat(os.fstat(file.fileno()), here)]
        if not os.path.isdir(state.directory):
            raise NotFound.of(state.id)
        self._rest = b""

    def read(self) -> list[bytes]:
        """Return all entries, those from another host first."""
        entries = []
        for file in reversed(self._older):
            with file:
                entries += file.read().splitlines()
        return entries + self._more()

    def follow(self) -> Iterator[bytes]:
        """Yield the entries written from then on, until the container's monitor has exited."""
        monitor = processes.open_process(self._state.monitor_pid, self._state.monitor_start_time)
        try:
            ended = monitor is None
            while True:
                was_put_aside = self._current is None or _is_other(self._state.log_path, self._current.fileno())
                yield from self._more()
                if was_put_aside and (new := _open(self._state.log_path)) is not None:
                    self._current = new  # the rotated file has been read to its end
                elif ended or monitor is None:
                    return
                else:
                    ended = processes.wait_exit(monitor, _INTERVAL)
        finally:
            if monitor is not None:
                os.close(monitor)

    def _more(self) -> list[bytes]:
        if self._current is None:
            return []
        *entries, self._rest = (self._rest + self._current.read()).split(b"\n")
        return entries


def _open(path: str) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _is_other(path: str, fd: int) -> bool:
    """Return whether another file than the open one is at `path`; False in the moment when there is none."""
    try:
        return os.stat(path).st_ino != os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def wait_output_logged(state: State, timeout: float) -> None:
    """Wait until the monitor has logged all output of a frozen container, `timeout` seconds at most."""
    if not state.monitor_pid:
        return
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        waiting = sum(_unread(state.pid, number) for number in (1, 2))
        # A monitor that sleeps while the pipes are empty has logged everything that it has read.
        with open(f"/proc/{state.monitor_pid}/stat", "rb") as file:
            stat = file.read().rpartition(b")")[2].split()
        if waiting == 0 and stat[0] == b"S":
            return
        time.sleep(0.001)


def _unread(pid: int, number: int) -> int:
    """Return the bytes in the pipe behind a process's descriptor; 0 if it is not a pipe now."""
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("pipe:"):
            return 0
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(fd)
