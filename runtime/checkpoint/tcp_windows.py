"""Restore the send window of TCP connections whose peer has closed its half, which CRIU gets wrong.

CRIU ends such a connection with a FIN that it makes itself (soccr.c, send_fin). The window in it is the low 16 bits of
the local receive window, which often are 0, and the kernel takes it for the peer's. When a socket leaves repair mode
the kernel asks the peer for its window, but only on established connections (net/ipv4/tcp.c, tcp_repair_set); on these
data waits for the zero window probe, 3 s. So the windows are noted while the container is frozen, and set again before
it runs: at both times CRIU has the sockets in repair mode, which TCP_REPAIR_WINDOW requires.
"""

from __future__ import annotations

import os
import re
import sys

from runtime.errors import ContainerError
from runtime.light import sockets
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SOL_TCP, _TCP_REPAIR_WINDOW = 6, 29
_FIELDS = {"process", "fd", "window"}
_WORDS = 5  # of struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
_SENT = 3  # the first three are the peer's
_MOST = 1_000_000
# Lines of /proc/net/tcp of connections in CLOSE_WAIT, LAST_ACK and CLOSING; the group is the inode.
_HALF_CLOSED = re.compile(rb"^ *\d+: \S+ \S+ 0[89B] \S+ \S+ \S+ +\d+ +\d+ (\d+) ", re.MULTILINE)


def save(pids: dict[int, int], images: int) -> list[dict[str, Any]]:
    """Return the windows of such connections of these processes (ids here -> inside); `images` is the directory."""
    if not any(name.startswith("tcp-stream-") for name in os.listdir(images)):
        return []
    left: set[str] = set()
    for pid in {_namespace(pid): pid for pid in pids}.values():
        for name in ("tcp", "tcp6"):
            try:
                with open(f"/proc/{pid}/net/{name}", "rb") as file:
                    left.update(f"socket:[{inode.decode()}]" for inode in _HALF_CLOSED.findall(file.read()))
            except OSError:
                continue  # a zombie, or a kernel without IPv6
    found: list[dict[str, Any]] = []
    for pid, inside in pids.items() if left else ():
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # a zombie
        for number in numbers:
            try:
                link = os.readlink(f"/proc/{pid}/fd/{number}")
                if link in left:
                    window = _window(pid, int(number))
                    found.append({"process": inside, "fd": int(number), "window": window[:_SENT]})
                    left.remove(link)
            except OSError:
                continue  # not in repair mode: connections are not carried
    return found


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""  # a zombie


def _window(pid: int, number: int) -> list[int]:
    sock = _socket(pid, number)
    try:
        return _get(sock)
    finally:
        sock.close()


def _socket(pid: int, number: int) -> sockets.socket:
    fd = syscalls.duplicate(pid, number)
    try:
        return sockets.socket(fileno=fd)
    except BaseException:
        os.close(fd)
        raise


def _get(sock: sockets.socket) -> list[int]:
    data = sock.getsockopt(_SOL_TCP, _TCP_REPAIR_WINDOW, 4 * _WORDS)
    return [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, 4 * _WORDS, 4)]


def check(noted: list[Any]) -> None:
    """Raise ContainerError unless `save` could have made this list."""
    for entry in noted[:_MOST]:
        if not isinstance(entry, dict) or set(entry) != _FIELDS or not isinstance(entry["window"], list):
            raise ContainerError("windows: an entry is malformed")
        numbers = [entry["process"], entry["fd"], *entry["window"]]
        if len(entry["window"]) != _SENT or not all(type(n) is int and 0 <= n < 1 << 32 for n in numbers):
            raise ContainerError("windows: an entry holds a value that is not a number from 0 to 2^32 - 1")
    if len(noted) > _MOST:
        raise ContainerError(f"windows: more than {_MOST}")


def restore(noted: list[dict[str, Any]], outside: dict[int, int]) -> None:
    """Set the windows in a restored tree that does not run yet; `outside` maps ids inside to ids here.

    A connection that CRIU was told not to restore is not in repair mode, and does not change.
    """
    for entry in noted:
        try:
            sock = _socket(outside[entry["process"]], entry["fd"])
            try:
                window = [*entry["window"], *_get(sock)[_SENT:]]
                data = b"".join(number.to_bytes(4, sys.byteorder) for number in window)
                sock.setsockopt(_SOL_TCP, _TCP_REPAIR_WINDOW, data)
            finally:
                sock.close()
        except (OSError, KeyError):
            continue  # data is then late, as without this module, but not lost
