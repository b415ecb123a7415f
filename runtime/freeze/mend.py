"""Repair a container whose dump was cut short, because CRIU was killed during it.

CRIU undoes a dump by itself when the dump is refused or its socket closes, but not when it is killed, for example by
the kernel because memory runs out. Its code in the container's processes then ends by itself and they all run, but
CRIU leaves behind:

- its lock on the network (freeze/network_lock.py);
- connections in repair mode (TCP_REPAIR): reading from one fails, and data written to it is not sent;
- names that it gave to open files without one (link_remap.N);
- 200 KiB of its own memory in one process, which do no harm.

dump.json in the container's directory says that a dump has begun, and what the state before it was. The dumping
process calls `repair` when the dump fails. If it is killed as well, the guard does it (guard.py). If all three are
killed, the next verb that would dump the container does it, or `recover`, or `resume`.
"""

from __future__ import annotations

import os
import time

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.errors import ContainerError, unwritable
from runtime.freeze import network_lock, throttle
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
    """Write dump.json: a dump is about to begin, or CRIU has made its `lock` (freeze/network_lock.py) beside `others`.

    `paused`: the container was paused before, and must be paused again after a repair. Raises ContainerError.
    """
    path = _note(state)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(light_json.dumps({"paused": paused, "others": list(others), "lock": lock and list(lock)}))
    except OSError as error:
        raise unwritable(path, error) from None


def forget(state: State) -> None:
    """Remove dump.json: there is nothing left to undo."""
    try:
        os.unlink(_note(state))
    except FileNotFoundError:
        pass


def is_left(state: State) -> bool:
    """Return whether a dump was left unfinished or is still running."""
    return os.path.exists(_note(state))


def repair_left(state: State) -> bool:
    """Undo an unfinished dump, if there is one; return whether there was. The caller holds the container's lock.

    Also give the container its own limit of processor time, if it was left throttled. Raises what `repair` raises.
    """
    throttle.restore_left(state)
    if not is_left(state):
        return False
    repair(state)
    return True


def repair(state: State) -> None:
    """Undo what CRIU has not undone itself, and resume the container unless it was paused before the dump.

    Harmless if CRIU has undone everything. Raises ContainerError naming what cannot be undone; the container runs all
    the same.
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
            f"container {state.id}: the interrupted dump could not be undone completely: {'; '.join(problems)}",
            remedy="what is named here does not work; if the program needs it, start the container again",
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
    """Call `look` until it finds nothing, for at most `timeout` seconds; return what it found last."""
    deadline = time.monotonic() + timeout
    while (found := list(look())) and time.monotonic() < deadline:
        time.sleep(_STEP)
    return found


def _traced(pids: list[int]) -> Iterator[str]:
    """Yield the processes that a CRIU still traces; other tracers, such as debuggers, do not matter."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status", "rb") as file:
                tracer = int(file.read().partition(b"TracerPid:")[2].split(None, 1)[0])
            with open(f"/proc/{tracer}/comm", "rb") as file:
                name = file.read().strip()
        except (OSError, IndexError):
            continue  # it is not traced, or has exited
        if name == b"criu":
            yield f"process {pid} is still traced by criu (process {tracer})"


def _caught(pids: list[int]) -> list[str]:
    """Return the threads that CRIU was about to give their registers back, which only CRIU knew: they crash.

    Only in the first thread of a process does CRIU's code end by itself.
    """
    return [
        f"thread {thread} of process {pid} was running CRIU's code, and crashes"
        for pid in pids
        for thread in _infected_threads(pid)
        if thread != pid
    ]


def _infected(pids: list[int]) -> Iterator[str]:
    """Yield the threads that run CRIU's code."""
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
        return  # it has exited


def _code(pid: int) -> list[tuple[int, int]]:
    with open(f"/proc/{pid}/maps") as file:
        ranges = [line.split(None, 1)[0].split("-") for line in file if "/memfd:CRIUMFD" in line]
    return [(int(start, 16), int(stop, 16)) for start, stop in ranges]


def _end_repair(pids: list[int]) -> list[str]:
    """Take connections out of repair mode, which sends their peers a window probe. Return what went wrong.

    Repair mode clears SO_REUSEADDR. An accepted connection had inherited it from the listening socket at its port.
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
                    problems.append(f"the connection at port {port} cannot leave repair mode: {error.strerror}")
    finally:
        for sock in held.values():
            sock.close()
    return problems


def _collect(pid: int, held: dict[int, socket.socket]) -> None:
    """Add duplicates of a process's TCP sockets to `held`, by inode."""
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
            continue  # a kind that does not tell its family, such as AF_XDP
        if sock.proto == sockets.IPPROTO_TCP:
            held[inode] = sock
        else:
            sock.close()


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the number and the link target of each descriptor of a process."""
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
    """Remove the names that CRIU gave to deleted files which the process has open."""
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
            continue  # the process has exited, or the directory is gone as well
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
