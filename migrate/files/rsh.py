"""Act as rsync's remote shell: pass the remote command, then the byte stream, to the process that runs rsync.

argv: DESCRIPTOR HOST COMMAND...; the descriptor is an inherited stream socket. The first line is the remote command as
JSON; the rest is relayed between the socket and rsync. Even if stopped, this process does not outlive rsync.

Each direction has its own thread, because rsync, at either end, may read nothing until its output has been taken.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading

from runtime.linux import syscalls
from runtime.linux.descriptors import read_some, write_all

NAME = "rsync's remote shell"
_CHUNK = 1 << 18


def main(argv: list[str]) -> int:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    number, _host, *command = argv
    sock = socket.socket(fileno=int(number))
    try:
        write_all(sock.fileno(), json.dumps(command).encode() + b"\n")
        threading.Thread(target=_send, args=(sock,), daemon=True).start()
        _pour(sock.fileno(), 1)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"{NAME}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # at once: the other thread may still wait for rsync


def _send(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # an error means that both directions of the socket are at their end
        _pour(0, sock.fileno())
        sock.shutdown(socket.SHUT_WR)


def _pour(source: int, destination: int) -> None:
    while data := read_some(source, _CHUNK):
        write_all(destination, data)
