"""Delay a link: `python -m tests.bench.relay SECONDS LINK LINK` passes frames between two links, each this much later.

For kernels without netem. It reads and writes packet sockets, whole segments with their offload header, so that it
passes as few and as large frames as the kernel itself does. It writes a line when it is at work, and ends when its
stdin ends, so that it cannot outlive its starter.
"""

import collections
import contextlib
import errno
import select
import socket
import sys
import time

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_SO_RCVBUFFORCE = 33
_BUFFER = 64 << 20
_LARGEST = 1 << 17  # bytes of a frame with its offload header; the kernel's segments have less than 64 KiB
_BATCH = 64  # frames that are read before some are sent


def open_link(name: str) -> socket.socket:
    """Return a packet socket that takes the frames which arrive at a link, and sends others there."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        sock.bind((name, _ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock


class Direction:
    """Frames on their way from one link to the other."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        self.source, self._target, self._delay = source, target, delay
        self._frames: collections.deque[tuple[float, bytes]] = collections.deque()

    def read(self, now: float) -> None:
        """Take frames that have arrived."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BATCH):
                self._frames.append((now + self._delay, self.source.recv(_LARGEST)))

    def send(self, now: float) -> None:
        """Send the frames whose time has come. A full queue or a link that is down loses them, as on a wire."""
        while self._frames and self._frames[0][0] <= now:
            try:
                self._target.send(self._frames.popleft()[1])
            except OSError as error:
                if error.errno not in (errno.ENOBUFS, errno.EAGAIN, errno.ENETDOWN):
                    raise

    def due(self) -> float | None:
        """Return when the next frame must be sent."""
        return self._frames[0][0] if self._frames else None


def relay(delay: float, first: socket.socket, second: socket.socket, stop: int) -> None:
    """Pass frames in both directions until `stop`, a descriptor, is at its end."""
    directions = [Direction(first, second, delay), Direction(second, first, delay)]
    while True:
        due = [when for direction in directions if (when := direction.due()) is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        ready = select.select([first.fileno(), second.fileno(), stop], [], [], wait)[0]
        if stop in ready:
            return
        for direction in directions:
            if direction.source.fileno() in ready:
                direction.read(time.monotonic())
            direction.send(time.monotonic())


def main(argv: list[str]) -> None:
    with open_link(argv[1]) as first, open_link(argv[2]) as second:
        print("relaying", flush=True)
        relay(float(argv[0]), first, second, sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
