"""Processes as /proc shows them."""

import os
import select
from pathlib import Path


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which process `pid` started (proc(5), stat field 22); None if there is none.

    Together with the pid it names a process for good, where the pid alone can be used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(stat.rpartition(b")")[2].split()[19])


def is_alive(pid: int, started: int | None) -> bool:
    """Whether the process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    fields = stat.rpartition(b")")[2].split()
    return int(fields[19]) == started and fields[0] not in (b"Z", b"X")


def children(pid: int, started: int | None) -> set[int]:
    """The children of a process's first thread; none when it is gone."""
    try:
        found = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()}
    except OSError:
        return set()
    return found if start_time(pid) == started else set()


def wait_exit(pidfd: int, timeout: float) -> bool:
    """Wait until the process behind `pidfd` has ended; False after `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def container_pids(init_pid: int) -> list[int]:
    """All processes in the pid namespace of `init_pid`, by their pids here; [] when it is gone."""
    try:
        namespace = os.stat(f"/proc/{init_pid}/ns/pid").st_ino
    except OSError:
        return []
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}/ns/pid").st_ino == namespace:
                    found.append(int(name))
            except OSError:
                continue
    return sorted(found)
