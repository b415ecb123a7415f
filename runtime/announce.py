"""Telling a network where a container's addresses are now: gratuitous ARP (RFC 5227, 3) and unsolicited neighbour
advertisements (RFC 4861, 7.2.6), from the container's own interface.

Switches and bridges learn the port from the frame itself, neighbours the hardware address from what it says. A frame
can be lost, so that some more follow, from a process of their own, which ends within a second.
"""

from __future__ import annotations

import os
import socket
import struct
import time

from runtime import selfexec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.network import Network

_AGAIN = (0.05, 0.25, 0.7)  # seconds, each after the one before
_ARP, _IPV6, _ICMPV6, _ADVERTISEMENT, _OVERRIDE = 0x0806, 0x86DD, 58, 136, 0x20000000
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")


class Announcer:
    """A way to speak for a container's interface from outside. `netns` is a descriptor; raises OSError."""

    def __init__(self, network: Network, netns: int) -> None:
        from runtime.namespaces import inside_netns

        self._frames = frames(network)
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = inside_netns(netns, lambda: socket.socket(socket.AF_PACKET, kind, 0))
        try:
            self._socket.bind((network.name, 0))
        except OSError:
            self._socket.close()
            raise

    def send(self) -> None:
        """Once, now. What cannot be sent is not worth a failure: it only comes later by itself."""
        _send(self._socket, self._frames)

    def repeat(self) -> None:
        """Some more times, from a process that is not waited for."""
        argv = selfexec.command("runtime.announce", *(frame.hex() for frame in self._frames))
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        actions = [(os.POSIX_SPAWN_DUP2, self._socket.fileno(), 3), *null]
        try:
            os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
        except OSError:
            pass  # as in `send`

    def close(self) -> None:
        self._socket.close()


def frames(network: Network) -> list[bytes]:
    """Ethernet frames that announce every address of a network, which has a hardware address."""
    assert network.mac is not None
    mac = bytes.fromhex(network.mac.replace(":", ""))
    found = []
    for address in network.addresses:
        if address.family == 4:
            body = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, address.packed, bytes(6), address.packed)
            found.append(b"\xff" * 6 + mac + struct.pack(">H", _ARP) + body)
        else:
            body = struct.pack(">I16sBB6s", _OVERRIDE, address.packed, 2, 1, mac)
            message = struct.pack(">BBH", _ADVERTISEMENT, 0, _checksum(address.packed, body)) + body
            header = struct.pack(">IHBB16s16s", 6 << 28, len(message), _ICMPV6, 255, address.packed, _ALL_NODES)
            found.append(bytes.fromhex("333300000001") + mac + struct.pack(">H", _IPV6) + header + message)
    return found


def _checksum(source: bytes, body: bytes) -> int:
    """Of an advertisement to all nodes, with the pseudo-header of RFC 8200, 8.1."""
    data = source + _ALL_NODES + struct.pack(">II", 4 + len(body), _ICMPV6)
    data += struct.pack(">BBH", _ADVERTISEMENT, 0, 0) + body
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
    """argv: the frames in hex; descriptor 3 is a packet socket that is bound to the interface."""
    sock = socket.socket(fileno=3)
    announced = [bytes.fromhex(text) for text in argv]
    for pause in _AGAIN:
        time.sleep(pause)
        _send(sock, announced)
    return 0
