"""The monitor's side of `attach`: the attached clients and the container's terminal. The other side is attach.py.

The container's directory has a SOCK_SEQPACKET socket `attach`, 0600. A packet is one message; its first byte is the
type:

    client                          monitor
      | ---- a ----------------------> |   attach
      | <--- T ROWS-COLUMNS (8) ------ |   the container has a terminal of this size (struct winsize); N: it has none
      | <--- o DATA, e DATA ---------- |   the terminal's last output; from then on all output to stdout and stderr
      | ---- i DATA -----------------> |   typed input
      | ---- s ROWS-COLUMNS (8) -----> |   set the terminal's size
      | <--- x STATUS ---------------- |   the container has exited
      | <--- m HOST ------------------ |   it has moved to another host

and for the process that has frozen the container (freeze/monitor_hold.py):

      | ---- h ----------------------> |   hold: log all output, take back unread input, pass on no further input
      | <--- i DATA, o DATA, h ------- |   the unread input; the last output, if there is a terminal
      | ---- m HOST -----------------> |   the exit that follows is a move
      | ---- r, or end of file ------> |   release: the container resumes
      | <--- r ----------------------- |

A client cannot block the container: one that reads too slowly is dropped (and may connect again), and its input waits
in its socket while the terminal is full.
"""

from __future__ import annotations

import os
import select

from runtime.light import sockets
from runtime.linux import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

NAME = "attach"
PACKET = 4096  # bytes of typed input
_CONNECTIONS = 32
_WATCHING = 16  # of the connections
_TYPED = 64 << 10  # bytes of input, kept for a full terminal
_BEHIND = 1 << 20  # bytes of output, kept by the kernel for each client
RECENT = 16 << 10  # bytes of a terminal's last output that a new client is shown
_TIOCGWINSZ, _TIOCSWINSZ, TIOCGPTPEER = 0x5413, 0x5414, 0x5441
_SO_SNDBUFFORCE = 32


class Terminal:
    """The container's terminal: its master and size, pending input, and last output."""

    def __init__(self, master: int, recent: bytes) -> None:
        os.set_blocking(master, False)
        self.master = master
        self.recent = recent
        self.pending = b""
        self._slave = -1
        self.keep_open()

    def keep_open(self) -> bool:
        """Hold the slave open too, so that a terminal without users stays up. Return False if it was hung up."""
        import fcntl

        self.close_slave()
        try:
            self._slave = fcntl.ioctl(self.master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def close_slave(self) -> None:
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1

    def close(self) -> None:
        self.close_slave()
        os.close(self.master)
        self.master = -1

    def size(self) -> bytes:
        """Return struct winsize; zeros once the terminal is closed."""
        return self._control(_TIOCGWINSZ, bytes(8))

    def resize(self, size: bytes) -> None:
        if len(size) == 8:
            self._control(_TIOCSWINSZ, size)

    def _control(self, request: int, argument: bytes) -> bytes:
        import fcntl

        try:
            return fcntl.ioctl(self.master, request, argument)
        except (OSError, ValueError):  # closed: the descriptor is -1
            return argument

    def push(self) -> None:
        """Write pending input to the terminal, as far as it has room."""
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.master, self.pending) :]
        except BlockingIOError:
            pass
        except OSError:
            self.pending = b""  # hung up: no process will read it

    def take(self) -> bytes:
        """Return the input that the container's processes, which are frozen, have not read; it is removed."""
        from runtime.monitor import typeahead

        pending, self.pending = self.pending, b""
        try:
            return typeahead.take(self._slave) + pending
        except Exception:  # the terminal was hung up
            return pending

    def put(self, typed: bytes) -> None:
        """Put back the input that `take` returned."""
        from runtime.monitor import typeahead

        try:
            typeahead.put(self.master, self._slave, typed)
        except Exception:  # the terminal was hung up: no process reads the input
            return


