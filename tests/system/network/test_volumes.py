"""Volumes on a network file system, sshfs here: both hosts see the same files, nothing of them is sent or compared."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.spec.default import default_spec
from tests.system.conftest import Lab
from tests.system.move.test_move import move

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="this machine has no /dev/fuse")
EXPORT = "/run/export"
# A size that sshfs or the kernel (for a second) remembers would be from before the container ran at the other host.
FRESH = "cache=no,attr_timeout=0"
VOLUME = {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["bind"]}
# It appends to a file that stays open, and reads it again.
WRITE = "exec 5>>/data/log; i=0; while :; do i=$((i+1)); echo $i >&5; tail -n 1 /data/log; usleep 20000; done"


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Lab]:
    """`client` serves EXPORT; it is mounted on /srv at host1."""
    for host in ("host1", "host2"):
        lab.sh(host, "mount -t tmpfs -o mode=755 srv /srv")  # a /srv of its own
    lab.sh("client", f"mkdir -p {EXPORT}/data {EXPORT}/other")
    mount(lab, "host1", "")
    yield lab
    for host in ("host1", "host2"):
        lab.sh(host, "for i in $(pymigrate list -q); do pymigrate delete -f $i; done", check=False)
        lab.sh(host, "while umount -l /srv; do :; done", check=False)
    lab.sh("client", f"rm -rf {EXPORT}")


def mount(lab: Lab, host: str, directory: str, *options: str) -> None:
    """Mount a directory of the export on /srv."""
    lab.on(host, "sshfs", "-o", FRESH, *options, f"client:{EXPORT}{directory}", "/srv")


def start(hosts: Lab) -> int:
    hosts.run(script=WRITE, mounts=[*default_spec()["mounts"], VOLUME])
    return hosts.wait_count("host1", 3)


def blocker(hosts: Lab, *options: str) -> dict[str, Any]:
    """The only one that there is against a move to host2."""
    done = hosts.on("host1", "pymigrate", "--json", "validate", *options, "web", "host2", check=False)
    (found,) = json.loads(done.stdout)["blockers"]
    return dict(found)


def test_it_moves_and_writes_on(hosts: Lab) -> None:
    """The options may be others, and there only a part of it may be mounted."""
    before = start(hosts)
    hosts.sh("host2", "mkdir -p /srv/data")
    hosts.on("host2", "sshfs", "-o", "reconnect", "-o", FRESH, f"client:{EXPORT}/data", "/srv/data")
    try:
        report = move(hosts)
        before = hosts.wait_count("host2", before)
        assert not [item for item in report["passes"] if not item["tree"].startswith(("rootfs", "tmpfs "))]
        move(hosts, source="host2", target="host1")
        hosts.wait_count("host1", before)
    finally:
        hosts.sh("host2", "pymigrate delete -f web; umount -l /srv/data", check=False)
    numbers = [int(line) for line in hosts.sh("client", f"cat {EXPORT}/data/log").split()]
    assert numbers == list(range(1, len(numbers) + 1)), "something was written twice, or not at all"


def test_files_on_it_are_not_compared(hosts: Lab) -> None:
    """The other host may remember an older size."""
    mount(hosts, "host2", "", "-o", "dcache_timeout=1000,attr_timeout=1000")
    hosts.sh("client", f"touch {EXPORT}/data/log")
    assert hosts.sh("host2", "stat -c %s /srv/data/log") == "0\n"
    start(hosts)
    assert hosts.sh("host2", "stat -c %s /srv/data/log") == "0\n"
    done = hosts.on("host1", "pymigrate", "validate", "web", "host2")
    assert done.stdout == "web can move to host2\n"


def test_an_export_that_is_not_mounted_or_another_one(hosts: Lab) -> None:
    start(hosts)
    here = f"and sshfs client:{EXPORT}/data at the source"
    hosts.sh("host2", "mkdir -p /srv/data")
    found = blocker(hosts)
    assert (found["rule"], found["where"]) == ("not-shared", "host2: /srv/data")
    assert found["problem"].startswith("is on ")
    assert found["problem"].endswith(f" there, {here}")
    hosts.sh("client", f"mkdir {EXPORT}/other/data")
    mount(hosts, "host2", "/other")
    found = blocker(hosts)
    assert (found["rule"], found["where"]) == ("not-shared", "host2: /srv/data")
    assert found["problem"] == f"is sshfs client:{EXPORT}/other/data there, {here}"
    hosts.sh("host2", "umount -l /srv")
    mount(hosts, "host2", "")
    hosts.sh("host2", "mount -t tmpfs hiding /srv && mkdir /srv/data")
    found = blocker(hosts)
    assert (found["rule"], found["problem"]) == ("not-shared", f"is on tmpfs hiding there, {here}")
    hosts.sh("host2", "umount /srv")
    done = hosts.on("host1", "pymigrate", "validate", "web", "host2")
    assert done.stdout == "web can move to host2\n"


def test_the_user_says_that_it_is_the_same(hosts: Lab) -> None:
    """The server has another name there; but something that is shared must be mounted all the same."""
    start(hosts)
    hosts.sh("host2", "mkdir /srv/data")
    shared = ("--volume", "/data=shared")
    found = blocker(hosts, *shared)
    assert (found["rule"], found["problem"]) == ("not-shared", "is on tmpfs srv there, and sshfs at the source")
    hosts.on("host2", "sshfs", f"root@client:{EXPORT}", "/srv")
    assert blocker(hosts)["problem"].startswith(f"is sshfs root@client:{EXPORT}/data there, and sshfs client:{EXPORT}")
    move(hosts, *shared)
