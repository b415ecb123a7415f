"""Reading a container's log (its format is drawn in shim.py)."""

import os
from collections.abc import Iterator
from pathlib import Path

from runtime import processes
from runtime.state import State

_INTERVAL = 0.1  # seconds between two looks at a log that is followed


def read(path: Path) -> list[bytes]:
    """All entries: those that came from another host first."""
    entries: list[bytes] = []
    for part in (path.with_name(path.name + ".1"), path):
        if part.exists():
            entries += part.read_bytes().splitlines()
    return entries


def follow(state: State) -> Iterator[bytes]:
    """Entries written from now on, until the container's monitor has ended."""
    with open(state.log_path, "rb") as file:
        file.seek(0, os.SEEK_END)
        try:
            pidfd = os.pidfd_open(state.shim_pid)
        except OSError:
            return
        rest, ended = b"", False
        try:
            while True:
                *entries, rest = (rest + file.read()).split(b"\n")
                yield from entries
                if ended:
                    return
                ended = processes.wait_exit(pidfd, _INTERVAL)
        finally:
            os.close(pidfd)
