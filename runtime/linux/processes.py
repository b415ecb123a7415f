"""Query processes through /proc."""

from __future__ import annotations

import os

from runtime.light import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PF_EXITING = 0x4
_OOM_NEVER = -1000


def fork(how: Callable[[], int] = os.fork) -> int:
    """fork(2) with all signals blocked in the child, where the parent's handlers would undo the parent's work.

    The child unblocks them once it has its own handlers (reset_signals, watch).
    """
    before = signals.pthread_sigmask(signals.SIG_BLOCK, signals.valid_signals())
    pid = how()
    if pid:
        signals.pthread_sigmask(signals.SIG_SETMASK, before)
    return pid


def _stat(pid: int) -> list[bytes]:
    """Return the fields of proc(5)'s stat from the third (the state) on; [] if the process does not exist."""
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
    """Return the clock ticks after boot at which a process started (proc(5), stat field 22); None if it is gone.

    Together they identify a process for good, whereas the pid alone can be reused.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def open_process(pid: int, started: int | None) -> int | None:
    """Return a pidfd of the process that started at `started`; None if it is gone, even if its pid is reused."""
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
    """Return whether the process exists and is not a zombie."""
    fields = _stat(pid)
    return bool(fields) and int(fields[19]) == started and fields[0] not in (b"Z", b"X")


def is_dying(pid: int) -> bool:
    """Return whether the process is gone, or certain to exit: killed, or exiting."""
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
    """Return whether the process exists and is not about to exit."""
    return is_alive(pid, started) and not is_dying(pid)


def is_first(pid: int) -> bool:
    """Return whether it is process 1 of its pid namespace, with which the kernel kills all others there."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return any(line.startswith(b"NSpid:") and line.split()[-1] == b"1" for line in file)
    except OSError:
        return True  # it is gone, and all processes with it


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a tracer has stopped the process."""
    return _stat(pid)[:1] in ([b"T"], [b"t"])


def is_bare(pid: int) -> bool:
    """Return whether a process whose environment reads as empty has none: during execve(2) it is not set up yet.

    This compares proc(5)'s vsize, env_start and env_end.
    """
    fields = _stat(pid)
    return not fields or fields[20] == b"0" or fields[47] == fields[48] != b"0"


def activity(pid: int) -> int:
    """Return a number that is constant while a process is idle: its CPU ticks plus bytes read and written."""
    fields = _stat(pid)
    if not fields:
        return 0
    try:
        with open(f"/proc/{pid}/io", "rb") as file:  # proc(5): the first two lines are rchar and wchar
            read, written, *_ = (int(line.split()[1]) for line in file)
    except (OSError, ValueError):  # the kernel lacks task I/O accounting
        read = written = 0
    return int(fields[11]) + int(fields[12]) + read + written


def children(pid: int, started: int | None) -> set[int]:
    """Return the children of a process's first thread; none if it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            found = {int(child) for child in file.read().split()}
    except OSError:
        return set()
    return found if start_time(pid) == started else set()


def descendants(pid: int) -> set[int]:
    """Return a process with all its descendants, of all threads."""
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
    """Wait until the process of a pidfd has exited; return False after `timeout` seconds."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def end_child(pid: int, timeout: float) -> None:
    """Wait for the exit of a child, kill it after `timeout` seconds, and reap it."""
    pidfd = os.pidfd_open(pid)
    try:
        if not wait_exit(pidfd, timeout):
            os.kill(pid, signals.SIGKILL)  # it is not reaped yet, so that the pid is its own
    finally:
        os.close(pidfd)
    os.waitpid(pid, 0)


def container_pids(init_pid: int) -> list[int]:
    """Return the pids, here, of all processes in the pid namespace of `init_pid`; [] if that is gone."""
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


def outlive_shortage() -> None:
    """Lower this process's OOM score as far as the kernel permits, so that it is killed last when memory runs out.

    Without CAP_SYS_RESOURCE the kernel rejects values below the lowest that a privileged process has set for this one
    or its ancestors (proc(5), oom_score_adj), and does not show that value; hence the binary search.
    """
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    wanted = lowest = _OOM_NEVER
    known = int(os.read(fd, 16))
    while lowest < known:
        try:
            os.write(fd, b"%d" % wanted)
            known = wanted
        except OSError:
            lowest = wanted + 1
        wanted = (lowest + known) // 2
    os.close(fd)


def boot_id() -> str:
    """Return the id of the machine's present boot (random(4))."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
