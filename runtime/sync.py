"""The handshake between `create` (or `exec`) and the process it sets up, over a SOCK_SEQPACKET pair.

create                          init
  | ---- {"config": ...} -------> |   what to become
  | <--- {"pid": n} ------------- |   the container's init, as create sees it
  | ---- {} --------------------> |   the monitor knows it, hooks of the host have run
  | <--- {"ready": true} -------- |   everything is set up; it waits for `start`
  |                               |
  | <--- {"error": text} -------- |   at any point instead: why it cannot go on; it ends then
"""

import json
import socket
from typing import Any

from runtime.errors import DeadlineExceeded, StartFailed

_LIMIT = 1 << 20


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.send(json.dumps(message).encode())


def receive(sock: socket.socket, timeout: float, what: str) -> dict[str, Any]:
    """The next message. Raises StartFailed with the other side's own words, or when it is gone; DeadlineExceeded."""
    sock.settimeout(timeout)
    try:
        data = sock.recv(_LIMIT)
    except TimeoutError:
        raise DeadlineExceeded(f"{what} did not get ready within {timeout:g} s") from None
    except OSError:
        data = b""
    if not data:
        raise StartFailed(f"{what} ended while it was being set up")
    message: dict[str, Any] = json.loads(data)
    if "error" in message:
        raise StartFailed(message["error"])
    return message
