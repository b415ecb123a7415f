"""The monitor of one container: it owns stdout and stderr, reaps the init, and records its exit status.

It outlives its starter (a `create`, or the agent of a move, whose SSH connection closes). The same monitor serves a
new container and a restored one: it is the parent of a *child* (init's first stage, or a CRIU that restores the tree)
and adopts the processes that the child leaves. Its starter tells it over a SOCK_SEQPACKET control socket which process
is the init:

    starter                       monitor
      | <--- {"monitor": pid} ------ |   the child has been started (monitor/spawn.py)
      | ---- terminal DATA --------> |   with a descriptor: the master of its terminal; DATA is its earlier output
      | ---- ping -----------------> |   does the monitor run?
      | <--- ok -------------------- |
      | ---- PID ------------------> |   this is the container's init
      | <--- ok -------------------- |   from now on the monitor stays until that process exits

If the control socket closes before that, the monitor kills its children and exits. Afterwards, when init exits, the
monitor drains the pipes, writes exit.json, and exits.

The log has one entry for each line of output, in the format that Kubernetes calls CRI:
    2026-11-24T09:30:00.123456789Z stdout F text        (P instead of F: the line continues in the next entry)

The monitor is a fork of the verb that made it, or a fresh `python3 -I -S`. It is kept small because there is one for
each container.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import sys
import time

from runtime.light import signals, sockets
from runtime.linux import files
from runtime.monitor import clients

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from typing import NoReturn

_LINE_LIMIT = 16 << 10
_SIZE_LIMIT = 16 << 20  # of a file; there are two
_STREAMS = ("stdout", "stderr")
_AT_ONCE = 1 << 20  # bytes from one stream before the others get their turn
_TERMINAL = 1 << 17  # bytes that can wait in a terminal, at most
_F_GETPIPE_SZ = 1032
_IGNORED = (signals.SIGHUP, signals.SIGINT, signals.SIGTERM, signals.SIGPIPE, signals.SIGXFSZ)


class _Log:
    """The container's log: it splits streams into lines. A full disk loses lines, but never blocks the container.

    The log is in memory (/run). When it is too long it is renamed to log.0, which replaces the previous one.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()
        self._rest = dict.fromkeys(_STREAMS, b"")
        self._lost = 0

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

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
        data = b"".join(entries)
        try:
            if self._size + len(data) > _SIZE_LIMIT:
                os.rename(self._path, self._path + ".0")
                os.close(self._fd)
                self._open()
            written = os.write(self._fd, data)
            self._size += written
            self._lost = 0 if written == len(data) else self._lost + 1
        except OSError:
            self._lost += len(entries)


