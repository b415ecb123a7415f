"""Moves between two machines with kernels of their own, systemd and cgroup version 2, to a target that is bare."""

import json
from typing import Any

import pytest

from runtime.spec.default import default_spec
from tests.support.hosts import COUNT
from tests.vm.machines import AGENT, Machines


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


def test_a_bare_target_can_look_after_what_comes(machines: Machines) -> None:
    """Nothing of ours is installed at host2, nor what only helps; yet whoever logs in there has the verbs."""
    for program in ("pymigrate", "pip3", "ip", "nft", "runc"):
        assert machines.on("host2", "sh", "-c", f"command -v {program}", check=False).returncode == 127, program
    assert machines.sh("host2", "cat /proc/1/comm") == "systemd\n"
    assert machines.sh("host1", "stat -f -c %T /sys/fs/cgroup") == "cgroup2fs\n"
    machines.run()
    before = machines.wait_count("host1", 1)
    move(machines)
    assert machines.ids("host2") == ["web"]
    assert machines.on("host2", "pymigrate", "exec", "web", "echo", "here").stdout == "here\n"
    machines.on("host2", "pymigrate", "snapshot", "save", "--stop", "web", "/root/web.snapshot")
    machines.on("host2", "pymigrate", "delete", "web")
    machines.on("host2", "pymigrate", "snapshot", "restore", "/root/web.snapshot")
    machines.sh("host2", "rm -rf /root/web.snapshot")
    machines.wait_count("host2", before)
    back = machines.on("host2", "pymigrate", "move", "web", "host1", check=False)
    assert back.returncode == 1
    assert "the Python module paramiko is not installed" in back.stderr
    assert "Traceback" not in back.stderr


def test_a_unit_of_systemd_goes_along(machines: Machines) -> None:
    """A container whose cgroup systemd has made is in a scope of systemd's at the target, too."""
    place = "/var/lib/pymigrate/test/web"
    machines.run(linux=linux("system.slice:pymigrate:web", pids={"limit": 77}), start=False)
    machines.on("host1", "pymigrate", "--systemd-cgroup", "run", "-d", "-b", place, "web")
    before = machines.wait_count("host1", 1)
    look = "systemctl show -p ControlGroup -p TasksMax pymigrate-web.scope"
    there = machines.sh("host1", look)
    assert sorted(there.split()) == ["ControlGroup=/system.slice/pymigrate-web.scope", "TasksMax=77"]
    move(machines)
    machines.wait_count("host2", before)
    assert machines.sh("host2", look) == there
    assert "ControlGroup=\n" in machines.sh("host1", look) + "\n"
    machines.on("host2", "pymigrate", "delete", "--force", "web")
    assert "ControlGroup=\n" in machines.sh("host2", look) + "\n"


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


# Init leaves the container's cgroup, which then gives controllers to those below it; a job lies two levels down.
_SUB_CGROUPS = f"""
cd /sys/fs/cgroup
mkdir main jobs jobs/a empty && echo 0 > main/cgroup.procs && echo '+pids +memory' > cgroup.subtree_control
echo +pids > jobs/cgroup.subtree_control && echo 34M > jobs/memory.high && echo 11 > jobs/a/pids.max
echo 12 > empty/pids.max && echo 3 > main/cgroup.max.depth && chmod 775 jobs/a
sh -c 'echo 0 > jobs/a/cgroup.procs && exec sleep 100000' & echo $! > /tmp/job
{COUNT}"""
_LOOK = """
cat /proc/1/cgroup /proc/$(cat /tmp/job)/cgroup
cd /sys/fs/cgroup && find . -type d | sort | while read group; do
    stat -c '%n %u %g %a' $group $group/cgroup.procs
    cd $group && grep -H . cgroup.subtree_control cgroup.max.depth pids.max memory.max memory.high; cd /sys/fs/cgroup
done"""


