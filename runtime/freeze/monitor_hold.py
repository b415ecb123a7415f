"""While a container is frozen, its monitor flushes the log and hands over unread terminal input, to move both.

CRIU carries a terminal's settings and size, but not the data in it, because the other end belongs to the monitor
(clients.py draws the conversation). Typed input that was not read yet, and the output shown last, become an image file
beside CRIU's own.
"""

from __future__ import annotations

import fcntl
import os

from criu_rpc.image_codec import join_terminals, keep_external_mounts, restart_polls
from runtime.errors import Conflict, ContainerError, SpecError
from runtime.light import json as light_json
from runtime.monitor import attach, typeahead
from runtime.monitor.clients import RECENT, TIOCGPTPEER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self

    from runtime.state.record import State

IMAGE = "pymigrate-terminal.img"
_LIMIT = 1 << 20


class Hold:
    """A held monitor: from `begin` to `release`, or until the container exits or this process does."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._typed, self._recent = b"", b""
        self._terminal = False

    @classmethod
    def begin(cls, state: State) -> Self:
        """Hold the monitor of a frozen container; do nothing if it has none that can be held.

        Raises ContainerError if the monitor does not answer; nothing is held then.
        """
        try:
            sock = attach.connect(state) if state.monitor_pid else None
        except Conflict:
            sock = None  # a monitor of an earlier version
        hold = cls(sock)
        if sock is None:
            return hold
        try:
            sock.send(b"h")
            while (packet := attach.receive(sock))[:1] != b"h":
                if not packet:
                    raise ContainerError(f"container {state.id}: its monitor has exited, or is held already")
                if packet[:1] == b"i":
                    hold._typed += packet[1:]
                elif packet[:1] == b"o":
                    hold._terminal, hold._recent = True, packet[1:]
        except OSError as error:
            hold.close()
            raise ContainerError(f"container {state.id}: its monitor does not answer: {error}") from None
        except BaseException:
            hold.close()
            raise
        return hold

    def save(self, images: int) -> None:
        """Write what the terminal holds to an image file in the directory `images`; without a terminal do nothing."""
        if self._terminal:
            text = light_json.dumps({"typed": self._typed.hex(), "recent": self._recent.hex()})
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(IMAGE, flags, 0o600, dir_fd=images), "w") as file:
                file.write(text)

    def moved(self, host: str) -> None:
        """Have attached clients told that the exit which follows is a move to `host`."""
        self._tell(b"m" + host.encode()[:256])

    def release(self) -> None:
        """Release the monitor because the container resumes here. On return, typed input is in its terminal again."""
        if self._sock is not None and self._tell(b"r"):
            try:
                attach.receive(self._sock)
            except OSError:
                pass  # closing the socket releases it in any case
        self.close()

    def _tell(self, packet: bytes) -> bool:
        try:
            if self._sock is not None:
                self._sock.send(packet)
        except OSError:
            return False  # the monitor has exited, and the container with it
        return True

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def complete(state: State, images: int) -> Hold:
    """Complete CRIU's images in the directory `images` at `post-dump`, and hold the monitor.

    Raises ContainerError, CriuError.
    """
    join_terminals(images)
    keep_external_mounts(images)
    restart_polls(images)
    hold = Hold.begin(state)
    try:
        hold.save(images)
    except BaseException:
        hold.release()
        raise
    return hold


def refill(images: str, master: int) -> bytes:
    """Put typed input back into a restored terminal that is not in use yet; return the output it showed last.

    Raises SpecError if the image is malformed, OSError.
    """
    path = os.path.join(images, IMAGE)
    try:
        with open(path, "rb") as file:
            value = light_json.loads(file.read(_LIMIT))
        typed, recent = bytes.fromhex(value["typed"]), bytes.fromhex(value["recent"])
    except FileNotFoundError:
        return b""
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    blocking = os.get_blocking(master)
    slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.set_blocking(master, False)
        typeahead.put(master, slave, typed)
    finally:
        os.set_blocking(master, blocking)
        os.close(slave)
    return recent[-RECENT:]
