"""net_server.py [PEER]: for a container: echoes what comes to port 7, and counts on stdout.

With the address PEER it counts what PEER has echoed of its own count, over one connection to port 9.
"""

import select
import socket
import sys
import time

PERIOD = 0.02


def main() -> None:
    listener = socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    streams: list[socket.socket] = []
    peer = socket.create_connection((sys.argv[1], 9), 5) if len(sys.argv) > 1 else None
    count, due = 1, time.monotonic()
    waiting = [listener] if peer is None else [listener, peer]
    if peer is not None:
        peer.settimeout(None)
        peer.sendall(b"1\n")
    while True:
        for ready in select.select([*waiting, *streams], [], [], max(0, due - time.monotonic()))[0]:
            if ready is listener:
                streams.append(listener.accept()[0])
            elif ready is peer:
                assert int(peer.recv(100)) == count
                print(count, flush=True)
                count += 1
                peer.sendall(b"%d\n" % count)
                time.sleep(0.002)
            elif data := ready.recv(65536):
                ready.sendall(data)
            else:
                streams.remove(ready)
                ready.close()
        if time.monotonic() >= due:
            due = time.monotonic() + PERIOD
            if peer is None:
                print(count, flush=True)
                count += 1


main()
