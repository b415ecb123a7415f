"""Memory that is sent only to measure the connection: it is checked like other memory, bounded, and not kept."""

import pytest

from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout
from migrate.model import Compression
from migrate.target import memory
from migrate.wire.codec import Packer

BODY = layout.head(1, [layout.word(0x10000, 2), layout.word(0x40000, 56, zero=True)]) + b"x" * 8192


def payload(body: bytes = BODY) -> bytes:
    return b"".join(bytes(part) for part in Packer(Compression.NONE).pack(body))


def test_it_is_counted() -> None:
    trial = memory.Trial()
    trial.add(payload())
    trial.add(payload())
    trial.end(2 * len(BODY))
    with pytest.raises(TargetError, match="arrived damaged"):
        trial.end(2 * len(BODY) + 1)


def test_it_is_checked() -> None:
    with pytest.raises(ProtocolError, match="bytes of pages"):
        memory.Trial().add(payload(BODY[:-1]))


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_TRIAL", 2 * len(BODY))
    trial = memory.Trial()
    trial.add(payload())
    trial.add(payload())
    with pytest.raises(ProtocolError, match="a trial sends more than"):
        trial.add(payload())
