"""Find what CRIU would lose silently, or what would make it fail, as far as /proc shows it.

What the kernel shows only to the process itself cannot be found: docs/carried.md lists that.
"""

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

from migrate.preflight import special_files
from migrate.preflight.rules import Blocker
from runtime.linux import capabilities, namespaces, syscalls

_SCHED_DEADLINE = 6
# Types of namespaces that CRIU carries if a process has its own (criu/namespaces.c).
_CARRIED = frozenset(("mount", "network"))
_FOR_CHILDREN = {"pid_for_children": "pid", "time_for_children": "time"}
_PIPE_PACKETS = os.O_DIRECT
# Memory protection keys in /proc/cpuinfo: in the flags of x86 if the kernel uses them, in the features of arm64.
_KEY_FLAGS = re.compile(r"^(?:flags|Features)\s*:.*\b(?:ospke|poe)\b", re.MULTILINE)
_HAS_KEY = re.compile(r"^ProtectionKey: *[1-9]", re.MULTILINE)
# The values in /proc/PID/status of a thread restricted by prctl(PR_SET_SPECULATION_CTRL) or a seccomp filter.
_SPECULATION = {
    "Speculation_Store_Bypass": ("thread mitigated", "thread force mitigated"),
    "SpeculationIndirectBranch": ("conditional disabled", "conditional force disabled"),
}
_STORE_BYPASS = "/sys/devices/system/cpu/vulnerabilities/spec_store_bypass"


def of_process(pid: int, init: int, subject: str) -> Iterator[Blocker]:
    """Yield the blockers about a process itself, and about its threads."""
    kinds = _foreign_namespaces(f"/proc/{pid}", f"/proc/{init}", _CARRIED)
    for kind in kinds:
        yield Blocker("nested-namespace", subject, f"has its own {kind} namespace, or one for its children")
    if int(_read(f"/proc/{pid}/personality") or "0", 16):
        yield Blocker("personality", subject, f"has the personality {_read(f'/proc/{pid}/personality')}")
    yield from _mapped(pid, subject)
    place = _unified(f"/proc/{pid}")
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        return  # it has exited
    for name in threads:
        thread = subject if int(name) == pid else f"{subject}, thread {name}"
        try:
            yield from _of_thread(int(name), thread)
            if int(name) != pid:
                here = f"/proc/{pid}/task/{name}"
                for kind in set(_foreign_namespaces(here, f"/proc/{pid}", frozenset())) - set(kinds):
                    yield Blocker("nested-namespace", thread, f"has another {kind} namespace than its process")
                if _unified(here) not in ([], place):  # [] if the thread has exited meanwhile
                    yield Blocker("threaded-cgroup", thread, "is in another version 2 cgroup than its process")
        except OSError:
            continue  # it has exited


def _unified(process: str) -> list[str]:
    """Return the cgroup v2 line of a process or thread; those of version 1 do not matter."""
    return [line for line in _read(f"{process}/cgroup").splitlines() if line.startswith("0::")]


def _of_thread(thread: int, subject: str) -> Iterator[Blocker]:
    status = _read(f"/proc/{thread}/status")
    for line in status.splitlines():
        if line.startswith("Seccomp:") and line.split()[1] != "0":
            yield Blocker("seccomp", subject, "runs under a seccomp filter")
    if beyond := inheritable_beyond_bounding(status):
        problem = f"has an inheritable capability that is not in its bounding set ({beyond}), which CRIU cannot restore"
        yield Blocker("capabilities", subject, problem)
    if restricted := speculation(status, _read(_STORE_BYPASS)):
        yield Blocker("speculation", subject, f"has restricted speculation ({restricted}), which CRIU would lift")
    if os.sched_getscheduler(thread) == _SCHED_DEADLINE:
        yield Blocker("deadline", subject, "is scheduled by deadline (SCHED_DEADLINE), which CRIU cannot restore")


def _foreign_namespaces(process: str, other: str, carried: frozenset[str]) -> list[str]:
    """Return the types of namespaces in which a process, or its future children, differ from the other process."""
    found = []
    files = {name: kind for kind, name in namespaces.FILES.items()} | _FOR_CHILDREN
    for name, kind in files.items():
        if kind in carried or kind in found:
            continue
        theirs = name.removesuffix("_for_children")
        try:
            expected = os.readlink(f"{other}/ns/{theirs}")
        except OSError:
            continue  # the kernel lacks this type, or the process has exited
        try:
            if os.readlink(f"{process}/ns/{name}") != expected:
                found.append(kind)
        except FileNotFoundError:
            # A zombie shows only its pid and user namespaces.
            if name == "pid_for_children" and os.path.exists(f"{process}/ns/uts"):
                found.append(kind)  # a new namespace without a process yet
    return found


def _mapped(pid: int, subject: str) -> Iterator[Blocker]:
    """Yield the blockers about mapped memory, because its descriptors may be closed."""
    text = _read(f"/proc/{pid}/maps")
    if "anon_inode:[io_uring]" in text:
        yield Blocker("io-uring", subject, "has an io_uring mapped, which CRIU cannot carry")
    if " /secretmem" in text:
        text = "has secret memory (memfd_secret) mapped, which CRIU cannot carry"
        yield Blocker("special-file", subject, text, special_files.remedy("secretmem"))
    if _keys_work() and (address := protected_by_key(_read(f"/proc/{pid}/smaps"))):
        problem = (
            f"has memory with a protection key (at {address}): CRIU would drop the key, and with it the protection"
        )
        yield Blocker("protection-key", subject, problem)


@functools.cache
def _keys_work() -> bool:
    """Return whether processor and kernel have protection keys. Only then is smaps read, at 20 ms for each GiB."""
    return _KEY_FLAGS.search(_read("/proc/cpuinfo")) is not None


