"""The note of a container whose memory is not all in place: the page handler (migrate/memory/handler.py) fills it.

The handler's processes hold the note's lock while they live, and remove the note when all memory is in place. A note
without a lock means that all of them were killed: what was missing then reads as zeros, so the container is damaged.
A second line says why they have killed the container: its memory cannot be read.
"""

from __future__ import annotations

import fcntl
import os

from runtime.errors import Conflict
from runtime.light.records import Record
from runtime.limits import MEMORY_PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.state.record import State

NOTE = "memory-left"  # in the container's directory
_LONGEST = 4096  # bytes of the second line
_PERIOD = 0.02


class Left(Record):
    """Bytes of memory that are not in place, of how many; `group` is the process group of the page handler.

    `failure`: why the page handler has killed the container, "" if it has not.
    """

    left: int
    total: int
    group: int
    is_damaged: bool
    failure: str = ""

    def __str__(self) -> str:
        return words(self.plain())

    @property
    def problem(self) -> str:
        """Why the container cannot be dumped."""
        if self.failure:
            return f"its memory is lost: {self.failure}"
        if self.is_damaged:
            return "its memory is damaged, because its page handler was killed"
        return f"{-(-self.left >> 20)} MiB of its memory are not in place yet"

    @property
    def remedy(self) -> str:
        """What to do about that."""
        if self.is_damaged:
            return "delete the container, and start it again or restore a snapshot"
        return "try again when `pymigrate list` shows no memory left"

    def plain(self) -> dict[str, Any]:
        """Return what JSON shows of it."""
        shown = {"left": self.left, "total": self.total, "damaged": self.is_damaged}
        return shown | ({"failure": self.failure} if self.failure else {})


def words(plain: dict[str, Any]) -> str:
    """Return what tables say, of what JSON shows (Left.plain)."""
    return "memory: damaged" if plain["damaged"] else f"memory: {-(-plain['left'] >> 20)} MiB left"


def describe(left: int, total: int, group: int) -> bytes:
    """Return the contents of a note; they always have the same size."""
    return b"%20d %20d %10d\n" % (left, total, group)


def describe_failure(why: str) -> tuple[bytes, int]:
    """Return the second line of a note, and its place."""
    return why.encode()[:_LONGEST] + b"\n", len(describe(0, 0, 0))


def note(state: State) -> str:
    """Return the path of a container's note."""
    return os.path.join(state.directory, NOTE)


def left(state: State) -> Left | None:
    """Return what is missing of a container's memory; None if nothing is."""
    return read(note(state)) if state.pid else None


def read(path: str) -> Left | None:
    """Return what a note says; None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        is_damaged = not is_locked(fd)
        if is_damaged and not os.fstat(fd).st_nlink:  # it was removed meanwhile, because all is in place
            return None
        line, _, rest = os.read(fd, 2 * _LONGEST).partition(b"\n")
        fields = line.split()
        numbers = [int(field) for field in fields] if len(fields) == 3 else [0, 0, 0]
        failure = rest.partition(b"\n")[0].decode(errors="replace")
        return Left(
            left=numbers[0], total=numbers[1], group=numbers[2], is_damaged=is_damaged or bool(failure), failure=failure
        )  # fmt: skip
    except ValueError:
        return Left(left=0, total=0, group=0, is_damaged=is_damaged)
    finally:
        os.close(fd)


def is_locked(note: int) -> bool:
    """Return whether a process of the page handler holds the lock of a note, which this process has opened itself."""
    try:
        fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(note, fcntl.LOCK_UN)
    return False


def await_whole(state: State, patience: float) -> Left | None:
    """Wait up to `patience` seconds for the rest of the memory; return what is missing then, None if nothing is."""
    import select
    import time

    deadline = time.monotonic() + patience
    while (found := left(state)) is not None and not found.is_damaged and time.monotonic() < deadline:
        select.select([], [], [], _PERIOD)
    return found


def require_whole(state: State, verb: str) -> None:
    """Wait a while for the rest of the memory. Raises Conflict if it is not in place by then."""
    found = await_whole(state, MEMORY_PATIENCE)
    if found is not None:
        raise Conflict(f"cannot {verb} container {state.id}: {found.problem}", remedy=found.remedy)


def shown(state: State) -> dict[str, Any]:
    """Return what to add to the OCI state of a container: "memory", while some is missing."""
    found = left(state)
    return {} if found is None else {"memory": found.plain()}
