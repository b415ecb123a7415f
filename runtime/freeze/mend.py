"""Undoing a dump that was cut short: CRIU was killed in it, and perhaps whoever had asked for it.

CRIU undoes a dump by itself when it is refused or its socket closes, but not when it is killed, as by the kernel when
memory runs out. Its code in a process of the container ends by itself then, and all of them run; but it leaves

- its lock on the network (freeze/network_lock.py);
- connections in repair mode (TCP_REPAIR): reading from one fails, and what is written to it is not sent;
- names that it gave to open files without one (link_remap.N);
- memory of its own in one process, 200 KiB that do no harm.

dump.json in the container's directory says that a dump has begun: what there was before it. Who makes the dump calls
`mend` when it fails. When that one is killed as well the guard does (guard.py); when all three are killed, the next
verb that would dump it again, or `recover`, or `resume`.
"""

from __future__ import annotations

import os
import time

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.errors import ContainerError, unwritable
from runtime.freeze import network_lock
from runtime.light import json as light_json
from runtime.light import sockets
from runtime.limits import CRIU_CODE_TIMEOUT, CRIU_RELEASE_TIMEOUT
from runtime.linux import processes, syscalls
from runtime.state.store import DUMP

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from runtime.state.record import State

_TCP_REPAIR = 19
_STEP = 0.002
_DELETED = " (deleted)"


def note(state: State, *, paused: bool, others: Sequence[str] = (), lock: Sequence[str] | None = None) -> None:
    """A dump is about to begin; or it has made its `lock` (freeze/network_lock.py), where there are `others`.

    `paused`: the container was, and is to be again when that is undone. Raises ContainerError.
    """
    path = _note(state)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(light_json.dumps({"paused": paused, "others": list(others), "lock": lock and list(lock)}))
    except OSError as error:
        raise unwritable(path, error) from None


def forget(state: State) -> None:
    """There is nothing to undo, or not any more."""
    try:
        os.unlink(_note(state))
    except FileNotFoundError:
        pass


def is_left(state: State) -> bool:
    """Whether a dump was left unfinished, or goes on."""
    return os.path.exists(_note(state))


def repair_left(state: State) -> bool:
    """Undo a dump that was left unfinished, if there is any. The caller holds the container's lock. See `mend`."""
    if not is_left(state):
        return False
    mend(state)
    return True


def mend(state: State) -> None:
    """The container is to go on as before its dump, as far as CRIU has not seen to that; harmless when it has.

    Raises ContainerError naming what cannot be undone; the container runs then all the same.
    """
    note = _read(state)
    alive = processes.is_alive(state.pid, state.pid_start_time)
    pids = [pid for pid in processes.container_pids(state.pid) if alive and not processes.is_dying(pid)]
    problems: list[str] = []
    if pids:
        problems += _await(lambda: _traced(pids), CRIU_RELEASE_TIMEOUT)
        try:
            lock = note.get("lock")
            if lock is None:
                lock = set(network_lock.locks(state.pid)).difference(note.get("others", []))
            network_lock.unlock(state.pid, lock)
        except (OSError, Error) as error:
            problems.append(f"its network is still locked: {error}")
        problems += _end_repair(pids)
        for pid in pids:
            _remove_links(pid)
        problems += _caught(pids)
    if not note.get("paused"):
        cgroup = Cgroup.of(state)
        if cgroup.frozen:
            cgroup.thaw()
        if pids:
            problems += _await(lambda: _infected(pids), CRIU_CODE_TIMEOUT)
    forget(state)
    if problems:
        raise ContainerError(
            f"container {state.id}: not all that criu left of the dump could be undone: {'; '.join(problems)}",
            remedy="what is named here will not work; the program may have to be started anew",
        )


def _note(state: State) -> str:
    return f"{state.directory}/{DUMP}"


def _read(state: State) -> dict[str, Any]:
    try:
        with open(_note(state), "rb") as file:
            value = light_json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _await(look: Callable[[], Iterator[str]], timeout: float) -> list[str]:
    """Wait until there is nothing to be seen any more; what still is after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (found := list(look())) and time.monotonic() < deadline:
        time.sleep(_STEP)
    return found


def _traced(pids: list[int]) -> Iterator[str]:
    """Processes that a CRIU has not let go of yet. Debuggers are none of our business."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status", "rb") as file:
                tracer = int(file.read().partition(b"TracerPid:")[2].split(None, 1)[0])
            with open(f"/proc/{tracer}/comm", "rb") as file:
                name = file.read().strip()
        except (OSError, IndexError):
            continue  # it is not traced, or has ended
        if name == b"criu":
            yield f"process {pid} is held by process {tracer}"


