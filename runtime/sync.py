"""The handshake between `create` (or `exec`) and the process it sets up, over a SOCK_SEQPACKET pair.

create                          init
  | <--- {"map": n} ------------- |   only with a new user namespace: write the id maps of process n
  | ---- {} --------------------> |   the maps are written
  | <--- {} --------------------- |   this is the container's init; the message carries its pid (receive_pid)
  | ---- {} --------------------> |   the pid is in the state, hooks of the host have run
  | <--- {"listener": n} -------- |   only with a seccomp filter that notifies: a descriptor of init
  | ---- {} --------------------> |   create has duplicated it and sent it to the seccomp agent
  | <--- {"ready": true} -------- |   everything is set up; init waits for `start`
  |                               |
  | <--- {"error": text} -------- |   at any point instead: why init failed; it then exits

`exec` begins with a {"config": ...} from its starter, because its child side is a fresh interpreter.
"""

from __future__ import annotations

import os
import sys

from runtime.errors import DeadlineExceeded, StartFailed
from runtime.light import json as light_json
from runtime.light import sockets
from runtime.limits import CONNECT_TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

_LIMIT = 1 << 20


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new connection."""
    return sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)


def adopt(fd: int) -> socket.socket:
    """Return a socket object for an inherited descriptor."""
    return sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET, 0, fd)


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send a message with write(2), which any seccomp filter that the sender has just loaded allows."""
    os.write(sock.fileno(), light_json.dumps(message).encode())


def tell(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send a message from the starter; if the other side has exited, let the next `receive` report its error."""
    try:
        send(sock, message)
    except (BrokenPipeError, ConnectionResetError):
        pass


def receive(sock: socket.socket, timeout: float, what: str) -> dict[str, Any]:
    """Return the next message. Raises StartFailed with the other side's error or if it has exited, DeadlineExceeded."""
    message = _next(sock, timeout, f"{what} was not ready")
    if message is None:
        raise StartFailed(f"{what} exited while it was being set up")
    return message


def ask_for_pids(sock: socket.socket) -> None:
    """Have the kernel attach the sender's pid to every message, for `receive_pid`."""
    sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)


def receive_pid(sock: socket.socket, timeout: float, what: str) -> int:
    """Return the pid, in this pid namespace, of the next message's sender. Raises as `receive` does."""
    sock.settimeout(timeout)
    try:
        data, ancillary, _, _ = sock.recvmsg(_LIMIT, sockets.CMSG_SPACE(12))
    except TimeoutError:
        raise DeadlineExceeded(f"{what} was not ready within {timeout:g} s") from None
    except OSError:
        data, ancillary = b"", []  # reset: as good as closed
    finally:
        sock.settimeout(None)
    message = light_json.loads(data) if data else {"error": f"{what} exited while it was being set up"}
    if "error" in message or not ancillary:
        raise StartFailed(message.get("error", f"{what} sent a message without its pid"))
    return int.from_bytes(ancillary[0][2][:4], sys.byteorder)


def await_end(sock: socket.socket, timeout: float, what: str) -> None:
    """Wait until the other side's exec has closed its end.

    Raises StartFailed with the other side's error, DeadlineExceeded.
    """
    _next(sock, timeout, f"{what} did not execute its program")


def _next(sock: socket.socket, timeout: float, late: str) -> dict[str, Any] | None:
    """Return the next message, None if the other side has closed its end; `late` words the missed deadline."""
    sock.settimeout(timeout)
    try:
        data = sock.recv(_LIMIT)
    except TimeoutError:
        raise DeadlineExceeded(f"{late} within {timeout:g} s") from None
    except OSError:
        data = b""  # reset: as good as closed
    finally:
        sock.settimeout(None)
    if not data:
        return None
    message: dict[str, Any] = light_json.loads(data)
    if "error" in message:
        raise StartFailed(message["error"])
    return message


def send_fd(path: str, fd: int, data: bytes) -> None:
    """Connect to the Unix stream socket at `path` and send a descriptor with `data`. Raises OSError."""
    sock = connect(path)
    try:
        pass_fd(sock, fd, data)
    finally:
        sock.close()


def connect(path: str) -> socket.socket:
    """Connect to the Unix stream socket at `path`. Raises OSError."""
    sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
    try:
        sock.settimeout(CONNECT_TIMEOUT)
        sock.connect(path)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def pass_fd(sock: socket.socket, fd: int, data: bytes) -> None:
    """Send a descriptor over a connection."""
    sock.sendmsg([data], [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))])
