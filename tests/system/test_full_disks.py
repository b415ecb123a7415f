"""Disks that are full, or fill up: journals stay whole, and users are told which disk it is and what to do."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate import journal
from migrate.errors import NoSpace
from migrate.journal import Journal
from migrate.phases import Phase
from tests.hosts import driver
from tests.system.conftest import Lab

Small = Callable[[str], Path]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """Mounts a file system of a kind, of 2 MiB in blocks of a page: a line that crosses their border may be torn."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(kind: str) -> Path:
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
        else:
            image = tmp_path / "image"
            image.write_bytes(bytes(2 << 20))
            subprocess.run([f"mkfs.{kind}", "-q", "-m", "0", "-b", "4096", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, place], check=True)
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


def fill(directory: Path) -> None:
    """Write until nothing fits any more, not a byte."""
    with contextlib.suppress(OSError), open(directory / "filler", "ab", buffering=0) as file:
        for size in (1 << 16, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
        os.fsync(file.fileno())


FIELDS = {"role": "source", "id": "web", "source": "host1", "target": "host2"}


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_fills_up_does_not_keep_a_move_from_being_noted(small: Small, kind: str) -> None:
    directory = small(kind)
    migration = journal.new_migration_id()
    log = Journal.begin(migration, directory=directory, **FIELDS)
    log.record(Phase.SEED, plan="x" * 5000)
    fill(directory)
    for phase in (Phase.STOP_AND_COPY, Phase.PREPARED):
        log.record(phase)
    log.record(Phase.COMMITTED, leaving="x" * 20_000)
    for _ in range(20):
        log.record(Phase.IN_DOUBT, reason="x" * 1000)
    log.record(Phase.RESUMED)
    entry = journal.load(migration, directory=directory)
    assert entry is not None
    assert entry.phase is Phase.RESUMED
    fill(directory)  # with what the end has given back
    with pytest.raises(NoSpace, match=rf"no room at {os.uname().nodename} for {directory}/.*jsonl: .* needed, .* free"):
        Journal.begin(journal.new_migration_id(), directory=directory, **FIELDS)
    assert {path.name for path in directory.glob("*.jsonl")} == {f"{migration}.jsonl"}


def test_where_nothing_can_be_reserved_a_torn_line_is_cut_off(small: Small) -> None:
    """ext2 has no fallocate: what fits of a line is written."""
    directory = small("ext2")
    migration = journal.new_migration_id()
    log = Journal.begin(migration, directory=directory, **FIELDS)
    path = directory / f"{migration}.jsonl"
    before = path.read_bytes()
    fill(directory)
    with pytest.raises(NoSpace, match=str(path)):
        log.record(Phase.SEED, plan="x" * 5000)
    assert path.read_bytes() == before
    (directory / "filler").unlink()
    log.record(Phase.ABORTED)
    entry = journal.load(migration, directory=directory)
    assert entry is not None
    assert entry.phase is Phase.ABORTED


@pytest.fixture
def narrow(lab: Lab) -> Iterator[Lab]:
    """Hosts whose /var/lib/pymigrate has 128 MiB."""
    for host in ("host1", "host2"):
        lab.sh(host, "mount -o remount,size=128m /var/lib/pymigrate")
    yield lab
    for host in ("host1", "host2"):
        lab.sh(host, "rm -f /var/lib/pymigrate/filler; mount -o remount,size=50% /var/lib/pymigrate")


# Journals end at the end of a page then: what comes takes more room.
FILL = """cd /var/lib/pymigrate
for log in migrations/*; do
    head -c $((4096 - $(stat -c %s $log) % 4096)) /dev/zero | tr '\\0' '\\n' >> $log
done
cat /dev/zero > filler"""


@pytest.mark.parametrize("argv", [["sh", "-c", FILL], ["ssh", "host2", FILL]], ids=["source", "target"])
def test_a_disk_that_fills_up_in_the_freeze_does_not_stop_the_move(narrow: Lab, argv: list[str]) -> None:
    narrow.run()
    start = narrow.wait_count("host1", 1)
    fill = f"subprocess.run({argv}, stdin=subprocess.DEVNULL, capture_output=True)"
    program = driver("(coordinator.Coordinator, '_stop_and_copy')", after=fill)
    narrow.on("host1", narrow.python, "-c", program)
    narrow.wait_count("host2", start)
    assert (narrow.phases("host1"), narrow.phases("host2")) == (["resumed"], ["resumed"])
