"""The disks of the machines, made first: `tests/support/schedule.py` has other tests run beside it."""

import os

from tests.vm import images


def test_they_are_built_once() -> None:
    debian = os.environ.get("DEBIAN", "13")
    with images.built(debian) as made:
        before = {image.disk: image.disk.stat() for image in made.hosts.values()}
    with images.built(debian) as made:
        assert {image.disk: image.disk.stat() for image in made.hosts.values()} == before
