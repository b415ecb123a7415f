"""Guard a dump: if CRIU is killed, no process of the container runs before the dump is undone.

The kernel resumes the container when the CRIU that traces it dies, and its first access to a connection in repair mode
would fail. The guard therefore traces CRIU: a killed CRIU stops on its way out (PTRACE_EVENT_EXIT), while it still
holds every process, and the guard freezes the container's cgroup at that point. The dumping process then repairs and
thaws the container (freeze/mend.py); if it has died too, the guard does it.

    dumping process               guard
      | ---- PID of CRIU ---------> |
      | <--- ok ------------------- |   CRIU is traced
      | ---- n, or end of file ---> |   the dump is over; or the dumping process was killed
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
    """The dumping process's side. Make it ahead of the dump, because the guard takes a moment to start."""

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
        """Return once the guard traces CRIU, whose death then does no harm. Raises ContainerError."""
        try:
            self._socket.send(b"%d" % criu)
            answer = self._socket.recv(1024)
        except OSError as error:
            answer = str(error).encode()
        if answer != b"ok":
            reason = answer.decode(errors="replace") or "no answer"
            raise ContainerError(f"the guard cannot trace criu (process {criu}): {reason}")

    def close(self) -> None:
        """End the guard. The dump must be over and its CRIU must have exited."""
        try:
            self._socket.send(b"n")
        except OSError:
            pass  # the guard was killed
        self._socket.close()
        processes.end_child(self._pid, GUARD_EXIT_TIMEOUT)


def _watch(criu: int, cgroup: Cgroup) -> None:
    """Trace CRIU until it exits; freeze the container if CRIU is killed."""
    while True:
        _, status = os.waitpid(criu, _WALL)
        if not os.WIFSTOPPED(status):
            return
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_EXIT and os.WIFSIGNALED(syscalls.ptrace_event_message(criu)):
            try:
                cgroup.hold()
            except Error:
                pass  # the cgroup has no freezer
        try:
            if event == _EVENT_STOP and number in _STOPS:
                syscalls.ptrace(_LISTEN, criu)
            else:
                syscalls.ptrace(_CONT, criu, 0, 0 if event else number)
        except ProcessLookupError:
            continue  # CRIU was killed meanwhile


def _repair(store: Store, container_id: str) -> None:
    """Undo the dump in place of the dumping process, which was killed."""
    deadline = time.monotonic() + CRIU_RELEASE_TIMEOUT
    while mend.is_left(store.load(container_id)) and time.monotonic() < deadline:
        try:
            with store.lock_existing(container_id, 0):
                mend.repair_left(store.load(container_id))
        except DeadlineExceeded:
            time.sleep(0.01)  # another verb holds the lock: it repairs the container itself, or removes it


def main(argv: list[str]) -> NoReturn:
    """Run the guard. argv: the container's state directory, the descriptor of the socket."""
    try:
        _guard(argv[0], int(argv[1]))
    except (Error, OSError):
        os._exit(1)  # the container was deleted meanwhile
    os._exit(0)  # at once, because the dumping process waits


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
        _repair(store, container_id)


if __name__ == "__main__":
    main(sys.argv[1:])
