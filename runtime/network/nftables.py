"""Change the tables of nf_tables in a network namespace with the few netlink(7) messages that this needs.

All uses are while a container is frozen or just before or after. libnftables with ctypes is slower at each, by turns in
an empty namespace (least of 20): the gate 0.31 ms, here 0.20 ms; listing chains 0.20 ms, here 0.15 ms; a lock with 500
connections 3.0 ms, here 1.8 ms. It also takes 2.3 ms to load with ctypes, and its first list 3.4 ms, for json.
(linux/netfilter/nf_tables.h)
"""

from __future__ import annotations

import socket
import struct

from runtime.limits import NETLINK_TIMEOUT
from runtime.linux import namespaces
from runtime.network import nlmsg
from runtime.network.nlmsg import ACK, APPEND, CREATE, DUMP, EXCL, NESTED, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    _Attribute = tuple[int, "bytes | int | str | list[_Attribute]"]
    Chain = tuple[str, str, int | None]  # table, chain, policy (of one with a hook)

INPUT = 1  # a hook
IPV4, IPV6 = 2, 10
TCP = 6
TABLE_OWNER = 0x2  # the kernel removes the table with the socket that made it
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM = 0, 2, 3, 6, 9, 12
_GETCHAIN = 4
_NETFILTER, _SUBSYSTEM, _INET = 12, 10, 1
_BATCH_BEGIN, _BATCH_END = 16, 17
_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg
_SOL_NETLINK, _CAP_ACK = 270, 10
_MOST = 1000  # elements in one message, because its attributes are limited to 64 KiB
DROP, ACCEPT = 0, 1
_VERDICT, _REGISTER = 0, 8
# Types of a set's key, as nft shows them: addresses and ports, six bits each.
_KEYS = {IPV4: ((7 << 6 | 13) << 6 | 7) << 6 | 13, IPV6: ((8 << 6 | 13) << 6 | 8) << 6 | 13}


class Message:
    """One change: a kind and its attributes. Numbers are 32 bits wide and in network order."""

    def __init__(self, kind: int, attributes: list[_Attribute], flags: int = 0) -> None:
        self.kind, self.flags, self.data = kind, flags, _encode(attributes)


class Nftables:
    """A socket to the network namespace of a descriptor. Methods raise OSError with the kernel's errno."""

    def __init__(self, netns: int) -> None:
        self._socket = namespaces.inside_netns(
            netns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        )
        self._socket.settimeout(NETLINK_TIMEOUT)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)  # answers do not repeat the request
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Nftables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def change(self, messages: list[Message]) -> None:
        """Make all changes atomically."""
        packet = self._message(_BATCH_BEGIN, 0, b"", 0, _SUBSYSTEM)
        first = self._sequence
        for message in messages:
            kind, flags = _SUBSYSTEM << 8 | message.kind, message.flags
            packet += self._message(kind, flags | (ACK if message is messages[-1] else 0), message.data, _INET)
        last = self._sequence
        packet += self._message(_BATCH_END, 0, b"", 0, _SUBSYSTEM)
        if len(packet) > 100_000:
            self._socket.setsockopt(socket.SOL_SOCKET, 32, 2 * len(packet))  # SO_SNDBUFFORCE
        self._socket.send(packet)
        for _ in nlmsg.answers(self._socket, first, last):
            pass

    def chains(self) -> list[Chain]:
        """Return all chains of all tables of the family inet."""
        self._socket.send(self._message(_SUBSYSTEM << 8 | _GETCHAIN, DUMP, b"", _INET))
        found = []
        for data in nlmsg.answers(self._socket, self._sequence, self._sequence):
            fields = dict(attributes(data[_GENERIC.size :]))
            policy = int.from_bytes(fields[5], "big") if 5 in fields else None
            found.append((_text(fields[1]), _text(fields[3]), policy))
        return found

    def _message(self, kind: int, flags: int, data: bytes, family: int, resource: int = 0) -> bytes:
        self._sequence += 1
        body = _GENERIC.pack(family, 0, resource) + data
        return nlmsg.message(kind, flags, self._sequence, body)


def table(name: str, flags: int = 0) -> Message:
    return Message(NEWTABLE, [(1, name), (2, flags)], CREATE | EXCL)


def delete_table(name: str) -> Message:
    return Message(DELTABLE, [(1, name)])


