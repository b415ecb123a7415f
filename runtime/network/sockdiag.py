"""Ask the kernel about the sockets of a network namespace with sock_diag(7).

It answers what no descriptor shows: peers and waiting connections of Unix sockets, TCP connections that no process
holds. pyroute2 answers the same questions, but takes 100 ms to import for that.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.limits import SOCKDIAG_TIMEOUT
from runtime.linux.namespaces import inside_netns
from runtime.network import nlmsg
from runtime.network.nlmsg import attributes

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_ALL_STATES = 0xFFFFFFFF
_UNIX_SHOW = 0x01 | 0x04 | 0x08 | 0x10  # name, peer, icons, queue lengths
_UNIX_NAME, _UNIX_PEER, _UNIX_ICONS, _UNIX_RQLEN, _UNIX_SHUTDOWN = 0, 2, 3, 4, 6
_SHOW_INFO = 0x02  # without it the kernel reports neither keys nor upper layers
_INET_MD5SIG, _INET_ULP_INFO = 18, 19


@dataclass(frozen=True)
class UnixSocket:
    """A socket of unix(7). `waiting` are the inodes of connections not yet accepted, 0 if the client has closed it.

    `sent` is its sent but unread data, in bytes of kernel memory.
    """

    kind: int
    state: int
    name: str
    peer: int
    waiting: tuple[int, ...]
    unread: int
    sent: int
    shut: bool  # in both directions


@dataclass(frozen=True)
class InetSocket:
    """A socket of tcp(7) or udp(7). `inode` is 0 if no process holds it; `unsent` counts unacknowledged bytes."""

    inode: int
    state: int
    local: tuple[str, int]
    remote: tuple[str, int]
    unsent: int
    options: frozenset[str] = field(default=frozenset())


class Diag:
    """sock_diag of the network namespace of the process `pid`, a name in /proc."""

    def __init__(self, pid: int | str) -> None:
        with open(f"/proc/{pid}/ns/net", "rb") as netns:
            self._socket = inside_netns(
                netns.fileno(), lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
            )
        self._socket.settimeout(SOCKDIAG_TIMEOUT)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def unix(self) -> dict[int, UnixSocket]:
        """Return the Unix sockets by inode."""
        request = struct.pack("=BBHIII8x", socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _UNIX_SHOW)
        found = {}
        for body in self._dump(request):
            _, kind, state, inode = struct.unpack_from("=BBBxI", body)
            told = dict(attributes(body[16:]))
            unread, sent = struct.unpack("=II", told.get(_UNIX_RQLEN, bytes(8)))
            icons = told.get(_UNIX_ICONS, b"")
            found[inode] = UnixSocket(
                kind,
                state,
                _name(told.get(_UNIX_NAME, b"")),
                int.from_bytes(told.get(_UNIX_PEER, b""), "little" if struct.pack("=H", 1)[0] else "big"),
                struct.unpack(f"={len(icons) // 4}I", icons),
                unread,
                sent,
                told.get(_UNIX_SHUTDOWN) == b"\3",
            )
        return found

    def tcp(self) -> Iterator[InetSocket]:
        return self.inet(socket.IPPROTO_TCP)

    def inet(self, protocol: int) -> Iterator[InetSocket]:
        """Yield the IPv4 and IPv6 sockets of a protocol."""
        for family in (socket.AF_INET, socket.AF_INET6):
            request = struct.pack("=BBBxI48x", family, protocol, _SHOW_INFO, _ALL_STATES)
            for body in self._dump(request):
                state = body[1]
                ports = struct.unpack_from("!HH", body, 4)
                length = 4 if family == socket.AF_INET else 16
                addresses = [socket.inet_ntop(family, body[at : at + length]) for at in (8, 24)]
                _, _, unsent, _, inode = struct.unpack_from("=IIIII", body, 52)
                names = {_INET_MD5SIG: "an MD5 signature (TCP_MD5SIG)", _INET_ULP_INFO: "an upper layer (TCP_ULP)"}
                options = frozenset(names[kind] for kind, _ in attributes(body[72:]) if kind in names)
                yield InetSocket(
                    inode, state, (addresses[0], ports[0]), (addresses[1], ports[1]), unsent, options
                )  # fmt: skip

    def _dump(self, request: bytes) -> Iterator[bytes]:
        self._sequence += 1
        self._socket.send(nlmsg.message(_SOCK_DIAG_BY_FAMILY, nlmsg.DUMP, self._sequence, request))
        return nlmsg.answers(self._socket, self._sequence, self._sequence)


@contextlib.contextmanager
def diag(pid: int | str) -> Iterator[Diag]:
    """Open a Diag for a `with`. Raises OSError."""
    found = Diag(pid)
    try:
        yield found
    finally:
        found.close()


def _name(raw: bytes) -> str:
    """Return a name as `ss` writes it: abstract names begin with @."""
    text = raw.decode("utf-8", "backslashreplace")
    return "@" + text[1:] if text.startswith("\0") else text.rstrip("\0")
