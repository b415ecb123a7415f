"""`attach`: connect this terminal with that of a detached container; the monitor's side is monitor/clients.py."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import struct
import termios
import time

from criu_rpc.errors import Error
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, NotFound
from runtime.limits import ATTACH_TIMEOUT
from runtime.linux.descriptors import read_some, write_all
from runtime.monitor import terminal
from runtime.monitor.clients import NAME, PACKET
from runtime.state.kept_config import load_kept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.record import State
    from runtime.state.store import Store

_STEP = 0.01
_REDRAW = 0.05  # seconds of another size, which make full-screen programs redraw
# Queries of a terminal; removed from output that is shown a second time, because no program waits for the answers.
_QUERY = re.compile(rb"\x1b\[[0-9;?>=]*[cn]|\x1b\][0-9;]*\?(?:\x07|\x1b\\)|\x1bP[^\x1b]*\x1b\\|\x1bZ")


class Ended(Exception):
    """The end of an attachment: `kind` is ended, detached or moved."""

    def __init__(self, kind: str, status: int = 0, host: str = "") -> None:
        super().__init__(kind)
        self.kind, self.status, self.host = kind, status, host


class DetachKeys:
    """A search for the detach keys in typed input; they may arrive in pieces."""

    def __init__(self, keys: bytes) -> None:
        self._keys, self._seen = keys, 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return the part of `data` to pass on, and whether the keys were typed."""
        out = bytearray()
        for byte in data:
            if self._keys and byte == self._keys[self._seen]:
                self._seen += 1
                if self._seen == len(self._keys):
                    return bytes(out), True
                continue
            out += self._keys[: self._seen]
            self._seen = 0
            if self._keys and byte == self._keys[0]:
                self._seen = 1
            else:
                out.append(byte)
        return bytes(out), False


def connect(state: State) -> socket.socket:
    """Connect to the container's monitor. Raises NotFound, Conflict if there is no monitor, DeadlineExceeded."""
    try:
        place = os.open(state.directory, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound.of(state.id) from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(ATTACH_TIMEOUT)
        deadline = time.monotonic() + ATTACH_TIMEOUT
        while True:
            try:
                sock.connect(f"/proc/self/fd/{place}/{NAME}")
                return sock
            except BlockingIOError:  # too many clients are waiting; connect(2) does not wait in that case
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(_STEP)
    except TimeoutError:
        sock.close()
        raise DeadlineExceeded(f"container {state.id}: its monitor does not answer") from None
    except OSError:
        sock.close()
        raise Conflict(
            f"container {state.id} cannot be attached to: it was started without a monitor",
            remedy="its engine, such as podman, holds its streams; `pymigrate exec` runs a program in it",
        ) from None
    finally:
        os.close(place)


def receive(sock: socket.socket) -> bytes:
    """Return the next packet, b"" at the end.

    A reset is reported when the monitor closes with unread packets; those that it has sent are still received.
    """
    try:
        return sock.recv(1 << 17)
    except ConnectionResetError:
        try:
            return sock.recv(1 << 17)
        except OSError:
            return b""


def attach(store: Store, container_id: str, keys: bytes, *, stdin: bool) -> Ended:
    """Connect the standard streams with a container until it exits, it is moved, or the detach keys are typed.

    If the container has a terminal, make this one raw and keep both at one size. Raises NotFound, Conflict,
    DeadlineExceeded.
    """
    state = _load(store, container_id)
    try:
        sock, hello = _open(state)
    except Error:
        _load(store, container_id)  # the cause may be that the container has exited meanwhile
        raise
    stdin = stdin and hello[:1] == b"T"
    try:
        with terminal.Raw(0 if stdin else -1):
            while True:
                _Session(sock, DetachKeys(keys), stdin=stdin).run(hello)
                sock.close()
                # The monitor has dropped this client for being too slow. It shows its last output again.
                sock, hello = _open(store.load(container_id))
    except Ended as ended:
        return ended
    finally:
        sock.close()


def _load(store: Store, container_id: str) -> State:
    """Return the state of a container. Raises Conflict if its status does not allow attaching."""
    state = store.load(container_id)
    state.status.require(container_id, "attach to")
    return state


def _open(state: State) -> tuple[socket.socket, bytes]:
    sock = connect(state)
    try:
        try:
            sock.send(b"a")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has just exited; then nothing is received either
        hello = receive(sock)
        if not hello:
            raise ContainerError(f"container {state.id}: its monitor has too many clients, or it has exited")
        if hello[:1] == b"N" and load_kept(state).process.terminal:
            raise Conflict(f"container {state.id} cannot be attached to: its terminal went to a --console-socket")
        return sock, hello
    except TimeoutError:
        sock.close()
        raise DeadlineExceeded(f"container {state.id}: its monitor does not answer") from None
    except BaseException:
        sock.close()
        raise


class _Session:
    """One connection to the monitor."""

    def __init__(self, sock: socket.socket, keys: DetachKeys, *, stdin: bool) -> None:
        self._sock, self._keys, self._stdin = sock, keys, stdin
        sock.setblocking(False)

    def run(self, hello: bytes) -> None:
        """Copy both ways. Return when the monitor has dropped this client. Raises Ended."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        stdin, pending, first = self._stdin, b"", hello[:1] == b"T"
        if first:
            self._follow_size(hello[1:])
        while True:
            if stdin and not pending:
                poll.register(0, select.POLLIN)
            poll.modify(self._sock, select.POLLIN | (select.POLLOUT if pending else 0))
            for fd, event in poll.poll():
                if fd == 0:
                    poll.unregister(0)
                    data = _read(0)
                    stdin = bool(data)
                    pending, over = self._keys.feed(data)
                    if over:
                        raise Ended("detached")
                    continue
                if event & select.POLLOUT and pending and self._send(b"i" + pending):
                    pending = b""
                if event & ~select.POLLOUT:
                    try:
                        packet = receive(self._sock)
                    except BlockingIOError:
                        continue
                    if not packet:
                        return
                    self._show(packet, again=first)
                    first = False

    def _show(self, packet: bytes, *, again: bool) -> None:
        kind, data = packet[:1], packet[1:]
        if kind == b"x":
            raise Ended("ended", int(data))
        if kind == b"m":
            raise Ended("moved", host=data.decode(errors="replace"))
        write_all(2 if kind == b"e" else 1, _QUERY.sub(b"", data) if again else data)

    def _send(self, packet: bytes) -> bool:
        try:
            self._sock.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the next receive reports it
        return True

    def _follow_size(self, size: bytes) -> None:
        """Give the container's terminal, which has `size`, this terminal's size, now and whenever that changes."""
        if not os.isatty(0):
            return

        def copy(*_: object) -> None:
            own = _size()
            if any(own):
                self._send(b"s" + own)

        own = _size()
        if own == size and any(own):
            rows, *others = struct.unpack("HHHH", own)
            self._send(b"s" + struct.pack("HHHH", max(rows - 1, 1), *others))
            time.sleep(_REDRAW)
        copy()
        signal.signal(signal.SIGWINCH, copy)


def _size() -> bytes:
    return fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))


def _read(fd: int) -> bytes:
    try:
        return read_some(fd, PACKET)
    except OSError:
        return b""  # stdin is closed, or the terminal was hung up
