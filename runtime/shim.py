"""The monitor of one container: owns its stdout and stderr, reaps it, records how it ended.

It outlives whoever started it (a `create`, or the agent of a move, whose SSH connection ends). The same monitor
serves a new container and a restored one: it starts a *child* (init's first stage, or a CRIU that restores its tree
as its own sibling), and its starter tells it over a SOCK_SEQPACKET control socket which process is the init:

    starter                       monitor
      | <--- {"shim": pid} --------- |   it runs; the child has been started
      | ---- {"pid": n} -----------> |   this is the container's init
      | <--- {"ok": true} ---------- |   from now on the monitor stays until that process ends

Before that, the loss of the control socket means: kill what is there, and end. Afterwards, when init ends, the
monitor takes what is left in the pipes, writes exit.json, and ends.

The log holds one line a line of output, in the format that Kubernetes calls CRI:
    2026-11-24T09:30:00.123456789Z stdout F text        (P instead of F: the line goes on in the next entry)

Runs under `python3 -I -S`; it is kept small because there is one for each container.
"""

import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

START_TIMEOUT = 20.0
_LINE_LIMIT = 16 << 10
_STREAMS = ("stdout", "stderr")
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)


class Monitor:
    """The starter's end of the control socket."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid

    def watch(self, pid: int) -> None:
        """Tell the monitor the container's init; from then on it stays. Raises ContainerError."""
        from runtime import sync

        sync.send(self._control, {"pid": pid})
        sync.receive(self._control, START_TIMEOUT, "the monitor")
        self._control.close()

    def abandon(self) -> None:
        """Make the monitor end and take the child with it; returns when it is gone. No effect after `watch`."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._control.close()
            return
        self._control.close()
        from runtime.processes import wait_exit

        if not wait_exit(pidfd, START_TIMEOUT):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def spawn(
    directory: Path,
    *,
    stdout: int,
    stderr: int,
    child: Sequence[str],
    child_fds: Sequence[int],
    tee: Sequence[int] = (),
) -> Monitor:
    """Start a monitor for the container in `directory`.

    `stdout` and `stderr` are the read ends of its pipes; `child` is an argv that inherits `child_fds` under the same
    numbers; `tee` may hold two descriptors to copy the two streams to. The caller closes its own copies of all.
    Raises ContainerError.
    """
    import subprocess

    from runtime import selfexec, sync

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tee = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in tee]
    fds = [theirs.fileno(), stdout, stderr]
    lists = [",".join(map(str, numbers)) for numbers in (fds, child_fds, tee)]
    with theirs:
        starter = subprocess.Popen(
            [*selfexec.command("runtime.shim", str(directory), *lists), *child],
            pass_fds=[*fds, *child_fds, *tee],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd="/", start_new_session=True,
        )  # fmt: skip
    for fd in tee:
        os.close(fd)
    try:
        hello = sync.receive(ours, START_TIMEOUT, "the monitor")
    except BaseException:
        starter.kill()
        ours.close()
        raise
    finally:
        starter.wait()
    return Monitor(ours, hello["shim"])


class _Log:
    """The container's log: splits streams into lines; a full disk loses lines, never blocks the container."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._rest = dict.fromkeys(_STREAMS, b"")
        self._lost = 0

    def feed(self, stream: str, data: bytes) -> None:
        *lines, rest = (self._rest[stream] + data).split(b"\n")
        out = [self._entry(stream, b"F", line) for line in lines]
        while len(rest) >= _LINE_LIMIT:
            out.append(self._entry(stream, b"P", rest[:_LINE_LIMIT]))
            rest = rest[_LINE_LIMIT:]
        self._rest[stream] = rest
        self._write(out)

    def finish(self) -> None:
        self._write([self._entry(name, b"P", rest) for name, rest in self._rest.items() if rest])

    def _entry(self, stream: str, tag: bytes, line: bytes) -> bytes:
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        return b"%s.%09dZ %s %s %s\n" % (stamp.encode(), nanos, stream.encode(), tag, line)

    def _write(self, entries: list[bytes]) -> None:
        if not entries:
            return
        if self._lost:
            entries.insert(0, self._entry("stderr", b"F", b"[pymigrate: %d lines lost, disk full]" % self._lost))
        try:
            os.write(self._fd, b"".join(entries))
            self._lost = 0
        except OSError:
            self._lost += len(entries)


