"""Survey the sockets of a container: which would not survive a dump and a restore, and which are connections.

Each descriptor is examined through a duplicate (pidfd_getfd(2)), as CRIU does, so the kernel answers for the socket
itself: its namespace, the contents of its queues. criu/sk-*.c (4.2) has what CRIU rejects. What it silently carries
only in part (multicast groups, MD5 keys, connections without a descriptor) is found here as well.
"""

import array
import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from migrate.preflight.ports import IP_FREEBIND
from migrate.preflight.rules import Blocker
from migrate.wire.questions import PROTOCOLS, Bound, endpoint
from runtime.linux import processes, syscalls
from runtime.network import sockdiag

_SO_PASSSEC, _SO_TIMESTAMPS, _SO_PASSPIDFD = 34, (29, 35, 37, 63, 64, 65), 76
_SIOCGSKNS, _SIOCINQ = 0x894C, 0x541B
_UDP_CORK, _TCP_ULP, _TCP_AO_INFO, _MCAST_MSFILTER = 1, 31, 40, 48
_NETLINK_LIST_MEMBERSHIPS, _SOL_NETLINK = 9, 270
_LISTEN, _ESTABLISHED, _SYN_SENT, _SYN_RECV = 10, 1, 2, 3
_CONNECTED = (_ESTABLISHED, 4, 5, 8, 9, 11)  # and FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_DELIVERING = (4, 9, 11)  # FIN_WAIT1, LAST_ACK, CLOSING: data, or at least the FIN, are not acknowledged yet
_PROTOCOLS = {0: "IP", 1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 136: "UDP-Lite"}
_INET = (socket.AF_INET, socket.AF_INET6)
_CARRIED = (*_INET, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET)
# Groups that an interface is a member of by itself.
_OWN_GROUPS = ("224.0.0.1", "ff02::1", "ff01::1")

# Rules that may pass by themselves within a moment.
PASSING = frozenset({"tcp-backlog", "tcp-connecting", "tcp-closing", "unix-backlog", "unix-message", "netlink"})


@dataclass(frozen=True)
class Connection:
    """An established TCP connection: `local` and `remote` are (address, port); `held_by` names process and descriptor.

    `inside`: both ends belong to the container."""

    local: tuple[str, int]
    remote: tuple[str, int]
    held_by: str
    inside: bool

    def __str__(self) -> str:
        return f"tcp {endpoint(self.local)} -> {endpoint(self.remote)}"


@dataclass(frozen=True)
class Listening:
    """A bound socket that others reach by its port; `protocol` is tcp or udp."""

    protocol: str
    local: tuple[str, int]
    held_by: str

    def __str__(self) -> str:
        return f"{self.protocol} {endpoint(self.local)}"


@dataclass(frozen=True)
class Survey:
    """The blockers about a container's sockets, its connections and its bound ports."""

    blockers: list[Blocker]
    connections: list[Connection]
    listening: list[Listening]


def survey(init_pid: int) -> Survey:
    """Survey the sockets of all processes in the pid namespace of `init_pid`."""
    with sockdiag.diag(init_pid) as diag:
        look = _Look(init_pid, diag)
        try:
            return look.survey()
        finally:
            look.close()


def bound(init_pid: int) -> list[Bound]:
    """Return the ports that the container has in the network of its init, without those of connections."""
    with sockdiag.diag(init_pid) as diag:
        look = _Look(init_pid, diag)
        try:
            return list(dict.fromkeys(look.bound()))
        finally:
            look.close()


def settled(init_pid: int, patience: float, allow: frozenset[str] = frozenset()) -> Survey:
    """Return the first survey without passing blockers other than those in `allow`; after `patience` seconds, the
    last one."""
    deadline = time.monotonic() + patience
    while True:
        found = survey(init_pid)
        if not passing(found, allow) or time.monotonic() >= deadline:
            return found
        time.sleep(0.01)


def passing(found: Survey, allow: frozenset[str]) -> list[Blocker]:
    """Return the blockers that usually pass by themselves, without those in `allow`."""
    return [blocker for blocker in found.blockers if blocker.rule in PASSING - allow]


