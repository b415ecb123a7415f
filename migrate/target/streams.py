"""The streams of one move as its agent has them: the inputs of other connections, which carry MEMORY frames."""

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from migrate.errors import ProtocolError, TargetError
from migrate.limits import STREAM_OPEN_TIMEOUT
from migrate.wire.frames import FrameDecoder, FrameType

_SOCKET = "streams.socket"  # beside the images
_SOURCE = 0  # the agent's own input


class Streams:
    """Listens for streams 1 to `count` from the beginning; `accept` waits for them.

    `take` gets the number of a stream, and the payload of a frame, which is valid until it returns.
    """

    def __init__(self, images: Path, count: int, take: Callable[[int, memoryview], None]) -> None:
        """Raises OSError."""
        self.place, self._count, self._take = images / _SOCKET, count, take
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._agents: list[socket.socket] = []  # one end each; closing it ends the stream's command
        self._inputs: dict[int, int] = {}  # descriptor -> number
        self._decoders: dict[int, FrameDecoder] = {}
        self._failure: TargetError | None = None
        try:
            directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:  # the path may be longer than an address can be
                self._listening.bind(f"/proc/self/fd/{directory}/{_SOCKET}")
            finally:
                os.close(directory)
            self._listening.listen(count)
        except OSError:
            self.close()
            raise

    @property
    def command(self) -> list[str]:
        """The command whose input becomes a stream; the number of the stream follows it."""
        return ["python3", "-I", "-S", sys.argv[0], "stream", str(self.place)]

    def accept(self) -> None:
        """Wait for all streams. Raises TargetError, OSError."""
        deadline = time.monotonic() + STREAM_OPEN_TIMEOUT
        while len(self._inputs) < self._count:
            self._listening.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                agent, _ = self._listening.accept()
                self._agents.append(agent)
                agent.settimeout(max(0.001, deadline - time.monotonic()))
                number, inputs, _, _ = socket.recv_fds(agent, 1, 1)
            except TimeoutError:
                words = f"{len(self._inputs)} of {self._count} more streams have come"
                raise TargetError(f"{words} within {STREAM_OPEN_TIMEOUT:g} s") from None
            if len(inputs) == 1:
                self._inputs[inputs[0]] = number[0]
                self._decoders[number[0]] = FrameDecoder()
        if sorted(self._inputs.values()) != list(range(1, self._count + 1)):
            raise TargetError("a stream has come twice")

    @property
    def inputs(self) -> list[int]:
        """The descriptors to `read` from."""
        return list(self._inputs)

    def read(self, fd: int) -> None:
        """Read what has come. That a stream has ended is raised by `read_until`. Raises ProtocolError."""
        number = self._inputs[fd]
        decoder = self._decoders[number]
        size = os.readv(fd, [decoder.room()])
        if not size:
            del self._inputs[fd]
            os.close(fd)
            self._failure = TargetError(f"the connection of stream {number + 1} was lost")
            return
        frame = decoder.filled(size)
        if frame is not None:
            kind, payload = frame
            if kind is not FrameType.MEMORY:
                raise ProtocolError(f"a {kind.name} frame came over a stream")
            self._take(number, payload)

    def read_until(self, is_enough: Callable[[], bool]) -> None:
        """Read until `is_enough`. Raises TargetError if a stream ends, or the source does not wait for this."""
        poll = select.poll()
        for fd in (_SOURCE, *self._inputs):
            poll.register(fd, select.POLLIN)
        while not is_enough():
            if self._failure is not None:
                raise self._failure
            ready = [fd for fd, _ in poll.poll()]
            if _SOURCE in ready:
                raise TargetError("the source did not wait for its streams")
            for fd in ready:
                self.read(fd)

    def close(self) -> None:
        for fd in self._inputs:
            os.close(fd)
        self._inputs.clear()
        for end in (self._listening, *self._agents):
            end.close()
        with contextlib.suppress(FileNotFoundError):
            self.place.unlink()
