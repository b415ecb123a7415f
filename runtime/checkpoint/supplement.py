"""An image of pymigrate's: properties that CRIU's images lack and that the kernel lets others set.

    supplement.img      JSON: {"threads": {id inside: {field: value}}, "timers": [...], "windows": [...],
                               "cgroups": [...], "resources": {...}}

For each thread: the processors that it may run on, priority of block I/O, timer slack and time slice; for each process,
which memory its core dump holds; timers that CRIU restores wrongly (checkpoint/timerfds.py), and windows of connections
(tcp_windows.py). For the cgroups below the container's: limits, owners and processes (CRIU is told to ignore cgroups).
And the changes of `update` to the container's own limits. It is written while the container is frozen, and applied
before it runs again. Default values are left out: most containers need no supplement.
"""

from __future__ import annotations

import os

from runtime.cgroups import subtree
from runtime.checkpoint import tcp_windows, timerfds
from runtime.errors import ContainerError
from runtime.light import json as light_json
from runtime.linux import processes, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from runtime.cgroups.cgroup import Cgroup
    from runtime.state.record import State

NAME = "supplement.img"
_LIMIT = 16 << 20  # bytes
_NO_PRIORITY = ((0, 0), (2, 4))  # how kernels show a thread without its own priority of block I/O
_TIME_SLICED = (0, 3)  # policies (sched(7): normal, batch) whose runtime is a time slice
_FIELDS = ("processors", "io", "slack", "slice", "core")
_INT32, _INT64 = 1 << 31, 1 << 63


def save(images_fd: int, state: State, cgroup: Cgroup) -> None:
    """Write the supplement of a frozen container into the directory of its images, unless it is empty."""
    inside = dict(_threads(state.pid))
    value: dict[str, Any] = {}
    threads = {str(inside[thread]): noted for thread, noted in _noted(inside, cgroup).items()}
    if threads:
        value["threads"] = threads
    pids = {pid: inside[pid] for pid in processes.descendants(state.pid) if pid in inside}
    timers = timerfds.save(pids)
    if timers:
        value["timers"] = timers
    windows = tcp_windows.save(pids, images_fd)
    if windows:
        value["windows"] = windows
    cgroups = subtree.save(cgroup.paths, inside)
    if cgroups:
        value["cgroups"] = cgroups
    if state.resources:
        value["resources"] = state.resources
    if value:
        fd = os.open(NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=images_fd)
        with open(fd, "w") as file:
            file.write(light_json.dumps(value))


def load(images_fd: int) -> dict[str, Any]:
    """Return the supplement of images; {} if they have none. Raises ContainerError if it is malformed."""
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images_fd)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ContainerError(f"{NAME}: cannot be read: {error.strerror}") from None
    try:
        with open(fd, "rb") as file:
            data = file.read(_LIMIT + 1)
        value = light_json.loads(data) if len(data) <= _LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise ContainerError(f"{NAME}: cannot be read: {error}") from None
    kinds = {"threads": dict, "timers": list, "windows": list, "cgroups": list, "resources": dict}
    if not isinstance(value, dict) or not all(kinds.get(name) is type(item) for name, item in value.items()):
        raise ContainerError(f"{NAME}: is malformed")
    for thread, noted in value.get("threads", {}).items():
        number = thread.isascii() and thread.isdecimal() and len(thread) <= 10
        if not number or not isinstance(noted, dict) or not set(noted) <= set(_FIELDS):
            raise ContainerError(f"{NAME}: thread {thread[:20]}: is malformed")
        numbers = [noted[name] for name in ("slack", "slice", "core") if name in noted]
        if not all(type(number) is int and 0 <= number < _INT64 for number in numbers):
            raise ContainerError(f"{NAME}: thread {thread[:20]}: has a value that is not a number")
        for name in ("processors", "io"):
            items = noted.get(name, [])
            if not isinstance(items, list) or not all(type(item) is int and 0 <= item < _INT32 for item in items):
                raise ContainerError(f"{NAME}: thread {thread[:20]}: {name}: must be numbers")
        if "io" in noted and len(noted["io"]) != 2:
            raise ContainerError(f"{NAME}: thread {thread[:20]}: io: must be two numbers")
    timerfds.check(value.get("timers", []))
    tcp_windows.check(value.get("windows", []))
    subtree.check(value.get("cgroups", []))
    return value


