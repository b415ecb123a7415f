"""Moves of containers that are made in other ways than the default: there and back, counting on."""

from typing import Any

import pytest

from runtime.spec.default import default_spec
from tests.system.conftest import Lab

IDS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
FILTER = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}


def linux(*kinds: str, **fields: Any) -> dict[str, Any]:
    """The default `linux` object with namespaces added ("+time") or left out ("-cgroup"), and fields replaced."""
    value = default_spec()["linux"]
    for kind in kinds:
        value["namespaces"] = [entry for entry in value["namespaces"] if entry["type"] != kind[1:]]
        value["namespaces"] += [{"type": kind[1:]}] if kind[0] == "+" else []
    return {**value, **fields}


@pytest.mark.parametrize(
    ("fields", "allow"),
    [
        (linux(seccomp=FILTER), ["--allow", "seccomp"]),
        (linux("+user", uidMappings=IDS, gidMappings=IDS, resources={}), []),
        (linux("+time", timeOffsets={"monotonic": {"secs": 1000}}), []),
        (linux("-cgroup"), []),
    ],
    ids=["seccomp", "user-namespace", "time-namespace", "no-cgroup-namespace"],
)
def test_there_and_back(lab: Lab, fields: dict[str, Any], allow: list[str]) -> None:
    place = "/var/lib/pymigrate/test/web"
    if "uidMappings" in fields:
        lab.run(linux=fields, start=False)
        lab.sh("host1", f"chown -R 100000:100000 {place}/rootfs")
        lab.on("host1", "pymigrate", "run", "-d", "-b", place, "web")
    else:
        lab.run(linux=fields)
    before = lab.wait_count("host1", 5)
    lab.on("host1", "pymigrate", "move", *allow, "web", "host2")
    lab.wait_count("host2", before)
    assert lab.ids("host1") == []
    before = lab.count("host2")
    lab.on("host2", "pymigrate", "move", *allow, "web", "host1")
    lab.wait_count("host1", before)
    numbers = lab.numbers("host1")
    assert numbers == list(range(1, len(numbers) + 1))
    inside = {
        "seccomp": ("mkdir /tmp/x 2>&1; true", "Operation not permitted"),
        "uidMappings": ("cat /proc/self/uid_map", "100000"),
        "timeOffsets": ("cat /proc/self/timens_offsets", "monotonic"),
    }
    for field, (command, expected) in inside.items():
        if field in fields:
            assert expected in lab.on("host1", "pymigrate", "exec", "web", "sh", "-c", command).stdout


def test_a_container_with_the_hosts_pids_cannot_move(lab: Lab) -> None:
    lab.run(linux=linux("-pid"))
    done = lab.on("host1", "pymigrate", "validate", "web", check=False)
    assert (done.returncode, "host-pid: config.json: linux.namespaces" in done.stderr + done.stdout) == (3, True)
