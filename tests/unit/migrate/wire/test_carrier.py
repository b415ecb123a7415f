"""The chain that memory takes: its forms, when it compresses, its limit, and how it ends."""

import os
import threading
import time
import zlib

import pytest

from migrate.errors import DeadlineExceeded, MigrateError
from migrate.model import Compression
from migrate.wire import codec, zstd
from migrate.wire.carrier import DEPTH, Carrier
from migrate.wire.codec import MAX_BODY, Packer, Trial, Unpacker
from migrate.wire.native import Buffer
from migrate.wire.rate import Limit

MIB = 1 << 20
needs_zstd = pytest.mark.skipif(not zstd.is_available(), reason="libzstd1 is missing")
SOFT = bytes(range(256)) * 1000  # compresses well


class Received:
    """What a target makes of the payloads."""

    def __init__(self) -> None:
        self.unpacker = Unpacker()
        self.bodies: list[bytes] = []
        self.size = 0

    def __call__(self, payload: tuple[Buffer, ...]) -> None:
        joined = b"".join(payload)
        self.size += len(joined)
        self.bodies.append(bytes(self.unpacker.unpack(joined)))


@pytest.mark.parametrize("compress", [Compression.NONE, pytest.param(Compression.ZSTD, marks=needs_zstd)])
def test_bodies_arrive_in_order_and_are_counted(compress: Compression) -> None:
    received = Received()
    carrier = Carrier(received, compress=compress)
    bodies = [SOFT, os.urandom(1000), memoryview(SOFT)[5:], b"", bytearray(b"x"), os.urandom(MAX_BODY)]
    for body in bodies:
        carrier.put(body)
    carrier.flush(10)
    assert received.bodies == [bytes(body) for body in bodies]
    assert carrier.size == sum(map(len, bodies))
    assert carrier.sent == received.size
    assert carrier.digest() == f"{zlib.crc32(b''.join(bodies)):08x}"
    assert (received.size < carrier.size - len(SOFT)) is (compress is Compression.ZSTD)
    carrier.close()


def test_the_reader_waits_for_the_connection_and_not_before() -> None:
    free, received = threading.Event(), Received()

    def send(payload: tuple[Buffer, ...]) -> None:
        assert free.wait(10)
        received(payload)

    carrier = Carrier(send)
    for _ in range(DEPTH + 1):  # one more is being sent
        carrier.put(b"body")
    waiting = threading.Thread(target=carrier.put, args=(b"last",))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    with pytest.raises(DeadlineExceeded):
        carrier.flush(0.01)
    free.set()
    waiting.join(10)
    carrier.flush(10)
    assert received.bodies == [b"body"] * (DEPTH + 1) + [b"last"]
    carrier.close()


@pytest.mark.parametrize("error", [OSError("gone"), MigrateError("gone"), RuntimeError("gone")], ids=lambda e: type(e))
def test_an_error_reaches_the_reader_and_nothing_hangs(error: Exception) -> None:
    def send(_: tuple[Buffer, ...]) -> None:
        raise error

    carrier = Carrier(send)

    def fill() -> None:
        for _ in range(3 * DEPTH):
            carrier.put(b"body")

    with pytest.raises(type(error), match="gone"):
        fill()
    with pytest.raises(type(error), match="gone"):
        carrier.flush(10)
    carrier.close()


def test_it_can_be_closed_while_the_limit_holds_it() -> None:
    carrier = Carrier(Received(), limit=Limit(1.0))
    for _ in range(3):
        carrier.put(b"body" * 1000)  # more than an hour
    begun = time.monotonic()
    while carrier.size < 8000:  # the second one waits
        assert time.monotonic() - begun < 10
    carrier.close()
    assert time.monotonic() - begun < 10


def test_the_limit_is_kept_and_lifted() -> None:
    carrier = Carrier(Received(), limit=Limit(10 * MIB))
    begun = time.monotonic()
    for _ in range(8):
        carrier.put(bytes(MIB // 2))
    carrier.flush(20)
    took = time.monotonic() - begun
    assert took >= 0.25  # 4 MiB at 10 MiB/s, less the last piece and what may go at once
    assert 0.2 < carrier.held <= took
    carrier.put(bytes(MIB))
    carrier.put(bytes(MIB))
    carrier.lift_limit()
    carrier.put(bytes(MAX_BODY))
    carrier.flush(20)
    carrier.close()


def test_a_rest_does_not_allow_a_long_burst() -> None:
    now = 100.0
    limit = Limit(1000.0, lambda: now)
    assert limit.take(500) == 0.0
    now = 200.0
    waits = []
    limit._lifted.wait = lambda timeout: waits.append(timeout) or False  # type: ignore[method-assign, func-returns-value, assignment, misc]
    for _ in range(3):
        limit.take(500)
    assert waits == pytest.approx([0.4, 0.9])


@pytest.mark.parametrize(
    ("bandwidth", "pays"), [(10 * MIB, True), (119 * MIB, True), (400 * MIB, False), (2000 * MIB, False)]
)
def test_compression_pays_on_slow_links(bandwidth: float, pays: bool) -> None:
    assert Trial(size=MIB, compressed=MIB // 2, seconds=1 / 700).pays(bandwidth) is pays


def test_compression_of_noise_never_pays() -> None:
    assert not Trial(size=MIB, compressed=MIB + 100, seconds=1 / 4000).pays(1.0)


def fed(packer: Packer, body: bytes, total: int, bandwidth: float) -> int:
    """Pack bodies of `total` bytes for a connection of `bandwidth`; return how many bytes went."""
    sent = 0
    for _ in range(total // len(body)):
        size = sum(map(len, packer.pack(body)))
        packer.sent(size, size / bandwidth)
        sent += size
    return sent


@needs_zstd
def test_auto_compresses_on_a_slow_link_only() -> None:
    slow, fast, noise = (Packer(Compression.AUTO) for _ in range(3))
    assert fed(slow, SOFT, 32 * MIB, 10 * MIB) < 16 * MIB
    assert slow.compresses
    assert fed(fast, SOFT, 32 * MIB, 100_000 * MIB) > 31 * MIB
    assert not fast.compresses
    fed(noise, os.urandom(len(SOFT)), 32 * MIB, 10 * MIB)
    assert not noise.compresses


@needs_zstd
def test_auto_tries_again_when_the_memory_changes() -> None:
    packer = Packer(Compression.AUTO)
    fed(packer, os.urandom(len(SOFT)), 80 * MIB, 10 * MIB)
    assert not packer.compresses
    fed(packer, SOFT, 80 * MIB, 10 * MIB)
    assert packer.compresses


def test_one_end_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd, "_zstd", lambda: object())
    both = [*codec.offers()]
    assert codec.settle(Compression.AUTO, both, "host2") is Compression.AUTO
    assert codec.settle(Compression.ZSTD, both, "host2") is Compression.ZSTD
    assert codec.settle(Compression.AUTO, [], "host2") is Compression.NONE
    assert codec.settle(Compression.NONE, [], "host2") is Compression.NONE
    with pytest.raises(MigrateError, match=r"--compress zstd: host2 does not have the library libzstd\.so\.1"):
        codec.settle(Compression.ZSTD, [], "host2")
    monkeypatch.setattr(zstd, "_zstd", lambda: None)
    assert codec.OFFER not in codec.offers()
    assert codec.settle(Compression.AUTO, both, "host2") is Compression.NONE
    with pytest.raises(MigrateError, match="--compress zstd: this host does not have"):
        codec.settle(Compression.ZSTD, both, "host2")
