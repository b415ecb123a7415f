"""net_sniffer.py ADDRESS...: what the network says of these addresses, as seen from eth0 of this host.

A line on stdin ends it; then it prints as JSON how many TCP segments with RST or FIN came from or went to one of them,
which addresses were announced (gratuitous ARP, unsolicited neighbour advertisement) and how often, and how many frames
it has missed.
"""

import collections
import json
import select
import socket
import struct
import sys

_ETH_P_ALL, _SOL_PACKET, _PACKET_STATISTICS, _SO_RCVBUFFORCE = 3, 263, 6, 33


def main() -> None:
    wanted = {}
    for text in sys.argv[1:]:
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        wanted[socket.inet_pton(family, text)] = text
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    sniffer.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    sniffer.bind(("eth0", _ETH_P_ALL))
    print("ready", flush=True)
    ends, announced = [], collections.Counter()
    while True:
        ready = select.select([sniffer, sys.stdin], [], [])[0]
        if sniffer in ready:
            look(sniffer.recv(65536), wanted, ends, announced)
        elif sys.stdin in ready:
            break
    missed = struct.unpack("=II", sniffer.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
    print(json.dumps({"ends": ends, "announced": announced, "missed": missed}))


def look(frame: bytes, wanted: dict[bytes, str], ends: list[str], announced: "collections.Counter[str]") -> None:
    kind, packet = int.from_bytes(frame[12:14], "big"), frame[14:]
    if kind == 0x0806:
        sender, target = packet[14:18], packet[24:28]
        if sender == target and sender in wanted:
            announced[wanted[sender]] += 1
        return
    if kind == 0x0800:
        protocol, source, target, body = packet[9], packet[12:16], packet[16:20], packet[(packet[0] & 15) * 4 :]
    elif kind == 0x86DD:
        protocol, source, target, body = packet[6], packet[8:24], packet[24:40], packet[40:]
    else:
        return
    if protocol == 58 and body[0] == 136 and body[8:24] in wanted and target[0] == 0xFF:
        announced[wanted[body[8:24]]] += 1
    if protocol == 6 and body[13] & 5 and (source in wanted or target in wanted):
        ends.append(f"{wanted.get(source, 'to ' + wanted.get(target, ''))} flags {body[13]:#x}")


main()
