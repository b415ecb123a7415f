"""Shared memory from its source, through a page stream as CRIU sends it, to the images at the target.

The test plays CRIU: it maps an object, opens its image, and sends what the object has.
"""

import mmap
import os
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from criu_rpc import pagemap
from criu_rpc.pagemap import LAZY, PRESENT, Entry, Pagemap
from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout
from migrate.memory.layout import BLOCK, PAGE
from migrate.memory.store import Quota
from migrate.source import shared_memory
from migrate.source.shared_memory import SharedMemory
from migrate.target.shared_memory import SharedStores
from migrate.wire import digests
from migrate.wire.carrier import Carrier
from migrate.wire.codec import Unpacker
from migrate.wire.pages import PageRelay
from runtime.linux import syscalls

VERSION, RECORD = (4, 2, 1), struct.Struct("=I4xQQQ")
ADD, OPEN, CLOSE, SHARED = 6, 4, 0x1023, 2
IMAGE = 4711
SIZE = 5 * BLOCK + 3 * PAGE + 100


@pytest.fixture
def memfd() -> Iterator[int]:
    """An object whose size is not a multiple of a page, with a hole of more than a block, and one of a page."""
    fd = os.memfd_create("tested")
    os.ftruncate(fd, SIZE)
    put(fd, 0, os.urandom(BLOCK + PAGE))
    put(fd, BLOCK + 2 * PAGE, os.urandom(BLOCK))
    put(fd, 4 * BLOCK, os.urandom(SIZE - 4 * BLOCK))
    put(fd, 4 * BLOCK + PAGE, bytes(2 * PAGE))  # pages that are there, and zero
    yield fd
    os.close(fd)


def put(fd: int, offset: int, data: bytes) -> None:
    assert os.pwrite(fd, data, offset) == len(data)


