"""The starter's side of a container's monitor: starts it (monitor/main.py), tells it the init, or gives it up.

A caller that is ready to adopt what we leave behind, such as podman's conmon or containerd's shim, is the monitor of
its containers itself: it reaps them and owns their standard streams, and there is no monitor of ours then. Such a
caller has made itself a subreaper (PR_SET_CHILD_SUBREAPER), which shows when a process of ours loses its parent, and
asks for a pid file.
"""

from __future__ import annotations

import os

from criu_rpc.errors import Error
from runtime import sync
from runtime.cgroups import monitor as monitor_cgroup
from runtime.errors import StartFailed
from runtime.light import signals
from runtime.limits import MONITOR_START_TIMEOUT
from runtime.linux import processes, selfexec

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import NoReturn

    from runtime.cgroups.cgroup import Cgroup

_OOM_NEVER = -1000


class Monitor:
    """`pid` is 0 when the caller is the monitor."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid

    def give_terminal(self, master: int, recent: bytes = b"") -> None:
        """Have the monitor own the container's terminal; `recent` is what that has shown before. Before `watch`.

        Raises StartFailed.
        """
        try:
            sync.pass_fd(self._control, master, b"terminal " + recent)
        except OSError:
            raise StartFailed("the container's monitor does not take its terminal") from None

    def watch(self, pid: int) -> None:
        """Tell the monitor the container's init; from then on it stays. Raises ContainerError."""
        if self.pid:
            self._tell(b"%d" % pid, MONITOR_START_TIMEOUT)
        self._control.close()

    def ping(self, timeout: float) -> None:
        """Raises StartFailed when the monitor does not answer within `timeout` seconds: it was killed or stopped."""
        if self.pid:
            self._tell(b"ping", timeout)

    def _tell(self, what: bytes, timeout: float) -> None:
        self._control.settimeout(timeout)
        try:
            self._control.send(what)
        except OSError:
            pass  # it has ended, and may have said why
        try:
            answer = self._control.recv(1024)
        except OSError:  # a timeout too
            answer = b""
        if answer != b"ok":
            raise StartFailed(answer.decode(errors="replace") or "the container's monitor does not answer")

    def abandon(self) -> None:
        """Make the monitor end and take the child with it; returns when it is gone. No effect after `watch`."""
        from runtime.linux.processes import wait_exit

        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._control.close()
            return
        self._control.close()
        try:
            signals.pidfd_send_signal(pidfd, signals.SIGCONT)  # it may be stopped
        except ProcessLookupError:
            pass
        if not wait_exit(pidfd, MONITOR_START_TIMEOUT):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)
        os.close(pidfd)


def spawn(
    directory: str,
    child: Callable[[bool], NoReturn],
    *,
    cgroup: Cgroup,
    stdout: int,
    stderr: int,
    adoptable: bool,
    fresh: bool,
) -> Monitor:
    """Start a monitor for the container in `directory`, with `child` as its first child process.

    `child` is called in a forked process, with whether it belongs to our caller instead of a monitor, which is tried
    when `adoptable`. Unless `fresh` it ends soon, and leaves a child of its own. `stdout` and `stderr` are the read
    ends of the monitor's pipes. The caller closes its own copies.
    The monitor goes into a cgroup beside the container's `cgroup`. It is a fork of this process, which is small when it
    is a verb of the command line; with `fresh` it starts an interpreter of its own, which takes longer than all else.
    Must be called by a process without threads, which without `fresh` is about to end: the monitor is its child then.
    Raises ContainerError.
    """
    birthplace = monitor_cgroup.birthplace(cgroup)
    ours, theirs = sync.pair()
    caller, starter = os.getppid(), 0
    orphan = fresh or adoptable  # then its parent is a starter that ends
    pid = processes.fork() if orphan else processes.fork(lambda: _fork(cgroup, birthplace))
    if pid == 0:
        if orphan:
            starter = os.getpid()
            if _fork(cgroup, birthplace):
                os._exit(0)
        _run(child, directory, theirs, (stdout, stderr), caller if adoptable else 0, starter, fresh, cgroup)
    theirs.close()
    if birthplace >= 0:
        os.close(birthplace)
    if orphan:
        os.waitpid(pid, 0)
    try:
        return Monitor(ours, int(sync.receive(ours, MONITOR_START_TIMEOUT, "the monitor")["monitor"]))
    except BaseException:
        ours.close()
        raise


def _fork(cgroup: Cgroup, birthplace: int) -> int:
    """fork, with the child in the monitor's version 2 cgroup, where there is one."""
    from runtime.linux import syscalls

    if birthplace < 0:
        return os.fork()
    try:
        return syscalls.fork_into(birthplace)
    except OSError:  # before Linux 5.7
        pid = os.fork()
        if pid == 0:
            monitor_cgroup.add(cgroup, 0)
        return pid


def _outlive_shortage() -> None:
    """Be the last process that the kernel kills when memory runs out, or as close to that as it lets us.

    Without CAP_SYS_RESOURCE it takes no value below the lowest that a privileged process has set for us or for the
    process that we inherit from (proc(5), oom_score_adj), and does not say which one that is. A container is born
    before, and keeps what its config.json says, or its caller has.
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


def _await_end(child: int, control: socket.socket) -> None:
    """Wait until a child has ended, or the starter gives up.

    The child goes into the container's cgroups, and the starter waits for it. We are about to go into ours, for which
    nobody waits, and the kernel lets one process change cgroups at a time.
    """
    from select import POLLIN, poll

    pidfd = os.pidfd_open(child)
    either = poll()
    for fd in (pidfd, control.fileno()):
        either.register(fd, POLLIN)
    either.poll()
    os.close(pidfd)


def _run(
    child: Callable[[bool], NoReturn],
    directory: str,
    control: socket.socket,
    pipes: tuple[int, int],
    caller: int,
    starter: int,
    fresh: bool,
    cgroup: Cgroup,
) -> NoReturn:
    """In the process that becomes the child itself, or the monitor."""
    try:
        while starter and os.getppid() == starter:
            os.sched_yield()
        # Process 1 adopts everybody: that alone does not make it somebody who waits for a container.
        if caller > 1 and os.getppid() == caller:
            sync.send(control, {"monitor": 0})
            child(True)
        from runtime.linux import syscalls

        os.setsid()
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        sync.send(control, {"monitor": os.getpid()})
        first = os.fork()
        if first == 0:
            child(False)
        _outlive_shortage()
        if not fresh:
            _await_end(first, control)
        if cgroup.unit is None:  # systemd is told by the caller, who knows its language already
            monitor_cgroup.add(cgroup, 0, but_unified=True)
        keep = (control.fileno(), *pipes)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue  # the descriptor that listed the directory
        for number in (0, 1, 2):
            os.open("/dev/null", os.O_RDWR)
            os.set_inheritable(number, True)
        os.chdir("/")
        if not fresh:
            from runtime.monitor import main as monitor_main

            monitor_main.watch(directory, *keep)
        for fd in keep:
            os.set_inheritable(fd, True)
        selfexec.execute(selfexec.command("runtime.monitor.main", directory, *map(str, keep)))
    except Error as error:
        control.send(str(error).encode())
    finally:
        os._exit(127)
