"""Moves between two machines with kernels of their own, systemd and cgroup version 2, to a target that is bare."""

import json
from typing import Any

from runtime.default_spec import default_spec
from tests.vm.machines import Machines


def move(machines: Machines, *, target: str = "host2") -> dict[str, Any]:
    done = machines.on("host1", "pymigrate", "--json", "move", "web", target)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["workload"] == "TARGET"
    return report


def linux(cgroups_path: str, **resources: Any) -> dict[str, Any]:
    """The default `linux` of config.json with another cgroup and limits."""
    section: dict[str, Any] = default_spec()["linux"]
    section["resources"] |= resources
    section["cgroupsPath"] = cgroups_path
    return section


def test_the_target_is_bare(machines: Machines) -> None:
    """What the other tests rest on: nothing of ours is installed at host2, and nothing that only helps."""
    found = machines.sh(
        "host2", "command -v pymigrate pip3 ip nft runc; python3 -c 'import google.protobuf'", check=False
    )
    assert found == ""
    assert "systemd" in machines.sh("host2", "cat /proc/1/comm")
    assert machines.sh("host1", "stat -f -c %T /sys/fs/cgroup; stat -f -c %T /run").split() == ["cgroup2fs", "tmpfs"]


def test_limits_hold_in_a_systemd_slice(machines: Machines) -> None:
    """cgroup version 2, the container in system.slice: the same place, the same limits, before and after."""
    group = "/system.slice/web"
    machines.run(linux=linux(group, memory={"limit": 100 << 20}, pids={"limit": 77}, cpu={"shares": 512}))
    before = machines.wait_count("host1", 1)
    look = f"cd /sys/fs/cgroup{group}; cat memory.max pids.max cpu.weight; cat /proc/$(head -n 1 cgroup.procs)/cgroup"
    there = machines.sh("host1", look).split()
    assert there[:2] == [str(100 << 20), "77"]
    assert there[3:] == [f"0::{group}"]
    move(machines)
    machines.wait_count("host2", before)
    assert machines.sh("host2", look).split() == there
    inside = machines.on("host2", "pymigrate", "exec", "web", "cat", "/proc/1/cgroup", "/sys/fs/cgroup/memory.max")
    assert inside.stdout.split() == ["0::/", str(100 << 20)]
    assert machines.sh("host1", "find /sys/fs/cgroup -name 'web*'") == ""
