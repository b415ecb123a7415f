"""Name, open and enter namespaces."""

from __future__ import annotations

import os
import sys

from runtime.errors import StartFailed
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

FLAGS = {
    "mount": syscalls.CLONE_NEWNS,
    "uts": syscalls.CLONE_NEWUTS,
    "ipc": syscalls.CLONE_NEWIPC,
    "network": syscalls.CLONE_NEWNET,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "user": syscalls.CLONE_NEWUSER,
    "time": syscalls.CLONE_NEWTIME,
    "pid": syscalls.CLONE_NEWPID,
}
# The names under /proc/PID/ns.
FILES = {
    "mount": "mnt", "uts": "uts", "ipc": "ipc", "network": "net", "cgroup": "cgroup", "user": "user", "time": "time",
    "pid": "pid",
}  # fmt: skip

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def paths(pid: int) -> dict[str, str]:
    """Return the file of each namespace of a process, by type."""
    return {kind: f"/proc/{pid}/ns/{name}" for kind, name in FILES.items()}


def open_path(kind: str, path: str) -> int:
    """Return a descriptor of the namespace to join. Raises StartFailed."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(f"linux.namespaces ({kind}): {path}: {error.strerror}") from None


def bring_up(interface: str) -> None:
    """Set an interface of this network namespace up (netdevice(7))."""
    import fcntl

    from runtime.light import sockets

    sock = sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM | sockets.SOCK_CLOEXEC)
    try:
        # struct ifreq: a name of 16 bytes, then the flags, a short, in a union of 24 bytes
        request = interface.encode().ljust(40, b"\0")
        flags = int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, request)[16:18], sys.byteorder) | _IFF_UP
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, request[:16] + flags.to_bytes(2, sys.byteorder) + bytes(22))
    finally:
        sock.close()


def inside_netns(netns: int, action: Callable[[], T]) -> T:
    """Call `action` in this thread, in the network namespace of a descriptor; return its result."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(netns, syscalls.CLONE_NEWNET)
        try:
            return action()
        finally:
            syscalls.setns(before, syscalls.CLONE_NEWNET)
    finally:
        os.close(before)


def new_netns() -> int:
    """Return a descriptor of a new network namespace with loopback up; return to the present one.

    The process must not have other threads.
    """
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            bring_up("lo")
            return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            syscalls.setns(before, syscalls.CLONE_NEWNET)
    finally:
        os.close(before)
