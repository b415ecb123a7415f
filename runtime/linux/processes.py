"""Processes as /proc shows them."""

from __future__ import annotations

import os

from runtime.light import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PF_EXITING = 0x4


def fork(how: Callable[[], int] = os.fork) -> int:
    """fork(2), without a moment in which a signal runs its handler in the child, which would undo what is the parent's.

    The child has all signals blocked, until it has handlers of its own (reset_signals, watch).
    """
    before = signals.pthread_sigmask(signals.SIG_BLOCK, signals.valid_signals())
    pid = how()
    if pid:
        signals.pthread_sigmask(signals.SIG_SETMASK, before)
    return pid


def _stat(pid: int) -> list[bytes]:
    """The fields of proc(5)'s stat from the third (the state) on; none when there is no such process."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return os.read(fd, 4096).rpartition(b")")[2].split()
    except OSError:
        return []
    finally:
        os.close(fd)


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which process `pid` started (proc(5), stat field 22); None if there is none.

    Together with the pid it names a process for good, where the pid alone can be used again.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def open_process(pid: int, started: int | None) -> int | None:
    """A pidfd of a process; None when it is gone. A reused pid is not taken for it."""
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if start_time(pid) == started:
        return pidfd
    os.close(pidfd)
    return None


def is_alive(pid: int, started: int | None) -> bool:
    """Whether the process is there and no zombie."""
    fields = _stat(pid)
    return bool(fields) and int(fields[19]) == started and fields[0] not in (b"Z", b"X")


def is_dying(pid: int) -> bool:
    """Whether the process ends whatever happens: it is gone, or killed, or on its way out."""
    fields = _stat(pid)
    if not fields or fields[0] in (b"Z", b"X") or int(fields[6]) & _PF_EXITING:
        return True
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            pending = [int(line.split()[1], 16) for line in file if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except OSError:
        return True
    return any(signals_ >> signals.SIGKILL - 1 & 1 for signals_ in pending)


def runs(pid: int, started: int | None) -> bool:
    """Whether the process is there, and is not about to end."""
    return is_alive(pid, started) and not is_dying(pid)


def is_first(pid: int) -> bool:
    """Whether it is process 1 of its pid namespace: when it ends, the kernel ends all others there."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return any(line.startswith(b"NSpid:") and line.split()[-1] == b"1" for line in file)
    except OSError:
        return True  # it is gone, and who was with it


def is_stopped(pid: int) -> bool:
    """Whether it was stopped by a signal, or by a tracer."""
    return _stat(pid)[:1] in ([b"T"], [b"t"])


def is_bare(pid: int) -> bool:
    """Whether a process whose environment reads as empty has none: in the middle of execve(2) it only is not there yet.

    By proc(5)'s vsize, env_start and env_end.
    """
    fields = _stat(pid)
    return not fields or fields[20] == b"0" or fields[47] == fields[48] != b"0"


def activity(pid: int) -> int:
    """Clock ticks that it has computed and bytes that it has read and written: constant while it does nothing."""
    fields = _stat(pid)
    if not fields:
        return 0
    try:
        with open(f"/proc/{pid}/io", "rb") as file:  # proc(5): the first two lines are rchar and wchar
            read, written, *_ = (int(line.split()[1]) for line in file)
    except (OSError, ValueError):  # a kernel without task I/O accounting
        read = written = 0
    return int(fields[11]) + int(fields[12]) + read + written


def children(pid: int, started: int | None) -> set[int]:
    """The children of a process's first thread; none when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            found = {int(child) for child in file.read().split()}
    except OSError:
        return set()
    return found if start_time(pid) == started else set()


def descendants(pid: int) -> set[int]:
    """A process with all its children and theirs, of whatever thread."""
    family, pending = {pid}, [pid]
    while pending:
        current = pending.pop()
        try:
            for task in os.listdir(f"/proc/{current}/task"):
                with open(f"/proc/{current}/task/{task}/children", "rb") as file:
                    new = {int(child) for child in file.read().split()} - family
                family |= new
                pending += new
        except OSError:
            continue
    return family


def wait_exit(pidfd: int, timeout: float) -> bool:
    """Wait until the process behind `pidfd` has ended; False after `timeout` seconds."""
    import select

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


def boot_id() -> str:
    """The id of this start of the machine (random(4))."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
