"""What a container holds beside memory and files: for each kind a program inside that sees whether it came along."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.preflight.rules import RULES
from tests.system.conftest import Lab
from tests.workloads import bundle


def names(text: str) -> list[str]:
    return text.split()


CARRIED = names("""
flock posix-lock ofd-lock lease inotify-tmpfs inotify-rootfs inotify-renamed inotify-other-name inotify-root
inotify-sysfs inotify-proc inotify-terminals inotify-queues fanotify fanotify-mount fanotify-handles
eventfd epoll epoll-closed-descriptor signalfd
pipes deleted-cwd pidfd aio open-namespace open-proc file-flags
cgroup-below cgroup-memory-below cgroup-unified-below thread-cgroup
pending-signals signal-handlers sysv-shm sysv-sem sysv-msg posix-shm robust-mutex contended-mutex
shared-anonymous shared-memory-in-motion private-after-fork memory-in-motion memfd advice
locked-memory locked-memory-on-fault
execute-only guard-and-growing
zombie stopped stopped-unreported sessions prctl-things keep-capabilities secure-bits no-huge-pages io-flusher
timer-slack core-dump-filter limits umask changed-root nice io-priority oom-score
affinity scheduling real-time reset-on-fork utilization-clamp time-slice threads membarrier cpu-registers
supplementary-groups environment
nested-network-namespace nested-mount-namespace seccomp-filter seccomp-strict no-foreign-keyring
unix-stream unix-datagram unix-seqpacket unix-listening-stream unix-listening-seqpacket unix-datagram-bound
udp udp-ipv6 tcp tcp-ipv6
clocks timerfd timerfd-absolute timerfd-wall-clock timerfd-never
timerfd-unread posix-timer interval-timer sleeping
""")
# By what rule `validate` refuses it.
REFUSED = {
    "io-uring": "io-uring",
    "userfaultfd": "special-file",
    "perf-event": "special-file",
    "bpf-map": "special-file",
    "bpf-program": "special-file",
    "secret-memory": "special-file",
    "seccomp-listener": "special-file",
    "huge-pages": "special-file",
    "inotify-unlinked": "watch",
    "inotify-one-shot": "watch",
    "inotify-covered": "watch",
    "fanotify-unlinked": "watch",
    "fanotify-file-system": "watch",
    "packet-pipe": "packet-pipe",
    "mqueue": "message-queue",
    "mqueue-closed": "message-queue",
    "deadline": "deadline",
    "inheritable-capability": "capabilities",
    "traced": "traced",
    "other-user": "other-uid",
    "other-group": "other-uid",
    "nested-pid-namespace": "nested-namespace",
    "nested-user-namespace": "nested-namespace",
    "nested-ipc-namespace": "nested-namespace",
    "nested-uts-namespace": "nested-namespace",
    "nested-cgroup-namespace": "nested-namespace",
    "nested-time-namespace": "nested-namespace",
    "time-namespace-for-children": "nested-namespace",
    "pid-namespace-for-children": "nested-namespace",
    "thread-namespace": "nested-namespace",
    "threaded-cgroup": "threaded-cgroup",
    "eventfd-semaphore": "eventfd-semaphore",
    "sysv-sem-undo": "semaphore-undo",
    "personality": "personality",
    "protection-keys": "protection-key",
    "speculation": "speculation",
    "speculation-forced": "speculation",
    "session-keyring": "keyring",
}
# CRIU kills what it has restored of it, and then waits for its end in vain.
HANGS = names("inheritable-capability")
# The kernel shows it to nobody else, or it does no harm: docs/carried.md says so.
LOST = names("""
inotify-pending dnotify mlock-future machine-check-kill deny-write-execute memory-merge no-time-stamp-counter
system-call-dispatch landlock process-keyring cpu-clock start-times udp-unread
""")
# With mounts of the host's: system/preflight/test_watches.py.
WATCHES = names("inotify-overlay inotify-bound inotify-volume-unlinked inotify-unmounted")


@pytest.fixture
def programs() -> Iterator[dict[str, Any]]:
    """All kinds that there are programs for."""
    place = str(Path(bundle.__file__).parent)
    sys.path.insert(0, place)
    try:
        import harness  # type: ignore[import-not-found]
        import main  # type: ignore[import-not-found]

        assert main.MODULES
        yield harness.KINDS
    finally:
        sys.path.remove(place)


def move(lab: Lab, source: str, target: str, *options: str) -> list[dict[str, Any]]:
    """The events of a move."""
    done = lab.on(source, "pymigrate", "--json", "move", *options, "web", target)
    return [json.loads(line) for line in done.stdout.splitlines()]


def rules(lab: Lab, *options: str, container: str = "web") -> list[str]:
    done = lab.on("host1", "pymigrate", "--json", "validate", *options, container, check=False)
    return [blocker["rule"] for blocker in json.loads(done.stdout)["blockers"]]


def test_each_program_is_used(programs: dict[str, Any]) -> None:
    assert sorted(programs) == sorted([*CARRIED, *REFUSED, *LOST, *WATCHES])


def test_all_that_is_carried_comes_along_and_back(lab: Lab) -> None:
    bundle.start(lab, bundle.checkers(*CARRIED))
    kinds = bundle.ready(lab, CARRIED)
    # A process with threads is suspected of SEM_UNDO where there are System V semaphores.
    found = rules(lab)
    assert set(found) == {"seccomp", "semaphore-undo"}, lab.on(
        "host1", "pymigrate", "validate", "web", check=False
    ).stdout
    fine = dict.fromkeys(kinds, "ok")
    allow = ("--allow", "seccomp", "--allow", "semaphore-undo")
    move(lab, "host1", "host2", *allow)
    assert bundle.check(lab, "host2", kinds) == fine
    move(lab, "host2", "host1", *allow)
    assert bundle.check(lab, "host1", kinds, 2) == fine


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_would_fail_or_be_lost(lab: Lab, kind: str) -> None:
    """The rule fires; with `checkpoint`, which asks no rules, CRIU fails or the program misses what it had."""
    # Hosts of all labs share the kernel's keyrings, and the rule `keyring` goes by the name, which has the id.
    name = "refused"
    bundle.start(lab, bundle.checkers(kind), container=name)
    if not bundle.ready(lab, [kind], name):
        pytest.skip("this kernel does not let it be made")
    found = rules(lab, container=name)
    if kind == "other-user" and not found:
        pytest.skip("root of this machine may carry other users' processes")
    assert set(found) - {"seccomp"} == {REFUSED[kind]}
    if kind in HANGS:
        return
    if REFUSED[kind] == "special-file":  # hardly any of them can just be closed
        said = lab.on("host1", "pymigrate", "validate", name, check=False).stdout
        assert RULES["special-file"].remedy not in said
    images = ("--image-path", "/var/lib/pymigrate/images", "--work-path", "/var/lib/pymigrate/work")
    if lab.on("host1", "pymigrate", "checkpoint", *images, name, check=False).returncode == 0:
        restored = lab.on(
            "host1", "pymigrate", "restore", "-d", "-b", "/var/lib/pymigrate/test/web", *images, name, check=False
        )  # fmt: skip
        if restored.returncode == 0:
            assert bundle.check(lab, "host1", [kind], container=name)[kind].startswith("failed")


def test_what_is_documented_as_lost_is_lost(lab: Lab) -> None:
    """And it does not keep a container from moving. Of events that are lost there is a warning."""
    bundle.start(lab, bundle.checkers(*LOST))
    kinds = bundle.ready(lab, LOST)
    assert rules(lab) == []
    warnings = [event for event in move(lab, "host1", "host2") if event["event"] == "warning"]
    said = bundle.check(lab, "host2", kinds)
    assert [kind for kind, words in said.items() if words == "ok"] == []
    assert "inotify" in json.dumps(warnings)


def test_ipc_of_the_host_would_stay_behind(lab: Lab) -> None:
    config = bundle.checkers("flock")
    config["linux"]["namespaces"] = [entry for entry in config["linux"]["namespaces"] if entry["type"] != "ipc"]
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "mqueue"]
    bundle.start(lab, config)
    bundle.ready(lab, ["flock"])
    assert (rules(lab), rules(lab, "--allow", "host-ipc")) == (["host-ipc"], [])


IDS = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def test_in_a_user_namespace(lab: Lab) -> None:
    """Where processes of several users are carried by any root."""
    wanted = names("""
        flock posix-lock inotify-tmpfs eventfd epoll signalfd pending-signals sysv-shm sysv-sem sysv-msg posix-shm
        shared-anonymous memfd zombie stopped sessions threads timerfd posix-timer clocks affinity io-priority
        timer-slack core-dump-filter other-user supplementary-groups limits
    """)
    config = bundle.checkers(*wanted)
    config["linux"]["namespaces"].append({"type": "user"})
    config["linux"] |= {"uidMappings": IDS, "gidMappings": IDS, "resources": {}}
    bundle.start(lab, config, uid=100000)
    kinds = bundle.ready(lab, wanted)
    fine = dict.fromkeys(kinds, "ok")
    allow = ("--allow", "semaphore-undo")
    move(lab, "host1", "host2", *allow)
    assert bundle.check(lab, "host2", kinds) == fine
    move(lab, "host2", "host1", *allow)
    assert bundle.check(lab, "host1", kinds, 2) == fine


def limits(lab: Lab, host: str) -> dict[str, str]:
    """Every limit of the container's cgroup."""
    names = "pids.max memory.limit_in_bytes memory.max cpu.shares cpu.weight cpu.cfs_quota_us cpu.max cpuset.cpus"
    names += " memory.soft_limit_in_bytes memory.low"
    script = f"for n in {names}; do for f in $(find /sys/fs/cgroup -path '*/pymigrate/web/*' -name $n); do "
    lines = lab.sh(host, script + "echo $f $(cat $f); done; done").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def test_limits_that_were_changed_come_along(lab: Lab) -> None:
    config = bundle.checkers("flock")
    config["linux"]["resources"] |= {"memory": {"limit": 256 << 20}, "pids": {"limit": 50}, "cpu": {"shares": 300}}
    bundle.start(lab, config)
    bundle.ready(lab, ["flock"])
    lab.on("host1", "pymigrate", "update", "--memory", "512m", "--pids-limit", "77", "--cpu-quota", "40000", "web")
    lab.on("host1", "pymigrate", "update", "--memory", "400m", "--cpu-period", "90000", "--cpuset-cpus", "0", "web")
    before = limits(lab, "host1")
    assert {str(400 << 20), "77"} <= set(before.values())
    move(lab, "host1", "host2")
    assert limits(lab, "host2") == before
    lab.on("host2", "pymigrate", "snapshot", "save", "--stop", "web", "/var/lib/pymigrate/kept")
    lab.on("host2", "pymigrate", "delete", "web")
    lab.on("host2", "pymigrate", "snapshot", "restore", "/var/lib/pymigrate/kept")
    assert limits(lab, "host2") == before
    lab.on("host2", "pymigrate", "update", "--pids-limit", "78", "web")
    move(lab, "host2", "host1")
    after = limits(lab, "host1")
    assert {name for name in after if after[name] != before[name]} == {name for name in after if "pids" in name}