def protected_by_key(smaps: str) -> str:
    """Return the address of a mapping with a protection key, from the text of /proc/PID/smaps; "" if none has one.

    Execute-only memory does not count, because the kernel itself gives it a key, after a restore too.
    """
    address = flags = ""
    for line in smaps.splitlines() if _HAS_KEY.search(smaps) else ():
        name, *values = line.split(None, 2)
        if not name.endswith(":"):
            address, flags = name.partition("-")[0], values[0]
        elif _HAS_KEY.match(line) and flags[:3] != "--x":
            return address
    return ""


def inheritable_beyond_bounding(status: str) -> str:
    """Return the names of a thread's capabilities that capset(2) cannot restore, from the text of /proc/PID/status.

    CRIU drops capabilities from the bounding set before it sets the inheritable ones. It then fails, and kills the
    restored tree, when the source has already killed the container.
    """
    masks = {"CapInh": 0, "CapBnd": 0}
    for line in status.splitlines():
        name, _, text = line.partition(":")
        if name in masks:
            masks[name] = int(text, 16)
    beyond = masks["CapInh"] & ~masks["CapBnd"]
    return ", ".join(capabilities.names(beyond))


def speculation(status: str, store_bypass: str) -> str:
    """Return what a thread restricts with prctl(PR_SET_SPECULATION_CTRL), from /proc/PID/status; "" for nothing.

    `store_bypass`: the kernel's text about that vulnerability. It names seccomp if a filter alone restricts a thread
    (Linux before 5.16); CRIU then carries the filter, and the restriction with it.
    """
    fields = {name: text.strip() for name, _, text in (line.partition(":") for line in status.splitlines())}
    if fields.get("Seccomp", "0") != "0" and "seccomp" in store_bypass:
        return ""
    found = [f"{name}: {fields[name]}" for name, values in _SPECULATION.items() if fields.get(name) in values]
    return ", ".join(found)


def of_descriptor(pid: int, number: str, link: str, where: str) -> Blocker | None:
    """Return the blocker about an open file that is not a device, or None."""
    if link in ("anon_inode:[eventfd]", "anon_inode:eventfd") and _info(pid, number).get("eventfd-semaphore") == "1":
        return Blocker(
            "eventfd-semaphore", where, "is an eventfd with EFD_SEMAPHORE, which CRIU would make a plain one"
        )
    if link.startswith("pipe:") and int(_info(pid, number).get("flags", "0"), 8) & _PIPE_PACKETS:
        return Blocker("packet-pipe", where, "is a packet pipe (O_DIRECT), which CRIU cannot carry")
    if link.startswith("/secretmem"):
        text = "is secret memory (memfd_secret), which CRIU cannot carry"
        return Blocker("special-file", where, text, special_files.remedy("secretmem"))
    return None


def is_memfd(device: int) -> bool:
    """Return whether a file is on the device of memfds without huge pages; CRIU does not always know the others."""
    fd = os.memfd_create("probe")
    try:
        return os.fstat(fd).st_dev == device
    finally:
        os.close(fd)


def is_message_queue(pid: int, number: str) -> bool:
    """Return whether a descriptor is one of mq_open(3): its file begins with QSIZE (mq_overview(7))."""
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.read(fd, 64).startswith(b"QSIZE:")
    except OSError:
        return False
    finally:
        os.close(fd)


def _info(pid: int, number: str) -> dict[str, str]:
    lines = _read(f"/proc/{pid}/fdinfo/{number}").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ipc(init: int, pids: Iterable[int]) -> Iterator[Blocker]:
    """Yield the blockers about the container's ipc namespace, also about objects that no process has open."""
    queues: list[str] = []
    semaphores: list[str] = []

    def look() -> None:
        """Read the namespace, in a separate thread because a thread that has joined it cannot leave it."""
        try:
            fd = os.open(f"/proc/{init}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.setns(fd, syscalls.CLONE_NEWIPC)
            finally:
                os.close(fd)
            semaphores.extend(_read("/proc/sysvipc/sem").splitlines()[1:])
            mounted = syscalls.detached("mqueue")
            try:
                queues.extend(sorted(os.listdir(mounted)))
            finally:
                os.close(mounted)
        except OSError:
            return  # the kernel lacks message queues, or the container has exited

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    for name in queues:
        yield Blocker("message-queue", f"POSIX message queue /{name}", "exists, and CRIU cannot carry it")
    if semaphores:
        yield from _semaphore_undo(pids)


def _semaphore_undo(pids: Iterable[int]) -> Iterator[Blocker]:
    """Yield the processes with an undo list: those that have used SEM_UNDO, but also all that have made a thread."""
    idle = [sys.executable, "-I", "-S", "-c", "input()"]
    with subprocess.Popen(idle, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as without:
        for pid in pids:
            try:
                if not syscalls.share_semaphore_undo(without.pid, pid):
                    problem = "may have used SEM_UNDO: its semaphore changes would not be undone when it exits"
                    yield Blocker("semaphore-undo", f"process {pid} ({_read(f'/proc/{pid}/comm').strip()})", problem)
            except OSError:
                continue  # it has exited, or the kernel lacks kcmp


def keys(container_id: str) -> Iterator[Blocker]:
    """Yield a blocker if the container's session keyring holds keys and is visible here (proc_keys(5))."""
    for line in _read("/proc/keys").splitlines():
        fields = line.split(None, 8)
        if len(fields) == 9 and fields[7] == "keyring":
            name, _, held = fields[8].rpartition(":")
            if name == f"_ses.{container_id}" and held.strip() != "empty":
                yield Blocker("keyring", f"session keyring {name}", f"holds {held.strip()} keys: they would be lost")


def _read(path: str) -> str:
    """Return the text of a file in /proc, "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
