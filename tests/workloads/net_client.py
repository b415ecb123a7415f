"""net_client.py LISTEN HOST...: clients of the server in a container, and a server for the client in it.

What comes over a connection to the address LISTEN, port 9, is echoed. Over one connection to port 7 of each host, once
it answers, goes a number every $PERIOD seconds (2 ms), which has to be echoed in order. A line on stdin ends it; then
it prints what it saw, as JSON: per host the numbers sent and echoed, the longest time without an echo in ms, and what
went wrong. After another line the connections are closed.
"""

import json
import os
import select
import socket
import sys
import time

PERIOD = float(os.environ.get("PERIOD", "0.002"))


class Stream:
    def __init__(self, host: str) -> None:
        self.host, self.sent, self.echoed, self.gap, self.error = host, 0, 0, 0.0, ""
        self.socket = connect(host)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest, self._last = b"", time.monotonic()

    def send(self) -> None:
        try:
            self.socket.sendall(b"%d\n" % self.sent)
            self.sent += 1
        except OSError as error:
            self.error = self.error or repr(error)

    def receive(self) -> bool:
        """False at the end."""
        try:
            data = self.socket.recv(65536)
        except OSError as error:
            self.error = self.error or repr(error)
            return False
        if not data:
            self.error = self.error or "closed"
            return False
        now = time.monotonic()
        self.gap, self._last = max(self.gap, now - self._last), now
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if int(line) != self.echoed:
                self.error = self.error or f"{line!r} came, not {self.echoed}"
            self.echoed += 1
        return True

    def report(self) -> dict[str, object]:
        fields = {name: getattr(self, name) for name in ("host", "sent", "echoed", "error")}
        return fields | {"gap_ms": round(self.gap * 1000, 1)}


def connect(host: str) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((host, 7), 5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def main() -> None:
    listen, *hosts = sys.argv[1:]
    listener = socket.create_server((listen, 9))
    print("listening", flush=True)
    streams = [Stream(host) for host in hosts]
    taken: list[socket.socket] = []
    print("ready", flush=True)
    due, end = time.monotonic(), float("inf")
    while time.monotonic() < end and not all(s.error or (end < 1e9 and s.echoed == s.sent) for s in streams):
        waiting = [listener, *taken, *(stream.socket for stream in streams if not stream.error)]
        ready = select.select([*waiting, *([sys.stdin] if end > 1e9 else [])], [], [], PERIOD)[0]
        for stream in streams:
            if stream.socket in ready:
                stream.receive()
        for one in taken:
            if one in ready:
                one.sendall(one.recv(65536))
        if listener in ready:
            taken.append(listener.accept()[0])
        if sys.stdin in ready:
            sys.stdin.readline()
            end = time.monotonic() + 20
        if time.monotonic() >= due and end > 1e9:
            due = time.monotonic() + PERIOD
            for stream in streams:
                if not stream.error:
                    stream.send()
    print(json.dumps([stream.report() for stream in streams]), flush=True)
    sys.stdin.readline()


main()