class _Look:
    def __init__(self, init_pid: int, diag: sockdiag.Diag) -> None:
        self._pid = init_pid
        self._tcp = list(diag.tcp())
        self._unix = diag.unix()
        self._held: dict[int, tuple[str, int]] = {}  # inode -> process and descriptor in words, a duplicate
        self._namespaces: set[int] = set()
        for pid in processes.container_pids(init_pid):
            with contextlib.suppress(OSError):
                self._namespaces.add(os.stat(f"/proc/{pid}/ns/net").st_ino)
                self._collect(pid)
        self._waiting = {icon for held in self._held if held in self._unix for icon in self._unix[held].waiting}

    def _collect(self, pid: int) -> None:
        with open(f"/proc/{pid}/comm") as file:
            name = file.read().strip()
        pidfd = os.pidfd_open(pid)
        try:
            for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
                with contextlib.suppress(OSError):
                    info = os.stat(f"/proc/{pid}/fd/{number}")
                    if stat.S_ISSOCK(info.st_mode) and info.st_ino not in self._held:
                        where = f"process {pid} ({name}), descriptor {number}"
                        duplicate = syscalls.pidfd_getfd(pidfd, number)
                        if os.fstat(duplicate).st_ino == info.st_ino:
                            self._held[info.st_ino] = (where, duplicate)
                        else:
                            os.close(duplicate)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        for _, fd in self._held.values():
            os.close(fd)

    def survey(self) -> Survey:
        blockers: list[Blocker] = []
        for inode, (where, fd) in self._held.items():
            with contextlib.suppress(OSError), _adopt(os.dup(fd)) as sock:
                blockers += self._check(inode, where, sock)
        blockers += self._unheld()
        connections, listening = [], []
        ends = {(entry.local, entry.remote) for entry in self._tcp if entry.inode in self._held}
        for entry in self._tcp:
            if entry.inode not in self._held:
                continue
            where = self._held[entry.inode][0]
            if entry.state in _CONNECTED:
                inside = (entry.remote, entry.local) in ends
                connections.append(Connection(entry.local, entry.remote, where, inside))
            elif entry.state == _LISTEN:
                listening.append(Listening("tcp", entry.local, where))
        listening += self._datagrams()
        return Survey(blockers, connections, listening)

    def _check(self, inode: int, where: str, sock: socket.socket) -> Iterator[Blocker]:
        family, kind, protocol = sock.family, sock.type, sock.proto
        if family not in _CARRIED:
            yield Blocker("socket-kind", where, f"is a socket of family {_family(family)}, which CRIU cannot carry")
            return
        if family in _INET and kind != socket.SOCK_RAW and protocol not in _PROTOCOLS:
            name = {262: "Multipath TCP", 132: "SCTP", 33: "DCCP"}.get(protocol, f"protocol {protocol}")
            yield Blocker("socket-kind", where, f"is a socket of {name}, which CRIU cannot carry")
            return
        if self._namespace(sock) not in self._namespaces:
            text = "belongs to a network namespace outside the container: it was passed in from there"
            yield Blocker("socket-namespace", where, f"{_describe(sock)} {text}")
            return
        if syscalls.has_hidden_filter(sock.fileno()):
            yield Blocker("socket-filter", where, f"{_describe(sock)} has an eBPF program attached")
        if family == socket.AF_UNIX:
            yield from self._check_unix(inode, where, sock)
        elif family == socket.AF_NETLINK:
            yield from _check_netlink(where, sock)
        elif family in _INET and kind == socket.SOCK_STREAM:
            yield from self._check_tcp(inode, where, sock)
        elif family in _INET and kind == socket.SOCK_DGRAM:
            if protocol in (17, 136) and sock.getsockopt(socket.IPPROTO_UDP, _UDP_CORK):
                yield Blocker("udp-cork", where, f"{_describe(sock)} is corked (UDP_CORK)")
            yield from self._multicast(where, sock)

    def _namespace(self, sock: socket.socket) -> int:
        """Return the inode of the network namespace that a socket belongs to."""
        fd = fcntl.ioctl(sock.fileno(), _SIOCGSKNS)
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    def _check_tcp(self, inode: int, where: str, sock: socket.socket) -> Iterator[Blocker]:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        state = info[0]
        what = _describe(sock)
        if state == _LISTEN:
            waiting = struct.unpack_from("=I", info, 24)[0]  # tcpi_unacked: of a listening socket, its backlog
            if waiting:
                yield Blocker("tcp-backlog", where, f"{what} has {_count(waiting, 'connection')} not accepted yet")
        options = set[str]()
        for entry in self._tcp:
            if entry.inode == inode:
                options |= entry.options
                if state in (_SYN_SENT, _SYN_RECV):
                    yield Blocker("tcp-connecting", where, f"{_connection(entry)} is not connected yet")
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).strip(b"\0"):
                options.add("an upper layer (TCP_ULP)")
        with contextlib.suppress(OSError):
            sock.getsockopt(socket.IPPROTO_TCP, _TCP_AO_INFO, 64)
            options.add("an authentication option (TCP_AO)")
        for option in sorted(options):
            yield Blocker("tcp-option", where, f"{what} has {option}, which would be lost")

    def _unheld(self) -> Iterator[Blocker]:
        """Yield the connections that their process has closed, with the data that they still have to deliver."""
        for entry in self._tcp:
            if entry.inode == 0 and entry.state in _DELIVERING:
                text = f"is closed, but {_count(max(entry.unsent - 1, 0), 'byte')} and the FIN are not delivered yet"
                yield Blocker("tcp-closing", _connection(entry), text)

    def _check_unix(self, inode: int, where: str, sock: socket.socket) -> Iterator[Blocker]:
        entry = self._unix.get(inode)
        if entry is None:
            return
        what = f"unix {entry.name}" if entry.name else "unix socket"
        dangling = (entry.peer, entry.state, entry.shut) == (0, _ESTABLISHED, False) and inode not in self._waiting
        if (entry.peer and entry.peer not in self._held) or (dangling and entry.kind != socket.SOCK_DGRAM):
            peer = self._unix.get(entry.peer)
            name = f" ({peer.name})" if peer is not None and peer.name else ""
            yield Blocker("unix-peer", where, f"{what} is connected to a socket outside the container{name}")
        if entry.state == _LISTEN:
            for icon in entry.waiting:
                waiting = self._unix.get(icon)
                if icon == 0:
                    yield Blocker(
                        "unix-backlog", where, f"{what} has a connection that was closed before it was accepted"
                    )
                elif icon not in self._held:
                    yield Blocker(
                        "unix-peer",
                        where,
                        f"{what} has a connection from outside the container that is not accepted yet",
                    )
                elif waiting is not None and waiting.sent:
                    yield Blocker("unix-backlog", where, f"{what} has a connection with data that is not accepted yet")
        elif entry.unread:
            options = [socket.SO_PASSCRED, _SO_PASSSEC, _SO_PASSPIDFD, *_SO_TIMESTAMPS]
            for option in options:
                with contextlib.suppress(OSError):
                    if sock.getsockopt(socket.SOL_SOCKET, option):
                        yield Blocker(
                            "unix-message", where, f"{what} has unread messages with credentials or times (SO_PASSCRED)"
                        )
                        break

    def _multicast(self, where: str, sock: socket.socket) -> Iterator[Blocker]:
        """Yield the multicast groups that a socket has joined, because CRIU does not join them again."""
        for interface, group in _groups(self._pid):
            family = socket.AF_INET6 if ":" in group else socket.AF_INET
            if family != sock.family and family == socket.AF_INET6:
                continue
            level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
            if family == socket.AF_INET:
                address = struct.pack("=HH4s", family, 0, socket.inet_aton(group))
            else:
                address = struct.pack("=HHI16s", family, 0, 0, socket.inet_pton(family, group))
            request = struct.pack("=I4x128sIII", interface, address, 0, 0, 0)
            with contextlib.suppress(OSError):
                if syscalls.getsockopt(sock.fileno(), level, _MCAST_MSFILTER, request):
                    yield Blocker(
                        "multicast",
                        where,
                        f"{_describe(sock)} has joined the group {group}, which CRIU does not join again",
                    )

    def bound(self) -> Iterator[Bound]:
        network = os.stat(f"/proc/{self._pid}/ns/net").st_ino
        for _, fd in self._held.values():
            with contextlib.suppress(OSError), _adopt(os.dup(fd)) as sock:
                if self._namespace(sock) == network and (found := _bound(sock)) is not None:
                    yield found

    def _datagrams(self) -> Iterator[Listening]:
        for where, fd in self._held.values():
            with contextlib.suppress(OSError), _adopt(os.dup(fd)) as sock:
                if sock.family in _INET and sock.type == socket.SOCK_DGRAM and sock.proto in (17, 136):
                    local = sock.getsockname()
                    if local[1]:
                        yield Listening("udp", (local[0], local[1]), where)