def data_of(fd: int) -> list[tuple[int, int]]:
    """The pages of an object: (offset, bytes), as CRIU finds them."""
    found, end = [], 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return found
        end = os.lseek(fd, start, os.SEEK_HOLE)
        size = -(-(end - start) // PAGE) * PAGE
        found.append((start, size))


@dataclass
class Target:
    """What arrives: bodies of MEMORY frames, and the page stream."""

    images: Path
    stores: SharedStores
    stream: bytearray = field(default_factory=bytearray)
    bytes: int = 0

    def add(self, body: bytes) -> None:
        self.bytes += len(body)
        self.stores.add(memoryview(body))

    def put_page_map(self) -> None:
        """Do what a page server does with the stream."""
        entries, at = [], 0
        while at < len(self.stream):
            word, pages, address, image = RECORD.unpack_from(self.stream, at)
            at += RECORD.size
            if word & 0xFFFF == ADD and image == IMAGE << 8 | SHARED:
                entries.append(Entry(address, pages, word >> 16))
                at += pages * PAGE if word >> 16 & PRESENT else 0
        put_page_map(self.images, entries)


def put_page_map(images: Path, entries: list[Entry]) -> None:
    (images / f"pagemap-shmem-{IMAGE}.img").write_bytes(bytes(8))
    (images / "pages-3.img").touch()
    directory = os.open(images, os.O_RDONLY)
    pagemap.write(directory, f"pagemap-shmem-{IMAGE}.img", Pagemap(3, entries))
    os.close(directory)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    stores = SharedStores(tmp_path, Quota(1 << 30))
    yield Target(tmp_path, stores)
    stores.close()


def finish(target: Target, memory: SharedMemory, size: int) -> bytes:
    """What CRIU would restore from what has come."""
    target.put_page_map()
    target.stores.finish({str(image): space for image, space in memory.images.items()})
    return restored(target.images, size)[0][:size]


def restored(images: Path, size: int) -> tuple[bytes, int]:
    """What CRIU makes of the images of an object: its content, and how many bytes of pages it has."""
    directory = os.open(images, os.O_RDONLY)
    found = pagemap.read(directory, f"pagemap-shmem-{IMAGE}.img")
    os.close(directory)
    content, data, at = bytearray(-(-size // PAGE) * PAGE), (images / "pages-3.img").read_bytes(), 0
    for entry in found.entries:
        assert entry.flags == PRESENT
        length = entry.pages * PAGE
        content[entry.address : entry.address + length] = data[at : at + length]
        at += length
    assert at == len(data)
    return bytes(content), at


def freeze(memory: SharedMemory, target: Target, fd: int) -> PageRelay:
    """Send the object as CRIU does, between two records of a process."""
    relay = PageRelay(
        VERSION, Carrier(lambda payload: target.stream.extend(Unpacker().unpack(b"".join(payload)))), lambda _: None,
        memory,
    )  # fmt: skip
    relay.start()
    criu = relay.criu_end
    criu.settimeout(20)

    def record(command: int, flags: int = 0, pages: int = 0, address: int = 0, image: int = 0) -> None:
        criu.sendall(RECORD.pack(command | flags << 16, pages, address, image))

    record(OPEN, image=7 << 8 | 1)
    assert criu.recv(1) == b"\0"
    record(ADD, PRESENT, 1, 0x1000, 7 << 8 | 1)
    criu.sendall(b"p" * PAGE)
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ):
        record(OPEN, image=IMAGE << 8 | SHARED)
        assert criu.recv(1) == b"\0"
        for start, length in data_of(fd):
            record(ADD, PRESENT, length // PAGE, start, IMAGE << 8 | SHARED)
            criu.sendall(os.pread(fd, length, start).ljust(length, b"\0"))
    record(OPEN, image=8 << 8 | 1)
    assert criu.recv(1) == b"\0"
    record(CLOSE)
    assert criu.recv(4) == bytes(4)
    criu.close()
    relay.finish(20)
    relay.close()
    return relay


def test_only_what_has_changed_goes_in_the_freeze(target: Target, memfd: int) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    assert memory.send() == sum(size for _, size in data_of(memfd))
    before = target.bytes
    assert memory.send() == 0
    assert target.bytes == before
    put(memfd, 3 * PAGE + 5, b"changed")
    assert memory.send() == PAGE
    put(memfd, 0, b"again")
    put(memfd, SIZE - 1, b"!")
    put(memfd, 2 * BLOCK + 7 * PAGE, b"new")  # where a hole was
    put(memfd, 4 * BLOCK, bytes(PAGE))  # becomes zero
    syscalls.punch_hole(memfd, BLOCK + 9 * PAGE, 3 * PAGE)
    freeze(memory, target, memfd)
    assert memory.changed == PAGE + 4 * PAGE
    assert target.stream.count(b"p" * PAGE) == 1
    assert len(target.stream) < 2 * PAGE
    target.put_page_map()
    target.stores.finish({str(image): space for image, space in memory.images.items()})
    content, size = restored(target.images, SIZE)
    assert content[:SIZE] == os.pread(memfd, SIZE, 0)
    assert size == sum(length for _, length in data_of(memfd))
    assert sorted(os.listdir(target.images)) == [f"pagemap-shmem-{IMAGE}.img", "pages-3.img"]


def test_what_has_not_changed_does_not_go_in_the_freeze(target: Target, memfd: int) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    memory.send()
    memory.send()
    freeze(memory, target, memfd)
    assert memory.changed == 0
    assert finish(target, memory, SIZE) == os.pread(memfd, SIZE, 0)


def test_a_block_that_is_again_what_it_was(target: Target, memfd: int) -> None:
    """Its digest is an old one, and the target has what it was in between."""
    memory, old = SharedMemory(os.getpid(), target.add), os.pread(memfd, BLOCK, 0)
    memory.send()
    put(memfd, 0, b"between")
    syscalls.punch_hole(memfd, 5 * PAGE, PAGE)
    memory.send()
    put(memfd, 0, old)
    freeze(memory, target, memfd)
    assert finish(target, memory, SIZE) == os.pread(memfd, SIZE, 0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [(1 << 14, 1 << 14), (3, 1), (0, 1), (0, 0)])  # groups of pages, of blocks
def test_the_target_has_what_the_object_has(
    target: Target, memfd: int, seed: int, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written, punched and truncated between rounds; also when there is no room for all digests."""
    left = iter(limits)
    monkeypatch.setattr(shared_memory, "_Room", lambda: SimpleNamespace(left=next(left)))
    draw, memory, size = random.Random(seed), SharedMemory(os.getpid(), target.add), SIZE
    for _ in range(4):
        for _ in range(draw.randrange(30)):
            offset, length = draw.randrange(size), draw.choice((1, PAGE, 9 * PAGE, BLOCK))
            if draw.random() < 0.3:
                syscalls.punch_hole(memfd, offset // PAGE * PAGE, -(-length // PAGE) * PAGE)
            else:
                put(memfd, offset, draw.choice((bytes(length), os.urandom(length))))
                size = max(size, offset + length)
        if draw.random() < 0.3:
            size = draw.randrange(BLOCK, size)
            os.ftruncate(memfd, size)
        memory.send()
    put(memfd, draw.randrange(size), b"last")
    size = os.fstat(memfd).st_size
    freeze(memory, target, memfd)
    assert finish(target, memory, size) == os.pread(memfd, size, 0)


def test_without_libxxhash_another_digest_finds_changes(
    target: Target, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_xxhash", lambda: None)
    memory = SharedMemory(os.getpid(), target.add)
    memory.send()
    put(memfd, PAGE, b"changed")
    assert (memory.send(), memory.send()) == (PAGE, 0)


def test_an_object_that_is_closed_is_dropped_at_the_target(target: Target) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    fd = os.memfd_create("short")
    put(fd, 0, os.urandom(BLOCK))
    memory.send()
    assert os.listdir(target.images) == ["pymigrate-shared-0.img"]
    os.close(fd)
    memory.send()
    assert os.listdir(target.images) == []


def test_one_object_is_never_taken_for_two_images(target: Target, memfd: int) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    memory.send()
    with mmap.mmap(memfd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        assert memory.begin(1)
        assert not memory.begin(2)
    memory.end()
    assert list(memory.images) == [1]


@pytest.mark.parametrize("written", [False, True])
def test_an_object_without_a_page(target: Target, written: bool) -> None:
    """The target hears nothing of it, unless it gets a page after the last round."""
    memory, fd = SharedMemory(os.getpid(), target.add), os.memfd_create("empty")
    os.ftruncate(fd, SIZE)
    assert memory.send() == 0
    if written:
        put(fd, PAGE, b"x")
    freeze(memory, target, fd)
    assert list(memory.images) == [IMAGE] * written
    target.put_page_map()
    target.stores.finish({str(image): space for image, space in memory.images.items()})
    assert restored(target.images, SIZE) == (
        os.pread(fd, SIZE, 0).ljust(6 * BLOCK, b"\0")[: SIZE // PAGE * PAGE + PAGE],
        PAGE * written,
    )
    os.close(fd)


def test_an_object_that_was_not_sent_goes_through_the_stream(target: Target, memfd: int) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    freeze(memory, target, memfd)
    assert not memory.images
    assert len(target.stream) > sum(size for _, size in data_of(memfd))


def test_a_stream_that_ends_inside_an_object_is_an_error(target: Target, memfd: int) -> None:
    memory = SharedMemory(os.getpid(), target.add)
    memory.send()
    relay = PageRelay(VERSION, Carrier(lambda _: None), lambda _: None, memory)
    relay.start()
    with mmap.mmap(memfd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        relay.criu_end.sendall(RECORD.pack(OPEN, 0, 0, IMAGE << 8 | SHARED))
        assert relay.criu_end.recv(1) == b"\0"
    relay.criu_end.sendall(RECORD.pack(ADD | PRESENT << 16, 2, 0, IMAGE << 8 | SHARED) + bytes(PAGE))
    relay.criu_end.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="ends inside"):
        relay.finish(20)
    relay.close()


def arrived(target: Target, pages: int) -> int:
    """An object of so many pages at the target; its space."""
    for start, count in layout.split([(0, pages * PAGE)]):
        target.add(layout.head(layout.OBJECTS, [layout.word(start, count)]) + os.urandom(count * PAGE))
    return layout.OBJECTS


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([Entry(0, 71, LAZY)], "has not come"),
        ([Entry(0, 129, LAZY)], "more shared memory than has come"),
        ([Entry(0, (1 << 40) - 1, LAZY)], "more shared memory than has come"),
        ([Entry(BLOCK * 9, 1, LAZY)], "has not come"),
        ([Entry(0, 1, PRESENT)], "come otherwise"),
        ([Entry(0, 1, LAZY | PRESENT)], "come otherwise"),
    ],
)
def test_what_has_not_come_is_missed(target: Target, entries: list[Entry], words: str) -> None:
    space = arrived(target, 70)
    put_page_map(target.images, entries)
    with pytest.raises(TargetError, match=words):
        target.stores.finish({str(IMAGE): space})


@pytest.mark.parametrize("shared", [{"1": 5}, {"../x": layout.OBJECTS}, {"": layout.OBJECTS}])
def test_a_claim_about_an_object_that_has_not_come_is_refused(target: Target, shared: dict[str, int]) -> None:
    arrived(target, 1)
    with pytest.raises(ProtocolError, match="has not come"):
        target.stores.finish(shared)


def test_two_images_of_one_object_are_refused(target: Target) -> None:
    space = arrived(target, 1)
    with pytest.raises(ProtocolError, match="two images"):
        target.stores.finish({"1": space, "2": space})


def test_too_many_objects_are_refused(target: Target) -> None:
    page = bytes(range(256)) * 16
    for number in range(256):
        target.add(layout.head(layout.OBJECTS + number, [layout.word(0, 1)]) + page)
    with pytest.raises(ProtocolError, match="more than 256 objects"):
        target.add(layout.head(layout.OBJECTS + 256, [layout.word(0, 1)]) + page)


def test_the_quota_holds_for_all_objects_together(tmp_path: Path) -> None:
    stores = SharedStores(tmp_path, Quota(2 * PAGE))
    for number in range(2):
        stores.add(memoryview(layout.head(layout.OBJECTS + number, [layout.word(0, 1)]) + b"x" * PAGE))
    with pytest.raises(OSError, match="No space"):
        stores.add(memoryview(layout.head(layout.OBJECTS + 2, [layout.word(0, 1)]) + b"x" * PAGE))
    stores.close()