class _Shim:
    def __init__(self, directory: str, control: int, pipes: dict[int, str], tee: dict[str, int]) -> None:
        self._directory = directory
        self._control: socket.socket | None = socket.socket(fileno=control)
        self._pipes, self._tee = pipes, tee
        self._log = _Log(os.path.join(directory, "log"))
        self._init = 0
        self._ended: dict[int, int] = {}
        self._wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self, child: list[str], child_fds: list[int]) -> None:
        _start(child)
        for fd in child_fds:
            os.close(fd)
        assert self._control is not None
        self._control.send(b'{"shim": %d}' % os.getpid())
        poll = select.poll()
        for fd in (self._wakeup, self._control.fileno(), *self._pipes):
            poll.register(fd, select.POLLIN)
        while not (self._init and self._init in self._ended):
            for fd, _ in poll.poll():
                if fd == self._wakeup:
                    self._reap()
                elif fd in self._pipes:
                    self._drain(fd, poll)
                elif self._control is not None:
                    poll.unregister(fd)
                    if not self._told():
                        return
        for fd in list(self._pipes):
            self._drain(fd, poll)
        self._log.finish()
        self._record(self._ended[self._init])

    def _told(self) -> bool:
        """Take the init's pid from the starter; without it, end everything. False then."""
        import json

        assert self._control is not None
        try:
            message = self._control.recv(4096)
            self._init = int(json.loads(message)["pid"])
            self._control.send(b'{"ok": true}')
        except (OSError, ValueError, KeyError):
            if not self._init:
                self._give_up()
                return False
        self._control.close()
        self._control = None
        self._reap()
        return True

    def _give_up(self) -> None:
        """Kill all children, theirs become ours and are killed too, until there are none."""
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(pid) for pid in file.read().split()]
            for pid in children:
                # CRIU undoes its work when its own socket closes, and then ends by itself.
                os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def _reap(self) -> None:
        try:
            while os.read(self._wakeup, 512):
                pass
        except BlockingIOError:
            pass
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._ended[pid] = status
                if self._init and pid != self._init:
                    del self._ended[pid]
        except ChildProcessError:
            # The init that we were told is no child of ours: then it has ended unseen.
            if self._init:
                self._ended.setdefault(self._init, 0)

    def _drain(self, fd: int, poll: "select.poll") -> None:
        """Take what is in a pipe now; forget the pipe at its end."""
        stream = self._pipes[fd]
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                poll.unregister(fd)
                os.close(fd)
                del self._pipes[fd]
                return
            self._log.feed(stream, data)
            self._copy(stream, data)

    def _copy(self, stream: str, data: bytes) -> None:
        fd = self._tee.get(stream)
        try:
            while fd is not None and data:
                data = data[os.write(fd, data) :]
        except OSError:
            del self._tee[stream]

    def _record(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        number, name = (code, "null") if code >= 0 else (128 - code, str(-code))
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = f'{{"status": {number}, "signal": {name}, "time": "{now}"}}\n'
        path = os.path.join(self._directory, "exit.json")
        try:
            with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            os.rename(path + ".new", path)
        except OSError:
            return  # the container was deleted under us


def _start(argv: list[str]) -> None:
    if os.fork() == 0:
        try:
            for number in (signal.SIGCHLD, *_IGNORED):
                signal.signal(number, signal.SIG_DFL)
            os.execv(argv[0], argv)
        finally:
            os._exit(127)


def main(argv: list[str]) -> int:
    """argv: directory, "control,stdout,stderr", "child fds", "tee fds", child..."""
    from runtime import syscalls

    directory, fds, child_fds, tee, *child = argv
    if os.fork():
        os._exit(0)  # whoever started us has no child to wait for
    control, stdout, stderr = map(int, fds.split(","))
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    copies = dict(zip(_STREAMS, (int(fd) for fd in tee.split(",") if fd), strict=False))
    for fd in (control, stdout, stderr, *copies.values()):
        os.set_inheritable(fd, False)
    for fd in (stdout, stderr):
        os.set_blocking(fd, False)
    pipes = {stdout: "stdout", stderr: "stderr"}
    _Shim(directory, control, pipes, copies).run(child, [int(fd) for fd in child_fds.split(",") if fd])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
