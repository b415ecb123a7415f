"""Check that the ports of a container without its own network, such as one in the host's, are free at the target.

The target's agent asks its kernel by binding an equal socket for a moment, because the kernel knows about wildcard
addresses, IPv6 sockets that take IPv4 as well, and sockets that share a port. Nothing can connect meanwhile.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from migrate.wire.protocol import CheckPorts
from migrate.wire.questions import PROTOCOLS, Bound
from migrate.wire.replies import PortProblem, PortsChecked
from runtime.linux.namespaces import inside_netns
from runtime.network import sockdiag

IP_FREEBIND = 15  # linux/in.h
_WILDCARDS = ("0.0.0.0", "::")


def answer(call: CheckPorts) -> PortsChecked:
    """Answer CheckPorts at the target. Another check reports a namespace that does not exist."""
    try:
        fd = os.open(call.netns or "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return PortsChecked([])
    try:
        return PortsChecked(inside_netns(fd, lambda: list(_problems(call.ports))))
    except OSError:
        return PortsChecked([])  # it is not a network namespace
    finally:
        os.close(fd)


def _problems(ports: list[Bound]) -> Iterator[PortProblem]:
    for one in ports:
        if text := _problem(one):
            yield PortProblem(str(one), text)


def _problem(wanted: Bound) -> str:
    """Return why the port cannot be bound in this thread's network namespace, "" if it can."""
    kind = socket.SOCK_STREAM if wanted.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(wanted.family, kind, PROTOCOLS[wanted.protocol]) as sock:
            _try(sock, wanted)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = next(_holders(wanted), "")
            return f"is in use there{f' by {holder}' if holder else ''}"
        if error.errno == errno.EADDRNOTAVAIL:
            return "cannot be bound there: the host does not have this address"
        if error.errno == errno.ENODEV:
            return f"cannot be bound there: the host does not have the interface {wanted.device}"
        return f"cannot be bound there: {error.strerror}"
    return ""


def _try(sock: socket.socket, wanted: Bound) -> None:
    # CRIU sets SO_REUSEADDR for TCP too, because of connections in TIME_WAIT. For UDP it would take a port from a
    # process that is ready to share it, though the container is not.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, wanted.protocol == "tcp" or wanted.reuse_address)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, wanted.reuse_port)
    if wanted.free:
        sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    scope = 0
    if wanted.device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wanted.device.encode())
        scope = socket.if_nametoindex(wanted.device)
    if wanted.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wanted.only_v6)
        sock.bind((wanted.address, wanted.port, 0, scope if wanted.address.startswith("fe80:") else 0))
    else:
        sock.bind((wanted.address, wanted.port))


def _holders(wanted: Bound) -> Iterator[str]:
    """Yield the processes whose socket in this thread's network namespace is in the way."""
    address = wanted.address.removeprefix("::ffff:")
    inodes = set()
    with contextlib.suppress(OSError), sockdiag.diag("thread-self") as diag:
        for entry in diag.inet(PROTOCOLS[wanted.protocol]):
            theirs = entry.local[0].removeprefix("::ffff:")
            if entry.local[1] == wanted.port and (theirs == address or {theirs, address} & set(_WILDCARDS)):
                inodes.add(f"socket:[{entry.inode}]")
    for pid in sorted(filter(str.isdigit, os.listdir("/proc")), key=int) if inodes else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(entry.path) in inodes for entry in os.scandir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", errors="replace") as file:
                    yield f"process {pid} ({file.read().strip()})"