def _caught(pids: list[int]) -> list[str]:
    """Threads that CRIU was killed in the middle of: it was to put their registers back, which nobody else knows.

    Only in the first thread of a process its code ends by itself.
    """
    return [
        f"thread {thread} of process {pid} was in CRIU's hands, and fails"
        for pid in pids
        for thread in _infected_threads(pid)
        if thread != pid
    ]


def _infected(pids: list[int]) -> Iterator[str]:
    """Processes in which CRIU's code runs."""
    for pid in pids:
        for thread in _infected_threads(pid):
            yield f"thread {thread} of process {pid} runs CRIU's code"


def _infected_threads(pid: int) -> Iterator[int]:
    try:
        places = _code(pid)
        for thread in os.listdir(f"/proc/{pid}/task") if places else ():
            with open(f"/proc/{pid}/task/{thread}/syscall") as file:
                at = file.read().split()[-1]
            if at != "running" and any(start <= int(at, 16) < stop for start, stop in places):
                yield int(thread)
    except OSError:
        return  # it has ended


def _code(pid: int) -> list[tuple[int, int]]:
    with open(f"/proc/{pid}/maps") as file:
        ranges = [line.split(None, 1)[0].split("-") for line in file if "/memfd:CRIUMFD" in line]
    return [(int(start, 16), int(stop, 16)) for start, stop in ranges]


def _end_repair(pids: list[int]) -> list[str]:
    """Take connections out of repair mode: their peers are asked to go on. Returns what went wrong.

    Repair mode takes SO_REUSEADDR away. A connection that was accepted had it from who listens at its port.
    """
    held: dict[int, socket.socket] = {}
    problems = []
    try:
        for pid in pids:
            _collect(pid, held)
        reuse = {}
        for sock in held.values():
            if sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_ACCEPTCONN):
                reuse[sock.getsockname()[1]] = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR)
        for sock in held.values():
            if sock.getsockopt(sockets.IPPROTO_TCP, _TCP_REPAIR):
                port = sock.getsockname()[1]
                try:
                    sock.setsockopt(sockets.IPPROTO_TCP, _TCP_REPAIR, 0)
                    sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, reuse.get(port, 0))
                except OSError as error:
                    problems.append(f"the connection at port {port} does not go on: {error.strerror}")
    finally:
        for sock in held.values():
            sock.close()
    return problems


def _collect(pid: int, held: dict[int, socket.socket]) -> None:
    """Duplicates of the TCP sockets of a process, by inode."""
    for number, target in _descriptors(pid):
        if not target.startswith("socket:["):
            continue
        inode = int(target[8:-1])
        if inode in held:
            continue
        try:
            duplicate = syscalls.duplicate(pid, number)
        except OSError:
            continue
        try:
            sock = sockets.socket(-1, -1, -1, duplicate)
        except OSError:
            os.close(duplicate)
            continue  # a kind that does not say what it is, such as AF_XDP
        if sock.proto == sockets.IPPROTO_TCP:
            held[inode] = sock
        else:
            sock.close()


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Numbers of a process's descriptors, and what they stand for."""
    try:
        numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return
    for number in numbers:
        try:
            yield number, os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue


def _remove_links(pid: int) -> None:
    """Remove the names that CRIU gave to files which the process has open, and which have lost the name it knows."""
    for number, target in _descriptors(pid):
        if not target.endswith(_DELETED) or not target.startswith("/"):
            continue
        try:
            file = os.stat(f"/proc/{pid}/fd/{number}")
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                place = syscalls.open_in_root(root, os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
            finally:
                os.close(root)
        except OSError:
            continue  # it has ended, or the directory is gone as well
        try:
            for name in os.listdir(place):
                if name.startswith("link_remap."):
                    there = os.stat(name, dir_fd=place, follow_symlinks=False)
                    if (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino):
                        os.unlink(name, dir_fd=place)
        except OSError:
            continue
        finally:
            os.close(place)