def chain(table: str, name: str, hook: int | None = None, priority: int = 0) -> Message:
    """Return a chain that accepts every packet that its rules do not drop. Without a hook it sees no packet."""
    attributes: list[_Attribute] = [(1, table), (3, name)]
    if hook is not None:
        attributes += [(4, [(1, hook), (2, priority & 0xFFFFFFFF)]), (7, "filter"), (5, ACCEPT)]
    return Message(NEWCHAIN, attributes, CREATE)


def set_policy(table: str, chain: str, policy: int) -> Message:
    return Message(NEWCHAIN, [(1, table), (3, chain), (5, policy)])


def drop_rule(table: str, chain: str, *expressions: list[_Attribute]) -> Message:
    """Return a rule that drops packets that match all expressions."""
    verdict: list[_Attribute] = [(1, _VERDICT), (2, [(2, [(1, DROP)])])]
    parts: list[_Attribute] = [(1, part) for part in (*expressions, _expression("immediate", verdict))]
    return Message(NEWRULE, [(1, table), (2, chain), (4, parts)], CREATE | APPEND)


def connection_set(table: str, name: str, family: int, number: int) -> Message:
    """Return a set of (address, port, address, port); `number` must be unique among the sets of one change."""
    length = 16 if family == IPV4 else 40
    return Message(NEWSET, [(1, table), (2, name), (3, 0), (4, _KEYS[family]), (5, length), (10, number)], CREATE)


def elements(table: str, name: str, keys: list[bytes]) -> Iterator[Message]:
    for at in range(0, len(keys), _MOST):
        listed: list[_Attribute] = [(1, [(1, [(1, key)])]) for key in keys[at : at + _MOST]]
        yield Message(NEWSETELEM, [(1, table), (2, name), (3, listed)], CREATE)


def key(*ends: tuple[bytes, int]) -> bytes:
    """Return an element of a `connection_set` from two pairs of address and port."""
    return b"".join(address + port.to_bytes(2, "big") + b"\0\0" for address, port in ends)


def is_tcp() -> list[list[_Attribute]]:
    return [_meta(16), _compare(bytes([TCP]))]


def is_family(family: int) -> list[list[_Attribute]]:
    return [_meta(15), _compare(bytes([family]))]


def is_not_loopback() -> list[list[_Attribute]]:
    return [_meta(4), _compare(struct.pack("=I", 1), equal=False)]


def is_syn() -> list[list[_Attribute]]:
    """Match the first segment of a connection: SYN without ACK."""
    syn, mask = b"\x02", b"\x12"
    both: list[_Attribute] = [(1, _REGISTER), (2, _REGISTER), (3, 1), (4, [(1, mask)]), (5, [(1, b"\0")])]
    return [_payload(2, 13, 1), _expression("bitwise", both), _compare(syn)]


def is_to_port(port: int) -> list[list[_Attribute]]:
    return [_payload(2, 2, 2), _compare(port.to_bytes(2, "big"))]


def is_connection(family: int, name: str, *, incoming: bool) -> list[list[_Attribute]]:
    """Match a segment of a connection in a set, whose elements name the local end first."""
    width = 4 if family == IPV4 else 16
    start = 12 if family == IPV4 else 8
    ends = [(start, 0), (start + width, 2)]
    parts, register = [], _REGISTER
    for address, port in reversed(ends) if incoming else ends:
        parts += [_payload(1, address, width, register), _payload(2, port, 2, register + width // 4)]
        register += width // 4 + 1
    return [*parts, _expression("lookup", [(1, name), (2, _REGISTER)])]


def _meta(number: int) -> list[_Attribute]:
    return _expression("meta", [(1, _REGISTER), (2, number)])


def _compare(value: bytes, *, equal: bool = True) -> list[_Attribute]:
    return _expression("cmp", [(1, _REGISTER), (2, 0 if equal else 1), (3, [(1, value)])])


def _payload(base: int, offset: int, length: int, register: int = _REGISTER) -> list[_Attribute]:
    """Load bytes of a header into a register; `base`: 1 is the network header, 2 the transport header."""
    return _expression("payload", [(1, register), (2, base), (3, offset), (4, length)])


def _expression(name: str, attributes: list[_Attribute]) -> list[_Attribute]:
    return [(1, name), (2, attributes)]


def _encode(attributes: list[_Attribute]) -> bytes:
    out = bytearray()
    for number, value in attributes:
        if isinstance(value, list):
            number, data = number | NESTED, _encode(value)
        elif isinstance(value, int):
            data = value.to_bytes(4, "big")
        else:
            data = value.encode() + b"\0" if isinstance(value, str) else value
        out += struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)
    return bytes(out)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "backslashreplace")