HOOK = 'read state; echo "$1 $2 $state $(readlink /proc/self/ns/net)" >> /run/hooks'
POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def hooks(lab: Lab, host: str) -> list[tuple[str, dict[str, Any]]]:
    """Which hooks have run at a host: point and state."""
    lines = lab.sh(host, "cat /run/hooks 2>/dev/null; rm -f /run/hooks", check=False).splitlines()
    found = []
    for line in lines:
        _, point, rest = line.split(" ", 2)
        found.append((point, json.loads(rest.rpartition(" ")[0])))
    return found


def hook(point: str, script: str = HOOK) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script, "sh", "hook", point], "timeout": 10}


def test_hooks_of_both_sides(lab: Lab) -> None:
    """The target is prepared as at `create`, the source cleaned up as at `delete`; the program does not start again."""
    lab.run(hooks={point: [hook(point)] for point in POINTS if point != "startContainer"})
    before = lab.wait_count("host1", 3)
    assert [point for point, _ in hooks(lab, "host1")] == ["prestart", "createRuntime", "createContainer", "poststart"]
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", before)
    assert [(point, state["status"], state["pid"]) for point, state in hooks(lab, "host1")] == [
        ("poststop", "stopped", 0)
    ]
    ran = hooks(lab, "host2")
    pid = lab.state("host2")["pid"]
    assert [(point, state["status"], state["pid"]) for point, state in ran] == [
        ("prestart", "creating", pid), ("createRuntime", "creating", pid),
    ]  # fmt: skip
    assert ran[0][1]["bundle"] == "/var/lib/pymigrate/bundles/web"
    lab.on("host2", "pymigrate", "delete", "-f", "web")
    assert [point for point, _ in hooks(lab, "host2")] == ["poststop"]