class _Monitor:
    def __init__(self, directory: str, control: int, pipes: dict[int, str]) -> None:
        self._directory = directory
        self._control: socket.socket | None = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET, 0, control)
        self._pipes = pipes
        self._log = _Log(os.path.join(directory, "log"))
        self._poll = select.poll()
        self._attached = clients.Attached(directory, self._poll, self._drain_all)
        self._init = 0
        self._ended: dict[int, int] = {}
        self._wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signals.signal(signals.SIGCHLD, lambda *_: None)
        signals.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> None:
        assert self._control is not None
        for fd in (self._wakeup, self._control.fileno(), *self._pipes):
            self._poll.register(fd, select.POLLIN)
        self._reap()  # processes that exited before the handler was installed
        while not (self._init and self._init in self._ended):
            for fd, event in self._poll.poll():
                if fd == self._wakeup:
                    self._reap()
                elif fd in self._pipes:
                    if event & select.POLLOUT:
                        self._attached.push()
                    if event & ~select.POLLOUT:
                        self._drain(fd, _AT_ONCE)
                elif self._control is not None and fd == self._control.fileno():
                    if not self._read_control():
                        return
                else:
                    self._attached.ready(fd)
        self._drain_all()
        self._log.finish()
        status = self._ended[self._init]
        self._record(status)
        self._attached.ended(_exit_status(status))

    def _read_control(self) -> bool:
        """Take the terminal or the init's pid from the starter; if it is gone, kill everything and return False."""
        assert self._control is not None
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                clients.RECENT + 64, sockets.CMSG_SPACE(4), sockets.MSG_CMSG_CLOEXEC
            )
            if ancillary:
                master = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
                self._attached.terminal = clients.Terminal(master, data.partition(b" ")[2])
                self._pipes[master] = "stdout"
                self._poll.register(master, select.POLLIN)
                return True
            if data == b"ping":
                self._control.send(b"ok")
                return True
            self._init = self._attached.init = int(data)
            self._control.send(b"ok")
        except (OSError, ValueError):
            if not self._init:
                self._kill_all()
                return False
        self._poll.unregister(self._control.fileno())
        self._control.close()
        self._control = None
        self._reap()
        return True

    def _kill_all(self) -> None:
        """Kill all descendants until there are none left.

        A process that CRIU holds is killed before CRIU, because it would run without it.
        """
        while True:
            for pid in _below(os.getpid()):
                try:
                    os.kill(pid, signals.SIGKILL)
                except ProcessLookupError:
                    continue  # its parent has reaped it
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
            # The init is not a child of this process, so it has exited unseen.
            if self._init:
                self._ended.setdefault(self._init, 0)

    def _drain_all(self) -> None:
        """Take everything that has been written up to now, but at most what fits in the pipes."""
        for fd in list(self._pipes):
            try:
                waiting = fcntl.fcntl(fd, _F_GETPIPE_SZ)
            except OSError:
                waiting = _TERMINAL
            self._drain(fd, waiting)

    def _drain(self, fd: int, most: int) -> None:
        """Take at most `most` bytes that are in a pipe or terminal now; close it at end of file."""
        stream = self._pipes[fd]
        while most > 0:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            except OSError:  # a terminal that was hung up
                data = b""
            if not data:
                self._over(fd)
                return
            most -= len(data)
            self._log.feed(stream, data)
            self._attached.output(stream, data)

    def _over(self, fd: int) -> None:
        terminal = self._attached.terminal
        if terminal is None or terminal.master != fd:
            self._poll.unregister(fd)
            os.close(fd)
        elif self._init not in self._ended and terminal.keep_open():
            return  # one of its users hung it up (vhangup(2)): another one may come
        else:
            self._poll.unregister(fd)
            terminal.close()
        del self._pipes[fd]

    def _record(self, status: int) -> None:
        name = str(status & 0x7F or "null")
        number = _exit_status(status)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        frozen = "true" if self._attached.frozen else "false"
        text = f'{{"status": {number}, "signal": {name}, "time": "{now}", "frozen": {frozen}}}\n'
        path = os.path.join(self._directory, "exit.json")
        try:
            files.replace(path, text.encode())
        except OSError:
            return  # the container was deleted meanwhile


def _below(pid: int) -> Iterator[int]:
    """Yield the descendants of a process: the youngest child first, and each after its own descendants."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return  # it has exited
    for child in reversed(children):
        yield from _below(child)
        yield child


def _exit_status(status: int) -> int:
    """Return the exit status as a shell shows it: 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def watch(directory: str, control: int, stdout: int, stderr: int) -> NoReturn:
    """Run the monitor of the container in `directory`, with the control socket and the two pipes; never return."""
    for number in _IGNORED:
        signals.signal(number, signals.SIG_IGN)
    signals.pthread_sigmask(signals.SIG_SETMASK, ())
    gc.enable()  # the verb that forked this process runs too briefly to need it
    for fd in (control, stdout, stderr):
        os.set_inheritable(fd, False)
    for fd in (stdout, stderr):
        os.set_blocking(fd, False)
    _Monitor(directory, control, {stdout: "stdout", stderr: "stderr"}).run()
    os._exit(0)


def main(argv: list[str]) -> NoReturn:
    """Run the monitor. argv: directory, the descriptors of the control socket and of the two pipes."""
    control, stdout, stderr = map(int, argv[1:])
    watch(argv[0], control, stdout, stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
