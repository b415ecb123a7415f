"""Control groups that a container has made below its own."""

import os
import signal
import threading
from collections.abc import Iterator

from harness import Skip, child, equal, kind, say_ready


def _place(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cgroup") as file:
        return sorted(line.strip() for line in file)


def _base(controller: str) -> str:
    for path in (f"/sys/fs/cgroup/{controller}", "/sys/fs/cgroup"):
        if os.path.exists(f"{path}/cgroup.procs") and os.access(path, os.W_OK):
            return path
    raise Skip("there is no cgroup that can be written to")


def _below(controller: str, limit: tuple[str, str] | None) -> Iterator[None]:
    base = _base(controller)
    directory = f"{base}/{controller}-below/deep"
    try:
        os.makedirs(directory)
    except OSError as error:
        raise Skip(str(error)) from None
    if limit is not None and not os.path.exists(f"{directory}/{limit[0]}"):
        limit = None
    if limit is not None:
        with open(f"{directory}/{limit[0]}", "w") as file:
            file.write(limit[1])
    os.chown(directory, 5, 6)
    os.chmod(directory, 0o750)

    def enter() -> None:
        with open(f"{directory}/cgroup.procs", "w") as file:
            file.write("0")
        say_ready()
        signal.pause()

    pid = child(enter)
    before = _place(pid)
    equal(any(line.endswith("/deep") for line in before), True, "before")
    while True:
        yield
        equal(_place(pid), before, "where the process is")
        if limit is not None:
            with open(f"{directory}/{limit[0]}") as file:
                equal(file.read().strip(), limit[1], limit[0])
        info = os.stat(directory)
        equal((info.st_uid, info.st_gid, info.st_mode & 0o777), (5, 6, 0o750), "owner and mode")


@kind
def cgroup_below() -> Iterator[None]:
    return _below("pids", ("pids.max", "123"))


@kind
def cgroup_memory_below() -> Iterator[None]:
    return _below("memory", ("memory.limit_in_bytes", str(64 << 20)))


@kind
def cgroup_unified_below() -> Iterator[None]:
    """In the hierarchy of version 2, where that is mounted beside those of version 1."""
    return _below("unified", ("pids.max", "123"))


def _parted(base: str, entrance: str) -> Iterator[None]:
    """A thread in another cgroup than its process."""
    ready, never = threading.Semaphore(0), threading.Semaphore(0)
    found: list[int] = []

    def work() -> None:
        found.append(threading.get_native_id())
        ready.release()
        never.acquire()

    threading.Thread(target=work, daemon=True).start()
    ready.acquire()
    with open(f"{base}/thread/{entrance}", "w") as file:
        file.write(str(found[0]))
    before = [_place(os.getpid()), _place(found[0])]
    while True:
        yield
        equal([_place(os.getpid()), _place(found[0])], before, "where process and thread are")


@kind
def thread_cgroup() -> Iterator[None]:
    """Of version 1."""
    base = _base("pids")
    if not os.path.exists(f"{base}/tasks"):
        raise Skip("this is version 2")
    os.mkdir(f"{base}/thread")
    return _parted(base, "tasks")


@kind
def threaded_cgroup() -> Iterator[None]:
    """Of version 2."""
    base = _base("unified")
    os.mkdir(f"{base}/thread")
    try:
        with open(f"{base}/thread/cgroup.type", "w") as file:
            file.write("threaded")
    except OSError as error:
        raise Skip(str(error)) from None
    return _parted(base, "cgroup.threads")
