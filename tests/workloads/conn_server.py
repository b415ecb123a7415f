"""conn_server.py PEER: for a container: TCP connections in all states, and what has become of them at the end.

It listens at ports 7001 and above and connects to PEER, port 7100. It says "ready" when all connections are made and
filled; once a byte has come on port 7009 it reads and writes what was left open, and prints a line of JSON for each.
With an IPv6 PEER its sockets are of IPv6; ::ffff:A.B.C.D stands for an IPv4 one with such sockets.
"""

import hashlib
import json
import socket
import sys
import time

PATTERN = bytes(range(251)) * 20000  # 5 MB


def read_all(sock: socket.socket) -> "list[object]":
    digest, size = hashlib.sha256(), 0
    while data := sock.recv(1 << 16):
        digest.update(data)
        size += len(data)
    return [size, digest.hexdigest()]


def fill(sock: socket.socket) -> int:
    """As much as goes into the queues of both ends; how many bytes that is."""
    sock.setblocking(False)
    sent = 0
    try:
        while sent < len(PATTERN):
            sent += sock.send(PATTERN[sent : sent + (1 << 16)])
    except BlockingIOError:
        pass
    sock.setblocking(True)
    return sent


def main() -> None:
    family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    mapped = sys.argv[1].startswith("::ffff:")
    ports = (7001, 7002, 7003, 7009)
    listeners = {port: socket.create_server(("", port), family=family, dualstack_ipv6=mapped) for port in ports}
    taken = {}
    for port in (7001, 7002, 7003):
        taken[port], _ = listeners[port].accept()
    out = socket.create_connection((sys.argv[1], 7100))
    filled = fill(taken[7001])  # in flight both ways: unread here, unread and unsent there
    taken[7002].shutdown(socket.SHUT_WR)  # half-closed from here
    out.sendall(b"mine")
    print("ready", flush=True)
    started = 0
    control, _ = listeners[7009].accept()
    while control.recv(1) != b"!":
        started += 1
        print(started, flush=True)
    taken[7001].sendall(PATTERN[filled:])
    taken[7001].shutdown(socket.SHUT_WR)
    for port in (7001, 7002, 7003):
        print(json.dumps({str(port): read_all(taken[port])}), flush=True)
    try:
        taken[7003].sendall(b"still here")  # its peer had closed its half before
        out.shutdown(socket.SHUT_WR)
        print(json.dumps({"out": out.recv(100).decode()}), flush=True)
    except OSError as error:
        print(json.dumps({"out": type(error).__name__}), flush=True)
    control.sendall(b"done")
    for sock in (*taken.values(), out):
        sock.close()
    time.sleep(1000)


main()
