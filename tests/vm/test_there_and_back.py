"""To another kernel, another systemd and another bridge, and back to the first."""

from tests.vm import connected
from tests.vm.machines import Machines
from tests.workloads import bundle

WAYS = (("host1", "host2"), ("host2", "host1"))
# Each is a process of Python's, and without KVM memory goes at a few MiB a second.
HELD = (
    "clocks", "timerfd", "timerfd-absolute", "timerfd-wall-clock", "posix-timer", "sleeping", "other-user",
    "cgroup-memory-below",
)  # fmt: skip


def test_connections_go_on(pymigrate_on_both: Machines) -> None:
    """Of a container in a scope of systemd's, in whose root file system something is written all the time."""
    hosts = pymigrate_on_both
    config = connected.config()
    config["linux"]["cgroupsPath"] = "system.slice:pymigrate:web"
    config["linux"]["resources"]["pids"] = {"limit": 77}
    look = "systemctl show -P ControlGroup -P TasksMax pymigrate-web.scope"
    with connected.client(hosts) as client:
        bundle.start(hosts, config, "--systemd-cgroup")
        client.wait_connected()
        there = hosts.sh("host1", look)
        assert there.split() == ["/system.slice/pymigrate-web.scope", "77"]
        for source, target in WAYS:
            hosts.move(source, target, "--allow", "writable-rootfs")
            hosts.wait_count(target, hosts.count(target) + 10)
            assert hosts.sh(target, look) == there
            assert connected.interfaces(hosts, source) == []
            assert len(connected.interfaces(hosts, target)) == 1
        connected.assert_in_order(hosts, "host1")
    hosts.on("host1", "pymigrate", "delete", "--force", "web")
    assert connected.interfaces(hosts, "host1") == []


def test_what_a_container_holds(pymigrate_on_both: Machines) -> None:
    """What counts from the start of a machine: host2 is started anew for that. And processes of others."""
    hosts = pymigrate_on_both
    apart = int(hosts.sh("host1", "cut -d . -f 1 /proc/uptime"))  # seconds; at least
    hosts["host2"].power_off()
    hosts["host2"].power_on()
    config = bundle.checkers(*HELD)
    # The machine may be slow, so that timers are late; but a clock that jumps by what is between the two is noticed.
    config["process"]["env"] += ["SLEEP=40", f"LATE={apart - 5}"]
    bundle.start(hosts, config)
    kinds = bundle.ready(hosts, list(HELD))
    hosts["host2"].wait()
    print("uptime:", hosts.sh("host1", "cat /proc/uptime"), hosts.sh("host2", "cat /proc/uptime"))
    print("skipped:", sorted(set(HELD) - set(kinds)))
    for number, (source, target) in enumerate(WAYS, 1):
        hosts.move(source, target, "--allow", "seccomp", "--allow", "semaphore-undo")
        assert bundle.check(hosts, target, kinds, number) == dict.fromkeys(kinds, "ok")
