"""End a container whose memory cannot be filled: no process of it may read a page that is wrong, or wait for ever."""

import contextlib
import os
import time
from pathlib import Path

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.lifecycle import delete
from runtime.state.record import State
from runtime.state.store import Store


def end(directory: Path) -> bool:
    """Kill all processes of the container with this directory; return whether none is left.

    A CRIU that still restores it is in its cgroup, and is killed too.
    """
    try:
        state = _state(directory)
        if state is None:
            return True
        cgroup = Cgroup.of(state)
        cgroup.kill()
        delete.end(state, cgroup)
        return not cgroup.pids()
    except (Error, OSError):
        return False


def tell(directory: Path, words: str) -> None:
    """Add a line to the container's log, as its monitor does (runtime/monitor/main.py)."""
    seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    with contextlib.suppress(OSError):  # it is in the note as well
        fd = os.open(directory / "log", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, f"{stamp}.{nanos:09d}Z stderr F [pymigrate: {words}]\n".encode())
        finally:
            os.close(fd)


def _state(directory: Path) -> State | None:
    store = Store(directory.parent)
    return store.look(directory.name) if directory.is_dir() else None
