"""Find threads that CRIU cannot freeze: they sleep in the kernel and do not react to a tracer (state D).

Most leave that state within a moment, such as one that reads from a disk. The parent of a vfork(2) stays in it until
its child executes a program or exits, and a thread stays in it while its network file system does not answer.
"""

from __future__ import annotations

import os
import time

from runtime.errors import ContainerError
from runtime.light.records import Record
from runtime.limits import UNFREEZABLE_PATIENCE
from runtime.linux import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.record import State

REMEDY = (
    "wait until it wakes up: after vfork a program sleeps until its child executes a program or exits (kill the "
    "child); a program that uses files sleeps until its disk or network file system answers"
)
LEAST = 0.2  # seconds; a thread that moves within them is not stuck
_INTERVAL = 0.02
# CRIU gives up if it has not seized all threads within this many seconds; the container stands still meanwhile.
_SEIZE, _THREADS_A_SECOND = 3, 500


class Stuck(Record):
    """A thread in state D. `pid` and `thread` are ids on this host; `inside` is the process's id in the container."""

    pid: int
    thread: int
    inside: int
    name: str
    place: str
    children: tuple[int, ...] = ()

    @property
    def subject(self) -> str:
        thread = f", thread {self.thread}" if self.thread != self.pid else ""
        return f"process {self.pid} ({self.name}; {self.inside} inside the container){thread}"

    @property
    def problem(self) -> str:
        children = f"; its child: process {self.children[0]}" if self.children else ""
        where = f" in {self.place}" if self.place else ""
        return f"sleeps{where} and cannot be frozen (state D){children}"


def find(init_pid: int, patience: float = 0.0) -> list[Stuck]:
    """Return the threads of a container that stay in state D for `patience` seconds, or LEAST if that is longer."""
    seen = _asleep(init_pid)
    deadline = time.monotonic() + max(patience, LEAST)
    while seen and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        now = {key: _switches(*key) for key in seen if _state(*key) == b"D"}
        seen = {key: switches for key, switches in now.items() if switches == seen[key]}
    return [_describe(pid, thread) for pid, thread in sorted(seen)]


def require_none(state: State) -> None:
    """Raise ContainerError if a thread of the container stays in state D for UNFREEZABLE_PATIENCE seconds."""
    for stuck in find(state.pid, UNFREEZABLE_PATIENCE):
        raise ContainerError(f"container {state.id}: {stuck.subject} {stuck.problem}", remedy=REMEDY)


def seize_timeout(init_pid: int) -> int:
    """Return the seconds after which CRIU gives up freezing, which grow with the number of threads."""
    return _SEIZE + sum(len(_threads(pid)) for pid in processes.container_pids(init_pid)) // _THREADS_A_SECOND


def _asleep(init_pid: int) -> dict[tuple[int, int], bytes]:
    """Return the threads that are in state D now: (process, thread) -> their context switch counters."""
    return {
        (pid, thread): _switches(pid, thread)
        for pid in processes.container_pids(init_pid)
        for thread in _threads(pid)
        if _state(pid, thread) == b"D"
    }


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _state(pid: int, thread: int) -> bytes:
    return _read(f"/proc/{pid}/task/{thread}/stat").rpartition(b") ")[2][:1]


def _switches(pid: int, thread: int) -> bytes:
    lines = _read(f"/proc/{pid}/task/{thread}/status").splitlines()
    return b" ".join(line for line in lines if b"ctxt_switches" in line)


def _describe(pid: int, thread: int) -> Stuck:
    status = dict(line.split(b":", 1) for line in _read(f"/proc/{pid}/status").splitlines() if b":" in line)
    return Stuck(
        pid,
        thread,
        int((status.get(b"NSpid", b"").split() or [b"0"])[-1]),
        status.get(b"Name", b"").strip().decode(errors="replace"),
        _read(f"/proc/{pid}/task/{thread}/wchan").strip(b"\0\n0").decode(errors="replace"),
        tuple(map(int, _read(f"/proc/{pid}/task/{thread}/children").split())),
    )


def _read(path: str) -> bytes:
    """Return the contents of a file in /proc, b"" if the process has exited."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 14)
    except OSError:
        return b""
    finally:
        os.close(fd)
