"""What rsync takes for its remote shell: hands the remote command, then the byte stream, to whoever runs rsync.

argv: DESCRIPTOR HOST COMMAND...; the descriptor is an inherited stream socket. First goes one line, the remote
command as JSON; what follows is relayed both ways between the socket and rsync. Even stopped it does not outlive rsync.
"""

import json
import os
import select
import signal
import socket

from runtime import syscalls

_CHUNK = 1 << 18


def main(argv: list[str]) -> int:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    number, _host, *command = argv
    sock = socket.socket(fileno=int(number))
    sock.sendall(json.dumps(command).encode() + b"\n")
    sources = {0, sock.fileno()}
    while sock.fileno() in sources:
        ready, _, _ = select.select(list(sources), [], [])
        if 0 in ready:
            data = os.read(0, _CHUNK)
            if data:
                sock.sendall(data)
            else:
                sources.discard(0)
                sock.shutdown(socket.SHUT_WR)
        if sock.fileno() in ready:
            view = memoryview(sock.recv(_CHUNK))
            if not view:
                sources.discard(sock.fileno())
            while view:
                view = view[os.write(1, view) :]
    return 0
