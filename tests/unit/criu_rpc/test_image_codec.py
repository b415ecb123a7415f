"""Changes to CRIU's images."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_rpc import image_codec, pb

_MAGIC = b"inve"
_PID, _LOCK_METHOD, _ID = (1, 0, 7), (11, 0, 1), (13, 2, b"6b1f")


@pytest.fixture
def images(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def inventory(images: int) -> list[pb.Field]:
    (entry,) = pb.entries(pb.read(images, "inventory.img"), 4)
    return pb.fields(entry)


def test_the_lock_of_the_network_is_forgotten_and_nothing_else_changes(images: int) -> None:
    pb.write(images, "inventory.img", _MAGIC, [pb.encode([_PID, _LOCK_METHOD, _ID])])
    image_codec.forget_lock(images)
    assert inventory(images) == [_PID, (11, 0, 2), _ID]
    assert pb.read(images, "inventory.img")[:4] == _MAGIC


def test_the_lock_stays_for_a_criu_that_does_not_know_a_network_without(images: int) -> None:
    pb.write(images, "inventory.img", _MAGIC, [pb.encode([_PID, _LOCK_METHOD])])
    image_codec.forget_lock(images)
    assert inventory(images) == [_PID, _LOCK_METHOD]
