"""The carrier of a container's memory, in real moves: compression and the bandwidth limit."""

import json
from typing import Any

import pytest

from tests.system.conftest import Lab

MIB = 1 << 20
SIZE = 20 * MIB
SOFT = f"x=$(yes 'something that compresses' | head -c {SIZE}); i=0; "
SOFT += "while :; do i=$((i+1)); echo $i; [ ${#x} -gt 20000000 ] || exit 1; usleep 20000; done"

# A python3 that does not see the library. sshd and rsync need it.
_PYTHON = """#!/bin/sh
exec unshare -m sh -c 'mount --bind /dev/null /usr/lib/*/libzstd.so.1 && exec /usr/bin/python3 "$@"' sh "$@"
"""
_HIDE = f"cat > /srv/bin/python3 <<'END'\n{_PYTHON}END\nchmod 755 /srv/bin/python3;"


def move(lab: Lab, *options: str) -> dict[str, Any]:
    done = lab.on("host1", "pymigrate", "--json", "move", *options, "web", "host2")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("mode", ["pre-copy", "stop-and-copy"])
def test_memory_is_compressed(lab: Lab, mode: str) -> None:
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    report = move(lab, "--mode", mode, "--compress", "zstd")
    assert report["memory_bytes"] > SIZE
    assert report["memory_sent"] < report["memory_bytes"] // 5
    assert report["bytes_sent"] < SIZE // 2
    lab.wait_count("host2", before + 5)


def test_memory_is_not_compressed(lab: Lab) -> None:
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    report = move(lab, "--compress", "none")
    assert report["memory_sent"] >= report["memory_bytes"] > SIZE
    lab.wait_count("host2", before + 5)


def test_the_limit_holds_while_the_container_runs_and_not_in_the_freeze(lab: Lab) -> None:
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    report = move(lab, "--mode", "pre-copy", "--bandwidth-limit", "8M", "--compress", "none")
    assert report["phases"]["pre-copy"] > 2  # 20 MiB at 8 MiB/s
    lab.wait_count("host2", before + 5)


def test_the_limit_does_not_hold_in_the_freeze(lab: Lab) -> None:
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    report = move(lab, "--mode", "stop-and-copy", "--bandwidth-limit", "500K", "--compress", "none")
    assert report["downtime_s"] < 20  # 20 MiB at 500 KiB/s take 41 s
    lab.wait_count("host2", before + 5)


def test_a_target_without_libzstd(lab: Lab) -> None:
    """Asked for, compression is refused before anything is sent."""
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    lab.sh("host2", f"mkdir -p /srv/bin; cp -a /usr/local/bin/. /srv/bin; {_HIDE} mount --bind /srv/bin /usr/local/bin")
    try:
        argv = ["pymigrate", "--json", "move", "--compress", "zstd", "web", "host2"]
        done = lab.on("host1", *argv, check=False)
    finally:
        lab.sh("host2", "umount /usr/local/bin; rm -r /srv/bin")
    event = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert event["message"] == "--compress zstd: host2 does not have the library libzstd.so.1"
    assert "apt-get install libzstd1" in event["remedy"]
    assert lab.sh("host2", "ls /var/lib/pymigrate/bundles 2>/dev/null || true") == ""
    lab.wait_count("host1", before + 5)
