"""The agent's loop, over pipes: what it does while the source is silent."""

import os
import threading
from pathlib import Path

import pytest

from criu_rpc import messages
from criu_rpc.errors import CriuNotFound
from migrate.target.agent import Agent
from migrate.target.handlers import Connected
from migrate.wire import protocol
from migrate.wire.frames import FrameDecoder, FrameType

PATIENCE = 20.0


class Connection:
    """An agent on a thread, and the other ends of its pipes."""

    def __init__(self) -> None:
        theirs, self.to = os.pipe()
        self.back, mine = os.pipe()
        self.agent = Agent(theirs, mine)
        self.thread = threading.Thread(target=self.agent.serve)
        self.thread.start()

    def call(self, call: "protocol.Call[object]") -> FrameType:
        os.write(self.to, protocol.encode_call(call))
        decoder = FrameDecoder()
        while True:
            for kind, _ in decoder.feed(os.read(self.back, 1 << 16)):
                if kind is not FrameType.PULSE:
                    return kind

    def close(self) -> None:
        os.close(self.to)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("missing", [False, True])
def test_a_silent_source_has_the_agent_import_what_facts_needs(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = threading.Event()

    def rpc() -> None:
        imported.set()
        if missing:
            raise CriuNotFound("pycriu's rpc_pb2 is not installed")

    monkeypatch.setattr(messages, "rpc", rpc)
    connection = Connection()
    try:
        assert connection.call(protocol.Hello(protocol.VERSION, str(tmp_path))) is FrameType.REPLY
        assert imported.wait(PATIENCE)
        assert connection.call(protocol.Discard([])) is FrameType.REPLY
    finally:
        connection.close()


def test_an_agent_that_nobody_greets_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = threading.Event()
    monkeypatch.setattr(Connected, "idle", lambda _: idle.set())
    monkeypatch.setattr(messages, "rpc", lambda: pytest.fail("imported"))
    connection = Connection()
    try:
        assert idle.wait(PATIENCE)
    finally:
        connection.close()
