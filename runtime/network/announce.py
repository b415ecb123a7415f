"""Announce the new place of a container's addresses: gratuitous ARP (RFC 5227, 3) and unsolicited neighbour
advertisements (RFC 4861, 7.2.6), sent from the container's own interface.

Switches and bridges learn the port from the frame itself, neighbours learn the hardware address from its content. A
frame can be lost, so a separate process repeats them and exits within a second.

In the other direction, CRIU sends the unsent data of a socket before the link is connected. The kernel then asks for a
neighbour that cannot hear it, and would ask again only after a second. So we ask as soon as the neighbour can hear.
"""

from __future__ import annotations

import os
import socket
import struct
import time

from runtime.linux import selfexec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec.network import Network

_AGAIN = (0.05, 0.25, 0.7)  # seconds, each after the one before
_ARP, _IPV6, _ICMPV6 = 0x0806, 0x86DD, 58
_SOLICITATION, _ADVERTISEMENT, _OVERRIDE = 135, 136, 0x20000000
_SOURCE_ADDRESS, _TARGET_ADDRESS = 1, 2  # options of the two (RFC 4861, 4.6.1)
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_SOLICITED_NODE = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13]


class Announcer:
    """Sends frames from a container's interface. `netns` is a descriptor; raises OSError."""

    def __init__(self, network: Network, netns: int) -> None:
        from runtime.linux.namespaces import inside_netns
        from runtime.network.netlink import Netlink

        self._network, self._frames = network, frames(network)
        self._questions: list[bytes] = []
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = inside_netns(netns, lambda: socket.socket(socket.AF_PACKET, kind, 0))
        try:
            self._socket.bind((network.name, 0))
            self._netlink = inside_netns(netns, Netlink)
        except OSError:
            self._socket.close()
            raise

    def send(self) -> None:
        """Send once, as soon as the link is up. A failure is ignored: neighbours then learn later by themselves."""
        try:
            self._netlink.await_carrier(self._network.name)
        except OSError:
            return
        _send(self._socket, self._frames)

    def ask(self) -> None:
        """Repeat the container's unanswered questions for neighbours."""
        try:
            asked = [question(self._network, neighbour) for neighbour in self._netlink.unanswered()]
        except OSError:
            return  # as in `send`
        self._questions = [frame for frame in asked if frame is not None]
        _send(self._socket, self._questions)

    def repeat(self) -> None:
        """Repeat everything a few times, from a process that is not waited for.

        A bridge whose port has just come up loses frames, including questions, while the kernel's workers are busy.
        """
        argv = selfexec.command("runtime.network.announce", *(frame.hex() for frame in self._frames + self._questions))
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        actions = [(os.POSIX_SPAWN_DUP2, self._socket.fileno(), 3), *null]
        try:
            os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
        except OSError:
            pass  # as in `send`

    def close(self) -> None:
        self._socket.close()
        self._netlink.close()


def frames(network: Network) -> list[bytes]:
    """Return Ethernet frames that announce every address of a network, which must have a hardware address."""
    mac = _mac(network)
    found = []
    for address in network.addresses:
        if address.family == 4:
            found.append(_arp(mac, address.packed, address.packed))
        else:
            body = struct.pack(">I16sBB6s", _OVERRIDE, address.packed, _TARGET_ADDRESS, 1, mac)
            found.append(_icmpv6(mac, _ADVERTISEMENT, address.packed, _ALL_NODES, body))
    return found


def question(network: Network, neighbour: bytes) -> bytes | None:
    """Return the frame that asks for a neighbour's hardware address; None without an address to ask from."""
    ours = [address for address in network.addresses if len(address.packed) == len(neighbour)]
    if not ours:
        return None
    source = next((address for address in ours if address.holds(neighbour)), ours[0]).packed
    if len(neighbour) == 4:
        return _arp(_mac(network), source, neighbour)
    body = struct.pack(">I16sBB6s", 0, neighbour, _SOURCE_ADDRESS, 1, _mac(network))
    return _icmpv6(_mac(network), _SOLICITATION, source, _SOLICITED_NODE + neighbour[13:], body)


def _mac(network: Network) -> bytes:
    assert network.mac is not None
    return bytes.fromhex(network.mac.replace(":", ""))


def _arp(mac: bytes, source: bytes, target: bytes) -> bytes:
    """Return a broadcast request (RFC 826)."""
    body = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, source, bytes(6), target)
    return b"\xff" * 6 + mac + struct.pack(">H", _ARP) + body


def _icmpv6(mac: bytes, kind: int, source: bytes, group: bytes, body: bytes) -> bytes:
    """Return a message to a multicast group (RFC 2464, 7)."""
    message = struct.pack(">BBH", kind, 0, _checksum(kind, source, group, body)) + body
    header = struct.pack(">IHBB16s16s", 6 << 28, len(message), _ICMPV6, 255, source, group)
    return b"\x33\x33" + group[12:] + mac + struct.pack(">H", _IPV6) + header + message


def _checksum(kind: int, source: bytes, group: bytes, body: bytes) -> int:
    """Return the checksum of an ICMPv6 message, with the pseudo-header of RFC 8200, 8.1."""
    data = source + group + struct.pack(">II", 4 + len(body), _ICMPV6) + struct.pack(">BBH", kind, 0, 0) + body
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _send(sock: socket.socket, announced: list[bytes]) -> None:
    for frame in announced:
        try:
            sock.send(frame)
        except OSError:
            continue


def main(argv: list[str]) -> int:
    """Send the frames in argv, in hex; descriptor 3 is a packet socket bound to the interface."""
    sock = socket.socket(fileno=3)
    announced = [bytes.fromhex(text) for text in argv]
    for pause in _AGAIN:
        time.sleep(pause)
        _send(sock, announced)
    return 0