def _bound(sock: socket.socket) -> Bound | None:
    """Return the port of a socket; None if it has none or is a TCP connection."""
    protocol = next((name for name, number in PROTOCOLS.items() if number == sock.proto), "")
    if sock.family not in _INET or sock.type == socket.SOCK_RAW or not protocol:
        return None
    address, port = sock.getsockname()[:2]
    if not port:
        return None
    if protocol == "tcp":
        with contextlib.suppress(OSError):
            sock.getpeername()
            return None

    def has(level: int, option: int) -> bool:
        return bool(sock.getsockopt(level, option))

    return Bound(
        protocol, address.partition("%")[0], port,
        device=sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode(),
        reuse_address=has(socket.SOL_SOCKET, socket.SO_REUSEADDR),
        reuse_port=has(socket.SOL_SOCKET, socket.SO_REUSEPORT),
        only_v6=sock.family == socket.AF_INET6 and has(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
        free=has(socket.IPPROTO_IP, IP_FREEBIND),
    )  # fmt: skip


def _adopt(fd: int) -> socket.socket:
    """Return a socket object that owns `fd`. Python alone would ask for the address, which some families lack."""
    options = (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
    read = (
        int.from_bytes(syscalls.getsockopt(fd, socket.SOL_SOCKET, option, bytes(4)), sys.byteorder)
        for option in options
    )
    family, kind, protocol = read
    return socket.socket(family, kind, protocol, fileno=fd)


def _check_netlink(where: str, sock: socket.socket) -> Iterator[Blocker]:
    if select.select([sock], [], [], 0)[0]:
        yield Blocker("netlink", where, "is a netlink socket with unread messages")
    groups = array.array("I", sock.getsockopt(_SOL_NETLINK, _NETLINK_LIST_MEMBERSHIPS, 64))
    if any(groups[1:]):
        yield Blocker("netlink", where, "is a netlink socket that listens to groups above 32, which CRIU cannot carry")


def _groups(pid: int) -> Iterator[tuple[int, str]]:
    """Yield (interface number, group) of all multicast groups that a process of a network namespace has joined."""
    found: list[tuple[int, str]] = []
    with contextlib.suppress(OSError):
        interface = 0
        with open(f"/proc/{pid}/net/igmp") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if not line.startswith("\t"):
                    interface = int(fields[0])
                else:
                    found.append((interface, socket.inet_ntoa(struct.pack("=I", int(fields[0], 16)))))
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/igmp6") as file:
        for line in file:
            fields = line.split()
            found.append((int(fields[0]), socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[2]))))
    for number, group in found:
        if group not in _OWN_GROUPS and not group.startswith("ff02::1:ff"):
            yield number, group


def _describe(sock: socket.socket) -> str:
    """Return the protocol and the endpoints, as "tcp 10.88.0.5:6379 -> 10.88.0.1:50122"."""
    if sock.family not in _INET:
        return {socket.AF_UNIX: "unix socket", socket.AF_NETLINK: "netlink socket"}.get(sock.family, "packet socket")
    name = "raw" if sock.type == socket.SOCK_RAW else _PROTOCOLS.get(sock.proto, str(sock.proto)).lower()
    local = endpoint(sock.getsockname()[:2])
    try:
        return f"{name} {local} -> {endpoint(sock.getpeername()[:2])}"
    except OSError:
        return f"{name} {local}"


def _connection(entry: sockdiag.InetSocket) -> str:
    return f"tcp {endpoint(entry.local)} -> {endpoint(entry.remote)}"


def _family(number: int) -> str:
    with contextlib.suppress(ValueError):
        return socket.AddressFamily(number).name
    return {38: "AF_ALG", 44: "AF_XDP"}.get(number, str(number))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
