"""What a container holds that CRIU would lose without a word, or that makes it fail: as far as /proc shows it.

What the kernel shows nobody but the process itself cannot be found: docs/carried.md lists that.
"""

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from migrate.preflight import special_files
from runtime.linux import capabilities, namespaces, syscalls

_SCHED_DEADLINE = 6
# Types of which a process may have one of its own: CRIU carries these (criu/namespaces.c).
_CARRIED = frozenset(("mount", "network"))
_FOR_CHILDREN = {"pid_for_children": "pid", "time_for_children": "time"}
_PIPE_PACKETS = os.O_DIRECT
# Memory protection keys: in the flags of x86 processors whose kernel uses them, and in the features of arm64 ones.
_KEY_FLAGS = re.compile(r"^(?:flags|Features)\s*:.*\b(?:ospke|poe)\b", re.MULTILINE)
_HAS_KEY = re.compile(r"^ProtectionKey: *[1-9]", re.MULTILINE)
# What prctl(PR_SET_SPECULATION_CTRL), or a seccomp filter, makes of a thread's lines in /proc/PID/status.
_SPECULATION = {
    "Speculation_Store_Bypass": ("thread mitigated", "thread force mitigated"),
    "SpeculationIndirectBranch": ("conditional disabled", "conditional force disabled"),
}
_STORE_BYPASS = "/sys/devices/system/cpu/vulnerabilities/spec_store_bypass"


@dataclass(frozen=True)
class Finding:
    """A rule that a process breaks: `where` names the process and the object, as seen from this host.

    `remedy` is what to do about this one, "" where the rule says it.
    """

    rule: str
    where: str
    problem: str
    remedy: str = ""


def of_process(pid: int, init: int, who: str) -> Iterator[Finding]:
    """Findings about a process as such, and about its threads."""
    kinds = _foreign_namespaces(f"/proc/{pid}", f"/proc/{init}", _CARRIED)
    for kind in kinds:
        yield Finding("nested-namespace", who, f"has a {kind} namespace of its own, or for its children")
    if int(_read(f"/proc/{pid}/personality") or "0", 16):
        yield Finding("personality", who, f"has the personality {_read(f'/proc/{pid}/personality')}")
    yield from _mapped(pid, who)
    place = _unified(f"/proc/{pid}")
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        return  # it has ended
    for name in threads:
        thread = who if int(name) == pid else f"{who}, thread {name}"
        try:
            yield from _of_thread(int(name), thread)
            if int(name) != pid:
                here = f"/proc/{pid}/task/{name}"
                for kind in set(_foreign_namespaces(here, f"/proc/{pid}", frozenset())) - set(kinds):
                    yield Finding("nested-namespace", thread, f"has another {kind} namespace than its process")
                if _unified(here) not in ([], place):  # nothing is read of a thread that has ended meanwhile
                    yield Finding("threaded-cgroup", thread, "is in another version 2 cgroup than its process")
        except OSError:
            continue  # it has ended


def _unified(process: str) -> list[str]:
    """Where a process or thread is in the cgroup hierarchy of version 2; those of version 1 are no matter."""
    return [line for line in _read(f"{process}/cgroup").splitlines() if line.startswith("0::")]


def _of_thread(thread: int, who: str) -> Iterator[Finding]:
    status = _read(f"/proc/{thread}/status")
    for line in status.splitlines():
        if line.startswith("Seccomp:") and line.split()[1] != "0":
            yield Finding("seccomp", who, "runs under a seccomp filter")
    if beyond := inheritable_beyond_bounding(status):
        problem = f"has an inheritable capability that is not in its bounding set ({beyond}), which CRIU cannot restore"
        yield Finding("capabilities", who, problem)
    if restricted := speculation(status, _read(_STORE_BYPASS)):
        yield Finding("speculation", who, f"has restricted speculation ({restricted}), which CRIU would lift")
    if os.sched_getscheduler(thread) == _SCHED_DEADLINE:
        yield Finding("deadline", who, "is scheduled by deadline (SCHED_DEADLINE), which CRIU cannot restore")


def _foreign_namespaces(process: str, other: str, carried: frozenset[str]) -> list[str]:
    """The types of those that are not the other one's: its own, or those that its children are going to have."""
    found = []
    files = {name: kind for kind, name in namespaces.FILES.items()} | _FOR_CHILDREN
    for name, kind in files.items():
        if kind in carried or kind in found:
            continue
        theirs = name.removesuffix("_for_children")
        try:
            expected = os.readlink(f"{other}/ns/{theirs}")
        except OSError:
            continue  # a kernel without, or it has ended
        try:
            if os.readlink(f"{process}/ns/{name}") != expected:
                found.append(kind)
        except FileNotFoundError:
            # Of a zombie only the pid and user namespaces are to be seen.
            if name == "pid_for_children" and os.path.exists(f"{process}/ns/uts"):
                found.append(kind)  # a new one that has no process yet
    return found