@pytest.mark.parametrize("systemd", [False, True], ids=["own", "systemd"])
def test_cgroups_below_the_containers_go_along(machines: Machines, systemd: bool) -> None:
    """Made inside, with limits, owners and controllers of their own; what `update` has set holds at the target, too."""
    group, flags = "/pymigrate/web", []
    section = linux(group, memory={"limit": 100 << 20}, pids={"limit": 77})
    if systemd:
        group, flags = "/system.slice/pymigrate-web.scope", ["--systemd-cgroup"]
        section["cgroupsPath"] = "system.slice:pymigrate:web"
    mounts = default_spec()["mounts"]
    next(mount for mount in mounts if mount["type"] == "cgroup")["options"].remove("ro")
    machines.run(script=_SUB_CGROUPS, linux=section, mounts=mounts, start=False)
    machines.on("host1", "pymigrate", *flags, "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    before = machines.wait_count("host1", 1)
    machines.sh("host1", f"chown 5:6 /sys/fs/cgroup{group}/jobs/a /sys/fs/cgroup{group}/jobs/a/cgroup.procs")
    machines.on("host1", "pymigrate", "update", "--memory", "120m", "--pids-limit", "55", "web")
    there = machines.on("host1", "pymigrate", "exec", "web", "sh", "-c", _LOOK).stdout
    for line in (
        "0::/main", "0::/jobs/a", "./jobs/a 5 6 775", "./jobs/a/cgroup.procs 5 6 644", "pids.max:55", "pids.max:11",
        f"memory.max:{120 << 20}", f"memory.high:{34 << 20}", "pids.max:12", "cgroup.max.depth:3",
    ):  # fmt: skip
        assert line in there.splitlines()
    move(machines)
    machines.wait_count("host2", before)
    assert machines.on("host2", "pymigrate", "exec", "web", "sh", "-c", _LOOK).stdout == there
    machines.on("host2", "pymigrate", "update", "--pids-limit", "44", "web")
    assert machines.sh("host2", f"cat /sys/fs/cgroup{group}/pids.max") == "44\n"
    machines.on("host2", "pymigrate", "delete", "--force", "web")
    for host in ("host1", "host2"):
        assert machines.sh(host, "find /sys/fs/cgroup -name '*web*'") == ""


# A host inside a unit of host2's: cgroup namespace and cgroup mount of its own, and an sshd to come in by.
_INNER_HOST = """
systemd-run --quiet --unit inner --property Delegate=yes --property KillMode=process unshare --cgroup --mount sh -c '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir /sys/fs/cgroup/init
    echo 0 > /sys/fs/cgroup/init/cgroup.procs
    exec /usr/sbin/sshd -D -p 2222'
"""


def test_the_cgroup_lies_elsewhere_at_the_target(machines: Machines) -> None:
    """The target's cgroups begin in a unit of its systemd: another path there, the same view from inside."""
    machines.run(linux=linux("/workloads/web", pids={"limit": 77}))
    try:
        machines.sh("host2", _INNER_HOST)
        machines.sh(
            "host1",
            "printf 'Host inner\\nHostName host2\\nPort 2222\\nHostKeyAlias host2\\n' > ~/.ssh/config; "
            "for i in $(seq 100); do ssh inner true && exit; sleep 0.2; done; exit 1",
        )
        before = machines.wait_count("host1", 1)
        move(machines, target="inner")
        machines.wait_count("host2", before)
        pid = machines.state("host2")["pid"]
        real = machines.on("host2", "cat", f"/proc/{pid}/cgroup").stdout
        assert real == "0::/system.slice/inner.service/workloads/web\n"
        on_inner = f"ssh inner python3 {AGENT}"
        inside = machines.sh("host1", f"{on_inner} exec web cat /proc/1/cgroup /sys/fs/cgroup/pids.max")
        assert inside.split() == ["0::/", "77"]
        machines.sh("host1", f"{on_inner} delete --force web")
    finally:
        machines.sh("host2", "systemctl stop inner", check=False)
        machines.sh("host1", "rm -f ~/.ssh/config")


def test_processes_of_other_users(machines: Machines) -> None:
    """An init of uid 1000 that has supplementary groups; below a root's, a process of uid 33 that listens."""
    process = default_spec()["process"]
    user = {"uid": 1000, "gid": 1000, "additionalGids": [2000, 2001]}
    machines.run(container="user", process=process | {"user": user})
    capabilities = [*process["capabilities"]["bounding"], "CAP_SETUID", "CAP_SETGID"]
    process["capabilities"] = dict.fromkeys(process["capabilities"], capabilities)
    machines.run(process=process, script=f"httpd -f -u 33:34 -p 127.0.0.1:8033 & {COUNT}")
    look = "grep -hE '^(Name|Uid|Gid|Groups|Cap)' /proc/{}/status"
    looks = {"user": look.format("1"), "web": look.format("[12]")}
    seen = {}
    for name in looks:
        before = machines.wait_count("host1", 1, name)
        seen[name] = machines.on("host1", "pymigrate", "exec", name, "sh", "-c", looks[name]).stdout
        machines.on("host1", "pymigrate", "move", name, "host2")
        machines.wait_count("host2", before, name)
    assert "Uid:\t1000\t1000\t1000\t1000\n" in seen["user"]
    assert "Groups:\t2000 2001" in seen["user"]
    assert "Uid:\t33\t33\t33\t33\nGid:\t34\t34\t34\t34\n" in seen["web"]
    for name, there in seen.items():
        assert machines.on("host2", "pymigrate", "exec", name, "sh", "-c", looks[name]).stdout == there


def test_the_container_outlives_the_unit_it_came_in_by(machines: Machines) -> None:
    """All of sshd's unit is killed, in which the agent ran and started the monitor: the container writes on."""
    machines.run()
    before = machines.wait_count("host1", 1)
    move(machines)
    machines.wait_count("host2", before)
    main_pid = machines.sh("host2", "systemctl show -P MainPID ssh.service")
    machines.sh("host2", "systemctl kill --kill-who=all --signal=KILL ssh.service", check=False)
    machines["host2"].wait()
    assert machines.sh("host2", "systemctl show -P MainPID ssh.service") != main_pid
    machines.wait_count("host2", machines.count("host2"))
