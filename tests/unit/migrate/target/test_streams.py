"""The streams of a move as its agent has them: real sockets, and pipes that are passed through them."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import ProtocolError, TargetError
from migrate.target import streams
from migrate.target.streams import Streams
from migrate.wire import frames
from migrate.wire.frames import FrameType


class Source:
    """What is at the other ends: the agent's connection, and pipes."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[int, bytes]] = []
        self.input, self.connection = os.pipe()
        monkeypatch.setattr(streams, "_SOURCE", self.input)
        self.streams = Streams(place, 2, lambda number, payload: self.taken.append((number, bytes(payload))))
        self.pipes: dict[int, int] = {}
        self.commands: list[socket.socket] = []

    def connect(self, number: int) -> None:
        command = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command.connect(str(self.streams.place))
        there, self.pipes[number] = os.pipe()
        socket.send_fds(command, [bytes([number])], [there])
        os.close(there)
        self.commands.append(command)

    def send(self, number: int, data: bytes, kind: FrameType = FrameType.MEMORY) -> None:
        os.write(self.pipes[number], frames.header(kind, len(data)) + data)

    def close(self) -> None:
        self.streams.close()
        for fd in (self.input, self.connection, *self.pipes.values()):
            os.close(fd)
        for command in self.commands:
            command.close()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    made = Source(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def connected(source: Source) -> Source:
    source.connect(2)
    source.connect(1)
    source.streams.accept()
    return source


def test_what_comes_late_is_waited_for(connected: Source) -> None:
    connected.send(1, b"first")

    def later() -> None:
        for piece in (b"second", b"third"):
            connected.send(2, piece)

    thread = threading.Timer(0.05, later)
    thread.start()
    connected.streams.read_until(lambda: len(connected.taken) == 3)
    thread.join()
    assert sorted(connected.taken) == [(1, b"first"), (2, b"second"), (2, b"third")]


def test_a_stream_ends(connected: Source) -> None:
    os.close(connected.pipes.pop(2))
    with pytest.raises(TargetError, match="stream 3 was lost"):
        connected.streams.read_until(lambda: False)
    assert len(connected.streams.inputs) == 1


def test_the_source_says_something_else(connected: Source) -> None:
    os.write(connected.connection, b"x")
    with pytest.raises(TargetError, match="did not wait"):
        connected.streams.read_until(lambda: False)


@pytest.mark.parametrize("kind", [FrameType.CALL, FrameType.PAGES])
def test_other_frames_are_refused(connected: Source, kind: FrameType) -> None:
    connected.send(1, b"{}", kind)
    with pytest.raises(ProtocolError, match="came over a stream"):
        connected.streams.read_until(lambda: False)


def test_the_same_stream_twice(source: Source) -> None:
    source.connect(1)
    source.connect(1)
    with pytest.raises(TargetError, match="twice"):
        source.streams.accept()


def test_streams_that_do_not_come(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_OPEN_TIMEOUT", 0.05)
    source.connect(1)
    with pytest.raises(TargetError, match="1 of 2 more streams have come"):
        source.streams.accept()


def test_nothing_is_left(connected: Source) -> None:
    connected.streams.close()
    assert connected.commands[0].recv(1) == b""  # its command exits
    assert not connected.streams.place.exists()