def _mapped(pid: int, who: str) -> Iterator[Finding]:
    """What is mapped, though its descriptor may be closed."""
    text = _read(f"/proc/{pid}/maps")
    if "anon_inode:[io_uring]" in text:
        yield Finding("io-uring", who, "has an io_uring mapped, which CRIU cannot carry")
    if " /secretmem" in text:
        text = "has secret memory (memfd_secret) mapped, which CRIU cannot carry"
        yield Finding("special-file", who, text, special_files.remedy("secretmem"))
    if _keys_work() and (address := protected_by_key(_read(f"/proc/{pid}/smaps"))):
        problem = (
            f"has memory with a protection key (at {address}): CRIU would drop the key, and with it the protection"
        )
        yield Finding("protection-key", who, problem)


@functools.cache
def _keys_work() -> bool:
    """Whether processor and kernel have protection keys. Only then is smaps read, which takes 20 ms for each GiB."""
    return _KEY_FLAGS.search(_read("/proc/cpuinfo")) is not None


def protected_by_key(smaps: str) -> str:
    """Return the address of a mapping that has a protection key, by the text of /proc/PID/smaps; "" if none has.

    Memory that may only be executed does not count: the kernel itself gives it a key, after a restore too.
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
    """Return the names of a thread's capabilities that capset(2) does not give back, by /proc/PID/status.

    CRIU drops from the bounding set before it sets what is inheritable, when the container has been given up at the
    source already: the tree would be killed.
    """
    masks = {"CapInh": 0, "CapBnd": 0}
    for line in status.splitlines():
        name, _, text = line.partition(":")
        if name in masks:
            masks[name] = int(text, 16)
    beyond = masks["CapInh"] & ~masks["CapBnd"]
    return ", ".join(capabilities.names(beyond))


def speculation(status: str, store_bypass: str) -> str:
    """Return what a thread has restricted with prctl(PR_SET_SPECULATION_CTRL), by /proc/PID/status; "" if nothing.

    `store_bypass` is the kernel's text about that vulnerability. It names seccomp where a filter alone restricts a
    thread (Linux before 5.16): the filter is carried, and the restriction with it.
    """
    fields = {name: text.strip() for name, _, text in (line.partition(":") for line in status.splitlines())}
    if fields.get("Seccomp", "0") != "0" and "seccomp" in store_bypass:
        return ""
    found = [f"{name}: {fields[name]}" for name, values in _SPECULATION.items() if fields.get(name) in values]
    return ", ".join(found)


def of_descriptor(pid: int, number: str, link: str, where: str) -> Finding | None:
    """A finding about an open file that is not a device."""
    if link in ("anon_inode:[eventfd]", "anon_inode:eventfd") and _info(pid, number).get("eventfd-semaphore") == "1":
        return Finding("eventfd-semaphore", where, "is an eventfd with EFD_SEMAPHORE, which would be a plain one then")
    if link.startswith("pipe:") and int(_info(pid, number).get("flags", "0"), 8) & _PIPE_PACKETS:
        return Finding("packet-pipe", where, "is a pipe of packets (O_DIRECT), which CRIU cannot carry")
    if link.startswith("/secretmem"):
        text = "is secret memory (memfd_secret), which CRIU cannot carry"
        return Finding("special-file", where, text, special_files.remedy("secretmem"))
    return None


def is_memfd(device: int) -> bool:
    """Whether a file lies where memfd_create(2) puts what has no huge pages: those CRIU does not always know."""
    fd = os.memfd_create("probe")
    try:
        return os.fstat(fd).st_dev == device
    finally:
        os.close(fd)


def is_message_queue(pid: int, number: str) -> bool:
    """Whether a descriptor is one of mq_open(3): reading its file tells its size (mq_overview(7))."""
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


def ipc(init: int, pids: Iterable[int]) -> Iterator[Finding]:
    """What is in the container's ipc namespace, whether anybody has it open or not."""
    queues: list[str] = []
    semaphores: list[str] = []

    def look() -> None:
        """In a thread of its own: it joins the namespace for good."""
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
            return  # a kernel without message queues, or the container has ended

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    for name in queues:
        yield Finding("message-queue", f"POSIX message queue /{name}", "CRIU carries none")
    if semaphores:
        yield from _semaphore_undo(pids)


def _semaphore_undo(pids: Iterable[int]) -> Iterator[Finding]:
    """Processes with a list of what is to be undone: who has used SEM_UNDO, and alas whoever has made a thread."""
    idle = [sys.executable, "-I", "-S", "-c", "input()"]
    with subprocess.Popen(idle, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as without:
        for pid in pids:
            try:
                if not syscalls.share_semaphore_undo(without.pid, pid):
                    problem = "may have used SEM_UNDO: what it took would not be given back when it ends"
                    yield Finding("semaphore-undo", f"process {pid} ({_read(f'/proc/{pid}/comm').strip()})", problem)
            except OSError:
                continue  # it has ended, or a kernel without kcmp


def keys(container_id: str) -> Iterator[Finding]:
    """Keys in the session keyring that the container was created with, where we may see it (proc_keys(5))."""
    for line in _read("/proc/keys").splitlines():
        fields = line.split(None, 8)
        if len(fields) == 9 and fields[7] == "keyring":
            name, _, held = fields[8].rpartition(":")
            if name == f"_ses.{container_id}" and held.strip() != "empty":
                yield Finding("keyring", f"session keyring {name}", f"holds {held.strip()} keys: they would be lost")


def _read(path: str) -> str:
    """The text of a file in /proc, "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