def resources(images: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the changes of `update` to the limits of the container in the images. Raises ContainerError."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return dict(load(fd).get("resources", {}))
    finally:
        os.close(fd)


def prepare(value: dict[str, Any], cgroup: Cgroup) -> None:
    """Make the cgroups that a restored tree must find, because it has their files open. Raises ContainerError."""
    subtree.make(value.get("cgroups", []), cgroup)


def apply(value: dict[str, Any], pid: int, cgroup: Cgroup) -> None:
    """Apply a loaded supplement to a restored tree that does not run yet; `pid` is its init. Raises ContainerError."""
    if not any(value.get(name) for name in ("threads", "timers", "windows", "cgroups")):
        return
    outside = {inside: thread for thread, inside in _threads(pid)}
    for inside, noted in value.get("threads", {}).items():
        thread = outside.get(int(inside))
        if thread is None:
            raise ContainerError(f"{NAME}: there is no thread {inside}")
        try:
            _give(thread, noted)
        except OSError as error:
            raise ContainerError(f"thread {inside} of the container cannot be given {noted}: {error}") from None
    timerfds.restore(value.get("timers", []), outside)
    tcp_windows.restore(value.get("windows", []), outside)
    subtree.restore(value.get("cgroups", []), cgroup, outside)


def _threads(init: int) -> Iterator[tuple[int, int]]:
    """Yield all threads that CRIU dumps or has restored: their ids here and inside.

    These are the threads of the init's descendants, not of its pid namespace, which may be the host's or a pod's.
    """
    for pid in sorted(processes.descendants(init)):
        try:
            for name in os.listdir(f"/proc/{pid}/task"):
                for line in _read(f"/proc/{pid}/task/{name}/status").splitlines():
                    if line.startswith("NSpid:"):
                        yield int(name), int(line.split()[-1])
                        break
        except OSError:
            continue  # a zombie that was reaped meanwhile


def _noted(threads: dict[int, int], cgroup: Cgroup) -> dict[int, dict[str, Any]]:
    """Return the values of each thread that are not the default; threads without any are left out."""
    allowed = cgroup.processors() or frozenset(os.sched_getaffinity(0))
    slice_, slack, core = syscalls.sched_getattr(0)[4], _read("/proc/self/timerslack_ns"), _read(_core("self"))
    found: dict[int, dict[str, Any]] = {}
    for thread in threads:
        noted: dict[str, Any] = {}
        try:
            processors = os.sched_getaffinity(thread)
            if not processors >= allowed:
                noted["processors"] = sorted(processors)
            priority = syscalls.ioprio_get(thread)
            if priority not in _NO_PRIORITY:
                noted["io"] = list(priority)
            policy, *_, runtime = syscalls.sched_getattr(thread)
            if policy in _TIME_SLICED and runtime != slice_:
                noted["slice"] = runtime
            own_slack = _read(f"/proc/{thread}/timerslack_ns")
            if own_slack not in ("", "0", slack):
                noted["slack"] = int(own_slack)
            own_core = _read(_core(thread))
            if own_core not in ("", core):
                noted["core"] = int(own_core, 16)
        except OSError:
            pass  # a zombie lacks some of these
        if noted:
            found[thread] = noted
    return found


def _give(thread: int, noted: dict[str, Any]) -> None:
    processors = set(noted.get("processors", ())) & set(range(os.sysconf("SC_NPROCESSORS_CONF")))
    if processors:  # on a host that has none of them, the thread may run on all
        os.sched_setaffinity(thread, processors)
    if "io" in noted:
        io_class, level = noted["io"]
        syscalls.ioprio_set(io_class, level, thread)
    if "slice" in noted:
        policy, flags, nice, priority, _ = syscalls.sched_getattr(thread)
        syscalls.sched_setattr(policy, flags, nice, priority, (noted["slice"], 0, 0), thread)
    for path, name in ((f"/proc/{thread}/timerslack_ns", "slack"), (_core(thread), "core")):
        if name in noted:
            with open(path, "w") as file:
                file.write(str(noted[name]))


def _core(thread: object) -> str:
    return f"/proc/{thread}/coredump_filter"


def _read(path: str) -> str:
    """Return the text of a file in /proc without white space around it, "" if it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
