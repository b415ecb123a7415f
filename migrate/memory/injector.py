"""Have a userfaultfd made inside other processes, by a process of its own (injector_process.py).

A process is not itself while a system call is injected into it, and crashes if the injecting process is killed then. A
move may be killed at any time, so it does not inject. Its injector does: no signal of a terminal reaches it, and the
kernel kills it last. It finishes what it has begun when the move is gone.

    move                      injector
      | ---- PID -------------> |
      | <--- descriptor ------ |   a userfaultfd of that process
      | <--- why not ---------- |   the process is unchanged
      X ---- end of file -----> |   it exits
"""

import os
import socket
import subprocess
from typing import Self

from migrate.limits import INJECTION_TIMEOUT, INJECTOR_EXIT_TIMEOUT
from migrate.memory.tracking import TrackingFailed
from runtime.linux import selfexec


class Injector:
    """A context manager: leaving it ends the process."""

    def __init__(self) -> None:
        """Start the process, and do not wait for it. Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                selfexec.command("migrate.memory.injector_process"), stdin=theirs.fileno(), stdout=null, stderr=null,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        self._socket.settimeout(INJECTION_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def userfaultfd(self, pid: int) -> int:
        """Return a new userfaultfd of a process. Raises TrackingFailed; the process is unchanged then."""
        try:
            self._socket.send(b"%d" % pid)
            answer, fds, _, _ = socket.recv_fds(self._socket, 1024, 1)
        except OSError as error:
            raise TrackingFailed(f"its injector does not answer: {error}") from None
        if fds:
            os.set_inheritable(fds[0], False)
            return fds[0]
        raise TrackingFailed(answer.decode(errors="replace") or "its injector has exited")

    def release(self) -> None:
        """Have the process end when it has done what it was asked for, and do not wait for that."""
        self._socket.close()

    def close(self) -> None:
        """End the process when it has done what it was asked for. May be repeated."""
        self.release()
        try:
            self._process.wait(INJECTOR_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
