"""A connection that is made ahead."""

import dataclasses
import socket
import threading
import time
from pathlib import Path

import pytest

from migrate.errors import HostError
from migrate.wire import ssh_config
from migrate.wire.ahead import Ahead

PATIENCE = 20.0


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A host at which nobody answers: what connects to it waits."""
    sock = socket.create_server(("127.0.0.1", 0))
    found = ssh_config.look_up("127.0.0.1", "root")
    there = dataclasses.replace(found, address="127.0.0.1", port=sock.getsockname()[1], proxy=())
    monkeypatch.setattr(ssh_config, "look_up", lambda *_: there)
    return sock


def test_a_failure_is_raised_where_the_connection_is_wanted(listener: socket.socket) -> None:
    listener.close()
    with Ahead("127.0.0.1", "/run/none") as ahead, pytest.raises(HostError, match="cannot connect"):
        ahead.peer("/run/none")


def test_nobody_waits_for_a_connection_that_is_not_wanted(listener: socket.socket) -> None:
    began = time.monotonic()
    with Ahead("127.0.0.1", "/run/none"), listener.accept()[0] as theirs:
        pass
    assert time.monotonic() - began < ssh_config.CONNECT_TIMEOUT
    listener.close()
    theirs.close()
    for thread in threading.enumerate():
        if thread.name == "connect-127.0.0.1":
            thread.join(PATIENCE)
            assert not thread.is_alive()
