"""conn_client.py LISTEN HOST: the other ends of the connections of conn_server.py; what they saw, as JSON.

A line on stdin tells the server to go on to the end.
"""

import hashlib
import json
import socket
import sys
import threading
import time

PATTERN = bytes(range(251)) * 20000


def connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            sock = socket.create_connection((host, port), 20)
            sock.settimeout(120)  # that of `sendall` is for all of it, and the moves lie in between
            return sock
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def main() -> None:
    listen, host = sys.argv[1:]
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    listener = socket.create_server((listen, 7100), family=family)
    print("listening", flush=True)
    socks = {port: connect(host, port) for port in (7001, 7002, 7003)}
    back, _ = listener.accept()
    socks[7003].sendall(b"last words")
    socks[7003].shutdown(socket.SHUT_WR)  # half-closed from there
    feeder = threading.Thread(target=feed, args=(socks[7001],))
    feeder.start()
    control = connect(host, 7009)
    print("ready", flush=True)
    sys.stdin.readline()
    seen: dict[str, object] = {}
    control.sendall(b"!")
    try:
        seen["7001"] = read_all(socks[7001])
        feeder.join()
        seen["7002"] = read_all(socks[7002])
        socks[7002].sendall(b"after your end")
        socks[7002].shutdown(socket.SHUT_WR)
        seen["7003"] = read_all(socks[7003], len(b"still here"))
        seen["back"] = [back.recv(100).decode(), back.recv(100).decode()]
        back.sendall(b"yours")
        seen["control"] = control.recv(4).decode()
    except OSError as error:
        seen["error"] = repr(error)
    print(json.dumps(seen), flush=True)
    sys.stdin.readline()


def feed(sock: socket.socket) -> None:
    sock.sendall(PATTERN)
    sock.shutdown(socket.SHUT_WR)


def read_all(sock: socket.socket, enough: int = 1 << 40) -> "list[object]":
    digest, size = hashlib.sha256(), 0
    while size < enough and (data := sock.recv(1 << 16)):
        digest.update(data)
        size += len(data)
    return [size, digest.hexdigest()]


main()