def test_a_hook_that_fails_at_the_target_leaves_the_container_where_it_is(lab: Lab) -> None:
    failing = HOOK + "; [ $(hostname) = host1 ]"
    lab.run(hooks={"createRuntime": [hook("createRuntime", failing)], "poststop": [hook("poststop")]})
    before = lab.wait_count("host1", 3)
    hooks(lab, "host1")
    done = lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
    assert done.returncode == 10
    assert "hooks.createRuntime[0] (/bin/sh): exit status 1" in done.stderr
    lab.wait_count("host1", before)
    assert hooks(lab, "host1") == []
    assert [point for point, _ in hooks(lab, "host2")] == ["createRuntime", "poststop"]
    assert lab.leftovers("host2") == ""


def test_a_hook_at_the_target_ends_when_the_container_may_not_be_frozen_any_longer(lab: Lab) -> None:
    slow = {**hook("createRuntime", "[ $(hostname) = host1 ] || exec sleep 1000"), "timeout": 1000}
    lab.run(hooks={"createRuntime": [slow]})
    before = lab.wait_count("host1", 3)
    done = lab.on("host1", "pymigrate", "move", "--timeout", "2", "web", "host2", check=False)
    assert done.returncode == 10
    assert "hooks.createRuntime[0] (/bin/sh)" in done.stderr, done.stderr
    lab.wait_count("host1", before)
    assert lab.leftovers("host2") == ""


def test_a_hook_that_the_target_lacks_is_found_before(lab: Lab) -> None:
    lab.sh("host1", "printf '#!/bin/sh\\nexit 0\\n' > /var/lib/pymigrate/hook; chmod 755 /var/lib/pymigrate/hook")
    lab.run(hooks={"createRuntime": [{"path": "/var/lib/pymigrate/hook"}]})
    lab.wait_count("host1", 0)
    done = lab.on("host1", "pymigrate", "--json", "validate", "web", "host2", check=False)
    assert [(b["rule"], b["where"]) for b in json.loads(done.stdout)["blockers"]] == [
        ("missing-source", "host2: /var/lib/pymigrate/hook")
    ]
