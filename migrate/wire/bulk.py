"""Send much data on a channel: in batches of packets, without the copies that paramiko makes (packetizer.py)."""

import contextlib
import time
from collections.abc import Iterator

import paramiko

from migrate.wire.native import Buffer
from migrate.wire.packetizer import BATCH, Packetizer

_SMALL = 16 << 10  # bytes: less is not worth the short way


def send(channel: paramiko.Channel, *parts: Buffer) -> None:
    """Send all bytes of `parts` in turn. Raises as paramiko.Channel.sendall does.

    Raises TimeoutError when the other end takes nothing for as long as the channel's time limit says.
    """
    transport, largest = channel.get_transport(), channel.out_max_packet_size - 64  # as paramiko has it
    size, packetizer = sum(map(len, parts)), transport.packetizer
    if size <= _SMALL or not isinstance(packetizer, Packetizer) or not packetizer.sends_data:
        channel.sendall(memoryview(b"".join(parts)))  # type: ignore[arg-type]  # its slices are not copied
        return
    left = [memoryview(part) for part in parts if part]
    while left:
        batch = _take(left, _from_window(channel, min(size, BATCH * largest)))
        size -= sum(map(len, batch))
        with _clear_to_send(transport):
            packetizer.send_data(channel.remote_chanid, largest, batch)


def _from_window(channel: paramiko.Channel, wanted: int) -> int:
    """Wait until the other end takes data, and return how many of `wanted` bytes it takes now."""
    with channel.lock:
        if channel.closed:
            raise ConnectionError("the channel is closed")
        size: int = channel._wait_for_send_window(wanted)  # type: ignore[attr-defined]  # at most one packet
        if size == 0:
            raise ConnectionError("the channel is closed")
        more = min(wanted - size, channel.out_window_size)
        channel.out_window_size -= more
        return size + more


def _take(left: list[memoryview], size: int) -> list[memoryview]:
    """Remove the first `size` bytes from `left` and return them."""
    taken = []
    while size:
        piece = left[0][:size]
        taken.append(piece)
        size -= len(piece)
        if len(piece) == len(left[0]):
            del left[0]
        else:
            left[0] = left[0][len(piece) :]
    return taken


@contextlib.contextmanager
def _clear_to_send(transport: paramiko.Transport) -> Iterator[None]:
    """Let no exchange of keys begin meanwhile, and wait for one that has begun."""
    deadline = time.monotonic() + transport.clear_to_send_timeout
    while True:
        transport.clear_to_send.wait(0.1)
        if not transport.is_active():
            raise EOFError
        with transport.clear_to_send_lock:
            if transport.clear_to_send.is_set():
                yield
                return
        if time.monotonic() > deadline:
            raise paramiko.SSHException("the exchange of new keys did not end in time")