class Attached:
    """All connections of clients. `drain` logs everything that the container has written up to now."""

    def __init__(self, directory: str, poll: select.poll, drain: Callable[[], None]) -> None:
        self._poll, self._drain = poll, drain
        self.terminal: Terminal | None = None
        self._clients: dict[int, socket.socket] = {}
        self._watching: set[int] = set()
        self._typing: set[int] = set()
        self._holder = -1
        self.init = 0
        self._ended_frozen = False
        self._taken = b""
        self._target = b""
        self._listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET | sockets.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        place = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._listener.bind(f"/proc/self/fd/{place}/{NAME}")  # the directory's own path may be too long
            self._listener.listen(_CONNECTIONS)
            poll.register(self._listener.fileno(), select.POLLIN)
        except OSError:
            self._listener.close()  # then no client can attach
        finally:
            os.umask(before)
            os.close(place)

    def output(self, stream: str, data: bytes) -> None:
        """Send output to all attached clients, and keep the last of it for new ones."""
        if self.terminal is not None:
            self.terminal.recent = (self.terminal.recent + data)[-RECENT:]
        for fd in list(self._watching):
            self._send(fd, (b"e" if stream == "stderr" else b"o") + data)

    def ended(self, status: int) -> None:
        """Tell all clients that the container has exited or moved, and drop them."""
        for fd in list(self._watching):
            self._send(fd, b"m" + self._target if self._target else b"x%d" % status)
        for fd in list(self._clients):
            self._drop(fd)

    def ready(self, fd: int) -> None:
        """Handle a descriptor that is ready: accept a client, or take its packet."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client = self._clients.get(fd)
        if client is None:
            return
        try:
            packet = client.recv(PACKET + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet:
            self._packet(fd, packet[:1], packet[1:])
        else:
            self._drop(fd)

    def push(self) -> None:
        """Write pending input to the terminal; take more from clients once all of it is written."""
        if self.terminal is None:
            return
        if self._holder < 0:
            self.terminal.push()
        self._listen()

    def _listen(self) -> None:
        """Poll typing clients, but not while the terminal is full or held."""
        assert self.terminal is not None
        full = bool(self.terminal.pending)
        for fd in self._typing:
            self._poll.modify(fd, 0 if full or self._holder >= 0 else select.POLLIN)
        if self.terminal.master >= 0:  # -1: it was hung up
            self._poll.modify(self.terminal.master, select.POLLIN | (select.POLLOUT if full else 0))

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        client = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET, 0, fd)
        if len(self._clients) >= _CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        try:
            client.setsockopt(sockets.SOL_SOCKET, _SO_SNDBUFFORCE, _BEHIND)
        except OSError:
            pass  # not root: keep the default size
        self._clients[fd] = client
        self._poll.register(fd, select.POLLIN)

    def _welcome(self, fd: int) -> None:
        if len(self._watching) >= _WATCHING:
            self._drop(fd)
            return
        self._watching.add(fd)
        terminal = self.terminal
        if self._send(fd, b"N" if terminal is None else b"T" + terminal.size()) and terminal and terminal.recent:
            self._send(fd, b"o" + terminal.recent)

    def _packet(self, fd: int, kind: bytes, data: bytes) -> None:
        terminal = self.terminal
        if kind == b"h" and self._holder < 0:
            self._hold(fd)
        elif kind == b"a":
            self._welcome(fd)
        elif fd == self._holder:
            if kind == b"m":
                self._target = data
            elif kind == b"r":
                self._target = b""
                self._release()
                self._send(fd, b"r")
        elif terminal is not None and kind == b"i":
            self._typing.add(fd)
            if len(terminal.pending) < _TYPED:  # packets of clients that have left arrive even while it is full
                terminal.pending += data
            self.push()
        elif terminal is not None and kind == b"s":
            terminal.resize(data)

    def _hold(self, fd: int) -> None:
        self._holder = fd
        self._drain()
        if self.terminal is not None:
            self._taken = self.terminal.take()
            self._listen()
            for start in range(0, len(self._taken), RECENT):
                self._send(fd, b"i" + self._taken[start : start + RECENT])
            self._send(fd, b"o" + self.terminal.recent)
        self._send(fd, b"h")

    @property
    def frozen(self) -> bool:
        """Whether the container is held frozen, or was killed by the client that held it."""
        return self._ended_frozen or self._holder >= 0

    def _release(self) -> None:
        """Put the taken input back in order, because the container was not moved."""
        self._holder = -1
        taken, self._taken = self._taken, b""
        if self.terminal is not None:
            self.terminal.put(taken)
            self.push()

    def _send(self, fd: int, packet: bytes) -> bool:
        """Send a packet to a client; drop the client and return False if it cannot take the packet."""
        try:
            self._clients[fd].send(packet)
        except KeyError:
            return False
        except OSError:
            self._drop(fd)
            return False
        return True

    def _drop(self, fd: int) -> None:
        client = self._clients.pop(fd, None)
        if client is None:
            return
        self._typing.discard(fd)
        self._watching.discard(fd)
        self._poll.unregister(fd)
        client.close()
        if fd == self._holder:
            self._ended_frozen = processes.is_dying(self.init)
            self._release()
