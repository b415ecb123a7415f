"""Disks that are full, or fill up: journals stay whole, and users are told which disk it is and what to do."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import NoSpace
from migrate.journal import journal
from migrate.journal.journal import Journal
from migrate.phases import Phase
from runtime.spec.default import default_spec
from tests.support.hosts import COUNT, NO_MEMORY, driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_still_here

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


def last_event(done: "subprocess.CompletedProcess[str]", status: int) -> dict[str, Any]:
    """The error that a command has ended with."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return event


@pytest.mark.parametrize("argv", [["sh", "-c", FILL], ["ssh", "host2", FILL]], ids=["source", "target"])
def test_a_disk_that_fills_up_in_the_freeze_does_not_stop_the_move(narrow: Lab, argv: list[str]) -> None:
    narrow.run()
    start = narrow.wait_count("host1", 1)
    fill = f"subprocess.run({argv}, stdin=subprocess.DEVNULL, capture_output=True)"
    program = driver("stop-and-copy", after=fill)
    narrow.on("host1", narrow.python, "-c", program)
    narrow.wait_count("host2", start)
    assert (narrow.phases("host1"), narrow.phases("host2")) == (["resumed"], ["resumed"])


@pytest.mark.parametrize(
    ("where", "before", "words"),
    [
        pytest.param(
            "seed",
            True,
            r"migrations/\S+\.jsonl: 6\d KiB more needed, 0 KiB free",
            id="journal",
        ),
        pytest.param(
            "stop-and-copy",
            True,
            r"incoming/\S+: \d+ MiB more needed, 0 KiB free",
            id="pages",
        ),
        pytest.param("freeze", False, r"incoming/\S+: \d+ KiB more needed, 0 KiB free", id="images"),
    ],
)
def test_a_target_without_room(narrow: Lab, where: str, before: bool, words: str) -> None:
    """It says where, and how much is missing; nothing of it stays."""
    narrow.run(script=f"x=$(head -c 5000000 /dev/urandom | base64); {COUNT}")
    start = narrow.wait_count("host1", 1)
    fill = f"subprocess.run({['ssh', 'host2', FILL]}, stdin=subprocess.DEVNULL, capture_output=True)"
    program = NO_MEMORY + (driver(where, before=fill) if before else driver(where, after=fill))
    event = last_event(narrow.on("host1", narrow.python, "-c", program, check=False), 10)
    assert event["workload"] == "SOURCE"
    assert re.search(rf": host2: no room at host2 for /var/lib/pymigrate/{words}$", event["message"]), event
    assert event["remedy"].startswith("make room at host2 where /var/lib/pymigrate/")
    assert_still_here(narrow, start)


def test_a_source_without_room(narrow: Lab) -> None:
    narrow.run()
    start = narrow.wait_count("host1", 1)
    narrow.sh("host1", FILL, check=False)
    event = last_event(narrow.on("host1", "pymigrate", "--json", "move", "web", "host2", check=False), 13)
    assert re.match(
        r"no room at host1 for /var/lib/pymigrate/migrations/\S+: 6\d KiB more needed, 0 KiB", event["message"]
    )
    assert event["remedy"] == "make room at host1 where /var/lib/pymigrate/migrations is"
    assert narrow.phases("host1") == []
    assert_still_here(narrow, start)


def test_a_journal_that_cannot_be_written_any_more(lab: Lab) -> None:
    """Neither the decision nor its undoing can be noted: the error says all the same where the container is."""
    lab.run()
    start = lab.wait_count("host1", 1)
    read_only = "subprocess.run(['mount', '-o', 'remount,ro', '/var/lib/pymigrate'], check=True)"
    program = driver("stop-and-copy", after=read_only)
    try:
        event = last_event(lab.on("host1", lab.python, "-c", program, check=False), 10)
    finally:
        lab.sh("host1", "mount -o remount,rw /var/lib/pymigrate")
    assert event["workload"] == "SOURCE"
    assert re.search(r"migrations/\S+\.jsonl: cannot be written: Read-only file system$", event["message"]), event
    assert_still_here(lab, start)
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", start)


def test_no_room_for_the_agent(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    try:
        lab.sh(
            "host2", "rm -rf /run/pymigrate; mount -o remount,size=32m /run; cat /dev/zero > /run/filler", check=False
        )
        event = last_event(lab.on("host1", "pymigrate", "--json", "move", "web", "host2", check=False), 8)
        assert re.match(
            r"host2: /run/pymigrate cannot be written: No space left on device \(\d+ KiB needed, 0 KiB free\)$",
            event["message"],
        )
        assert "make room" in event["remedy"]
        assert lab.sh("host2", "ls -A /run/pymigrate") == ""
    finally:
        lab.sh("host2", "rm -f /run/filler; mount -o remount,size=50% /run")
    assert_still_here(lab, start)


@pytest.mark.parametrize("free", [0, 4], ids=["no-byte", "some"])
def test_no_room_for_a_snapshot(narrow: Lab, free: int) -> None:
    narrow.run(script=f"x=$(head -c 5000000 /dev/urandom | base64); {COUNT}")
    start = narrow.wait_count("host1", 1)
    narrow.sh("host1", f"{FILL}; truncate -s -{free}M filler")
    place = "/var/lib/pymigrate/web.snapshot"
    done = narrow.on("host1", "pymigrate", "--json", "snapshot", "save", "web", place, check=False)
    event = last_event(done, 13)
    assert re.match(rf"no room at host1 for {place}: \d+ MiB more needed, \d+ KiB free$", event["message"])
    assert event["remedy"] == "make room at host1 where /var/lib/pymigrate is"
    assert narrow.sh("host1", "ls -A /var/lib/pymigrate").split() == ["filler", "test"]
    narrow.wait_count("host1", start)


def test_what_a_volume_takes_comes_to_a_full_disk(lab: Lab) -> None:
    """Its room is looked at before the move; what rsync says later names the file at the target."""
    try:
        lab.sh(
            "host1",
            "mkdir -p /mnt/v && mount -t tmpfs v /mnt/v && mkdir /mnt/v/x && head -c 20M /dev/urandom > /mnt/v/x/d",
        )
        lab.sh("host2", "mkdir -p /mnt/v && mount -t tmpfs -o size=30m v /mnt/v")
        bind = {"destination": "/data", "type": "bind", "source": "/mnt/v/x", "options": ["bind"]}
        lab.run(mounts=[*default_spec()["mounts"], bind])
        start = lab.wait_count("host1", 1)
        fill = f"subprocess.run({['ssh', 'host2', 'head -c 15M /dev/zero > /mnt/v/filler']}, capture_output=True)"
        program = driver("send-ahead", before=fill)
        program = program.replace('"move", ', '"move", "--volume", "/data=copy", ')
        event = last_event(lab.on("host1", lab.python, "-c", program, check=False), 10)
        assert re.search(r"no room at host2 for /mnt/v/x: rsync: .*/mnt/v/x/d.*: No space left", event["message"]), (
            event
        )
        assert "make room at host2" in event["remedy"]
        assert lab.sh("host2", "ls -A /mnt/v") == "filler\n"
        assert_still_here(lab, start)
        done = lab.on("host1", "pymigrate", "--json", "move", "--volume", "/data=copy", "web", "host2", check=False)
        (blocker,) = last_event(done, 3)["blockers"]
        assert (blocker["rule"], blocker["where"]) == ("no-space", "host2: /mnt/v")
        assert blocker["problem"] == "has 15 MiB free, 21 MiB are needed for what goes along"
    finally:
        for host in ("host1", "host2"):
            lab.sh(host, "pymigrate delete -f web; umount /mnt/v", check=False)
