"""The starter's side of a container's monitor: start it (monitor/main.py), tell it the init, or abandon it.

A caller that adopts orphans, such as podman's conmon or containerd's shim, monitors its containers itself: it reaps
them and owns their standard streams, so no monitor is started. Such a caller has made itself a subreaper
(PR_SET_CHILD_SUBREAPER), which shows when a process loses its parent here, and asks for a pid file.
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


class Monitor:
    """A started monitor; `pid` is 0 if the caller monitors the container itself."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid

    def give_terminal(self, master: int, recent: bytes = b"") -> None:
        """Give the monitor the container's terminal, before `watch`; `recent` is its earlier output.

        Raises StartFailed.
        """
        try:
            sync.pass_fd(self._control, master, b"terminal " + recent)
        except OSError:
            raise StartFailed("the container's monitor did not accept its terminal: it has exited") from None

    def watch(self, pid: int) -> None:
        """Tell the monitor the container's init; from then on the monitor stays. Raises StartFailed."""
        if self.pid:
            self._tell(b"%d" % pid, MONITOR_START_TIMEOUT)
        self._control.close()

    def ping(self, timeout: float) -> None:
        """Raise StartFailed if the monitor does not answer within `timeout` seconds: it was killed or stopped."""
        if self.pid:
            self._tell(b"ping", timeout)

    def _tell(self, what: bytes, timeout: float) -> None:
        self._control.settimeout(timeout)
        try:
            self._control.send(what)
        except OSError:
            pass  # it has exited, and may have sent its reason
        try:
            answer = self._control.recv(1024)
        except OSError:  # a timeout too
            answer = b""
        if answer != b"ok":
            raise StartFailed(answer.decode(errors="replace") or "the container's monitor does not answer")

    def abandon(self) -> None:
        """Make the monitor kill the child and exit; return when it is gone. No effect after `watch`."""
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

    `child` is called in a forked process. Its argument is True if the caller's parent, such as podman's conmon, has
    adopted that process, so that there is no monitor; this is tried if `adoptable`. Unless `fresh` it exits soon, and
    leaves a child of its own. `stdout` and `stderr` are the read ends of the monitor's pipes; the caller closes its own
    copies.

    The monitor goes into a cgroup beside the container's `cgroup`. It is a fork of this process, which is small if it
    is a verb of the command line; with `fresh` it executes a new interpreter, which takes longer than all the rest.
    The calling process must not have threads. Without `fresh` it must exit soon, because the monitor is its child.
    Raises ContainerError.
    """
    birthplace = monitor_cgroup.birthplace(cgroup)
    ours, theirs = sync.pair()
    caller, starter = os.getppid(), 0
    orphan = fresh or adoptable  # then its parent is an intermediate process that exits
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
    """Fork, with the child in the monitor's version 2 cgroup unless `birthplace` is -1."""
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


def _await_end(child: int, control: socket.socket) -> None:
    """Wait until a child has exited, or the starter has closed the control socket.

    The child joins the container's cgroups, and the starter waits for that. This process joins the monitor's, for which
    nothing waits, only afterwards, because the kernel lets one process at a time change cgroups.
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
    """Become the child itself, or the monitor with the child as its first child process."""
    try:
        while starter and os.getppid() == starter:
            os.sched_yield()
        # Process 1 adopts all orphans; that alone does not make it the container's monitor.
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
        processes.outlive_shortage()
        if not fresh:
            _await_end(first, control)
        if cgroup.unit is None:  # else the caller asks systemd, because it has a D-Bus connection already
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
