"""Watches of files on mounts that the host has made: by what name CRIU finds them, and where it finds none."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.system.conftest import Lab
from tests.system.move.test_holds import move
from tests.workloads import bundle

DISK = "/tmp/pymigrate-watches"

OVERLAY = {
    "destination": "/overlay", "type": "overlay", "source": "overlay",
    "options": ["lowerdir=/srv/lower,upperdir=/srv/upper,workdir=/srv/work"],
}  # fmt: skip


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Lab]:
    """/srv is a tmpfs of each host's own, `DISK` lies on the disk that they share."""
    for host in ("host1", "host2"):
        lab.sh(host, "mount -t tmpfs -o mode=755 srv /srv")
    lab.sh("host1", f"mkdir {DISK}; cd {DISK}; echo x > file; cp -p file copy; touch /var/lib/pymigrate/bound")
    yield lab
    lab.sh("host1", f"rm -rf {DISK}")
    for host in ("host1", "host2"):
        lab.sh(host, "for i in $(pymigrate list -q); do pymigrate delete -f $i; done; umount /srv")


def bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["bind", *options]}


def start(hosts: Lab, *kinds: str, mounts: Sequence[dict[str, Any]] = ()) -> list[str]:
    config = bundle.checkers(*kinds)
    config["mounts"] += mounts
    bundle.start(hosts, config)
    return bundle.ready(hosts, list(kinds))


@pytest.mark.slow
def test_a_file_without_handles_and_one_that_is_bound_by_itself_stay_watched(hosts: Lab) -> None:
    """The names go along, no handles: another file lies at the target."""
    hosts.sh("host1", "mkdir /srv/lower /srv/upper /srv/work")
    kinds = start(
        hosts, "inotify-overlay", "inotify-bound", mounts=[OVERLAY, bind(f"{DISK}/file", "/bound", "ro")]
    )  # fmt: skip
    fine = dict.fromkeys(["inotify-overlay", "inotify-bound"], "ok")
    move(hosts, "host1", "host2", "--allow", "seccomp", "--volume", f"/bound={DISK}/copy")
    assert bundle.check(hosts, "host2", kinds) == fine
    move(hosts, "host2", "host1", "--allow", "seccomp", "--volume", f"/bound={DISK}/file")
    assert bundle.check(hosts, "host1", kinds, 2) == fine


@pytest.mark.parametrize("stop", [[], ["--stop"]])
def test_a_snapshot_keeps_watches_of_files_without_handles(lab: Lab, stop: list[str]) -> None:
    kinds = start(lab, "inotify-proc", "inotify-sysfs")
    place = "/var/lib/pymigrate/web.snapshot"
    lab.on("host1", "pymigrate", "snapshot", "save", "--allow", "seccomp", *stop, "web", place)
    lab.sh("host1", "pymigrate delete -f web; true")
    lab.on("host1", "pymigrate", "snapshot", "restore", place)
    assert bundle.check(lab, "host1", kinds) == dict.fromkeys(kinds, "ok")


@pytest.mark.parametrize(
    ("kind", "mount", "words"),
    [
        # CRIU would dump its handle, which is nothing anywhere else.
        pytest.param("inotify-volume-unlinked", bind(DISK, "/volume"), r"/ \(deleted\) \(.*\), {}", id="removed"),
        # Its handle can be opened on the root file system, and leads to a name that is not in the container.
        pytest.param(
            "inotify-bound", bind("/var/lib/pymigrate/bound", "/bound"), r"/bound \(.*\), {}", id="bound-on-tmpfs"
        ),
        pytest.param(
            "inotify-unmounted",
            bind("/srv", "/volume"),
            r"inode \d+ of .*, which is not mounted in the container",
            id="unmounted",
        ),
    ],
)
def test_what_has_no_name(hosts: Lab, kind: str, mount: dict[str, Any], words: str) -> None:
    """Process, descriptor and path are named; with `checkpoint`, which asks no rules, CRIU fails or loses it."""
    start(hosts, kind, mounts=[mount])
    options = ("--volume", f"{mount['destination']}=shared", "--allow", "seccomp")
    done = hosts.on("host1", "pymigrate", "--json", "validate", *options, "web", check=False)
    (blocker,) = json.loads(done.stdout)["blockers"]
    assert blocker["rule"] == "watch"
    assert re.fullmatch(r"process \d+ \(python3\), descriptor \d+", blocker["where"])
    assert re.fullmatch("watches " + words.format("whose name CRIU cannot find in the container"), blocker["problem"])
    images = ("--image-path", "/var/lib/pymigrate/images", "--work-path", "/var/lib/pymigrate/work")
    if hosts.on("host1", "pymigrate", "checkpoint", *images, "web", check=False).returncode == 0:
        hosts.on("host1", "pymigrate", "restore", "-d", "-b", bundle.PLACE, *images, "web")
        assert bundle.check(hosts, "host1", [kind])[kind].startswith("failed")
