"""A process beside each dump: when CRIU is killed, nothing of the container runs before that is mended.

The kernel lets a container go when the CRIU that traces it dies, and its first look at a connection in repair mode
would be an error. So CRIU is traced as well: one that was killed stops on its way out (PTRACE_EVENT_EXIT), where it has
let nothing go yet, and the freezer of the container's cgroup is set first. Who makes the dump mends and thaws then
(freeze/mend.py); the guard does it when that one is gone as well.

    who makes the dump            guard
      | ---- PID of CRIU ---------> |
      | <--- ok ------------------- |   it is traced
      | ---- n, or the end -------> |   the dump is over; or its maker was killed
"""

from __future__ import annotations

import os
import signal
import sys
import time

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.errors import ContainerError, DeadlineExceeded
from runtime.freeze import mend
from runtime.light import sockets
from runtime.limits import CRIU_RELEASE_TIMEOUT, GUARD_EXIT_TIMEOUT, GUARD_START_TIMEOUT
from runtime.linux import processes, selfexec, syscalls
from runtime.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from runtime.state.record import State

_SEIZE, _CONT, _LISTEN = 0x4206, 7, 0x4208
_TRACE_EXIT = 0x40  # PTRACE_O_TRACEEXIT
_EVENT_EXIT, _EVENT_STOP = 6, 128
_WALL = 0x40000000
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class Guard:
    """The maker's side: started ahead, as it takes a moment, then told which CRIU to `watch`."""

    def __init__(self, state: State) -> None:
        self._socket, theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        self._socket.settimeout(GUARD_START_TIMEOUT)
        try:
            argv = selfexec.command("runtime.freeze.guard", state.directory, str(theirs.fileno()))
            os.set_inheritable(theirs.fileno(), True)
            quiet = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)]
            self._pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=quiet, setsid=True)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def watch(self, criu: int) -> None:
        """Returns when CRIU can be killed without harm. Raises ContainerError."""
        try:
            self._socket.send(b"%d" % criu)
            answer = self._socket.recv(1024)
        except OSError as error:
            answer = str(error).encode()
        if answer != b"ok":
            raise ContainerError(f"criu cannot be watched over: {answer.decode(errors='replace') or 'no answer'}")

    def close(self) -> None:
        """The dump is over, and its CRIU has ended."""
        try:
            self._socket.send(b"n")
        except OSError:
            pass  # it has been killed
        self._socket.close()
        pidfd = os.pidfd_open(self._pid)
        try:
            if not processes.wait_exit(pidfd, GUARD_EXIT_TIMEOUT):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        os.waitpid(self._pid, 0)


def _watch(criu: int, cgroup: Cgroup) -> None:
    """Trace CRIU to its end."""
    while True:
        _, status = os.waitpid(criu, _WALL)
        if not os.WIFSTOPPED(status):
            return
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_EXIT and os.WIFSIGNALED(syscalls.ptrace_event_message(criu)):
            try:
                cgroup.hold()
            except Error:
                pass  # there is no freezer
        try:
            if event == _EVENT_STOP and number in _STOPS:
                syscalls.ptrace(_LISTEN, criu)
            else:
                syscalls.ptrace(_CONT, criu, 0, 0 if event else number)
        except ProcessLookupError:
            continue  # it was killed meanwhile


def _mend(store: Store, container_id: str) -> None:
    """Undo the dump for its maker, who was killed."""
    deadline = time.monotonic() + CRIU_RELEASE_TIMEOUT
    while mend.is_left(store.load(container_id)) and time.monotonic() < deadline:
        try:
            with store.lock_existing(container_id, 0):
                mend.repair_left(store.load(container_id))
        except DeadlineExceeded:
            time.sleep(0.01)  # somebody works on it, who does this himself, or removes it


def main(argv: list[str]) -> NoReturn:
    """argv: the directory of a container, and the descriptor of the socket."""
    try:
        _guard(argv[0], int(argv[1]))
    except (Error, OSError):
        os._exit(1)  # the container was deleted meanwhile
    os._exit(0)  # at once: who makes the dump waits


def _guard(directory: str, control_fd: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control: socket.socket = sockets.socket(-1, -1, -1, control_fd)
    root, container_id = os.path.split(directory)
    store = Store(root)
    cgroup = Cgroup.of(store.load(container_id))
    told = control.recv(64)
    if told.isdigit():
        try:
            syscalls.ptrace(_SEIZE, int(told), 0, _TRACE_EXIT)
        except OSError as error:
            control.send(str(error).encode())
            return
        control.send(b"ok")
        _watch(int(told), cgroup)
        told = control.recv(64)
    if told != b"n":
        _mend(store, container_id)


if __name__ == "__main__":
    main(sys.argv[1:])
