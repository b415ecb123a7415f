"""Reading a container's log (its format is drawn in shim.py)."""

import os
from collections.abc import Iterator
from pathlib import Path

from runtime import processes
from runtime.state import State

_INTERVAL = 0.1  # seconds between two looks at a log that is followed


def parts(path: str | Path) -> list[Path]:
    """The files of a log that are there, oldest first: from other hosts, the part that was put aside here, and now."""
    return [part for part in map(Path, (f"{path}.1", f"{path}.0", str(path))) if part.exists()]


def read(path: str | Path) -> list[bytes]:
    """All entries: those that came from another host first."""
    return [entry for part in parts(path) for entry in part.read_bytes().splitlines()]


def follow(state: State) -> Iterator[bytes]:
    """Entries written from now on, until the container's monitor has ended."""
    try:
        pidfd = os.pidfd_open(state.shim_pid)
    except OSError:
        return
    file = open(state.log_path, "rb")
    try:
        file.seek(0, os.SEEK_END)
        rest, ended = b"", False
        while True:
            was_put_aside = _is_other(state.log_path, file.fileno())
            *entries, rest = (rest + file.read()).split(b"\n")
            yield from entries
            if was_put_aside:  # what came before that has been read to its end
                file.close()
                file = open(state.log_path, "rb")
            elif ended:
                return
            else:
                ended = processes.wait_exit(pidfd, _INTERVAL)
    finally:
        file.close()
        os.close(pidfd)


def _is_other(path: str, fd: int) -> bool:
    """Whether the file at `path` is not the open one; the moment in which there is none has not come yet."""
    try:
        return os.stat(path).st_ino != os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
