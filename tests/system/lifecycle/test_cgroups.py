"""Control groups of this machine: limits in real files, devices that really open or do not, races."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.cgroups import devices
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.hierarchies import UNIFIED, discover, owner_of
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, StartFailed
from runtime.spec.fields import Fields
from runtime.spec.resources import DeviceRule, Resources, parse_resources

MIB = 1 << 20
NAME = f"test-cgroups-{os.getpid()}"


def parsed(**resources: Any) -> Resources:
    return parse_resources(Fields(resources, "config.json", "linux.resources"))


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    made = Cgroup.create(NAME, None)
    made.release_claim()
    yield made
    made.kill()
    made.remove()
    assert not any(map(os.path.exists, made.directories()))


@pytest.fixture
def v1(cgroup: Cgroup) -> Cgroup:
    if "memory" not in cgroup.paths:
        pytest.skip("this machine has no version 1 controllers")
    return cgroup


@contextmanager
def child(cgroup: Cgroup, code: str) -> "Iterator[subprocess.Popen[str]]":
    """A Python program in the cgroup, which goes on when a line is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", f"import os, sys, time\nsys.stdin.readline()\n{code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        cgroup.add(process.pid)
        yield process
    finally:
        process.kill()
        process.communicate()


def go_on(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def file(cgroup: Cgroup, controller: str, name: str) -> str:
    return Path(cgroup.paths[controller], name).read_text().strip()


def test_memory_and_swap_go_up_and_down(v1: Cgroup) -> None:
    """Neither order of the two files does for both ways."""
    for limit in (100, 400, 20, 200):
        v1.apply(parsed(memory={"limit": limit * MIB, "swap": limit * MIB + MIB}))
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        assert [int(file(v1, "memory", name)) for name in names] == [limit * MIB, limit * MIB + MIB]
    v1.apply(parsed(memory={"limit": -1}))
    assert int(file(v1, "memory", "memory.memsw.limit_in_bytes")) > 1 << 60


def test_quota_period_and_burst_go_up_and_down(v1: Cgroup) -> None:
    for quota, period, burst in ((50000, 100000, 50000), (5000, 10000, 1000), (900000, 1000000, 900000)):
        v1.apply(parsed(cpu={"quota": quota, "period": period, "burst": burst}))
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us")
        assert [int(file(v1, "cpu", name)) for name in names] == [quota, period, burst]


def test_only_what_is_set_changes(v1: Cgroup) -> None:
    v1.apply(parsed(memory={"limit": 64 * MIB, "swappiness": 7}, pids={"limit": 9}, cpu={"cpus": "0", "shares": 99}))
    v1.apply(parsed(pids={"limit": 10}))
    assert file(v1, "pids", "pids.max") == "10"
    assert file(v1, "memory", "memory.limit_in_bytes") == str(64 * MIB)
    assert (file(v1, "memory", "memory.swappiness"), file(v1, "cpu", "cpu.shares")) == ("7", "99")
    v1.apply(parsed(cpu={"idle": 1, "shares": 5}))
    v1.apply(parsed(cpu={"idle": 0, "shares": 5}))
    assert (file(v1, "cpu", "cpu.idle"), file(v1, "cpu", "cpu.shares")) == ("0", "5")


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"memory": {"useHierarchy": False}}, r"linux\.resources\.memory\.useHierarchy: cannot write"),
        ({"rdma": {"mlx": {"hcaHandles": 1}}}, r"linux\.resources\.rdma\.mlx: this host has no rdma cgroup"),
        ({"blockIO": {"leafWeight": 10}}, r"linux\.resources\.blockIO\.leafWeight: there is no blkio\.leaf_weight"),
        ({"unified": {"memory.max": "5"}}, r"linux\.resources\.unified\.memory\.max: there is no memory\.max"),
        ({"cpu": {"cpus": "4095"}}, r"linux\.resources\.cpu\.cpus: cannot write '4095'"),
    ],
)
def test_what_the_kernel_lacks_is_refused_by_name(v1: Cgroup, resources: dict[str, Any], words: str) -> None:
    with pytest.raises(ContainerError, match=words):
        v1.apply(parsed(**resources))


OPEN = """
for name, flags in (("zero", os.O_RDONLY), ("full", os.O_RDONLY), ("full", os.O_RDWR), ("kmsg", os.O_RDONLY)):
    try: os.close(os.open("/dev/" + name, flags)); print(f"{name}{flags}")
    except PermissionError: pass
"""
DENY_ALL = {"allow": False}
KMSG = {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}


def opened(cgroup: Cgroup) -> list[str]:
    with child(cgroup, OPEN) as process:
        out, _ = process.communicate("\n", timeout=30)
    return out.split()


def test_device_rules_hold_and_change_without_a_gap(v1: Cgroup) -> None:
    v1.apply(parsed(devices=[DENY_ALL, KMSG]))
    assert opened(v1) == ["zero0", "full0", "full2", "kmsg0"]
    # A running container goes on: the kernel would refuse "deny all" now, because of the cgroup below.
    below = Path(v1.paths["devices"], "below")
    below.mkdir()
    v1.apply(parsed(devices=[DENY_ALL]))
    below.rmdir()
    assert opened(v1) == ["zero0", "full0", "full2"]


def test_device_rules_can_be_lifted(v1: Cgroup) -> None:
    v1.apply(parsed(devices=[DENY_ALL]))
    v1.apply(parsed(devices=[{"allow": True}]))
    assert "kmsg0" in opened(v1)


@pytest.fixture
def unified() -> Iterator[str]:
    """A version 2 cgroup; it need not have controllers, BPF programs go to any."""
    mounts = [hierarchy.mountpoint for hierarchy in discover() if hierarchy.controllers == (UNIFIED,)]
    if not mounts:
        pytest.skip("no version 2 hierarchy is mounted")
    directory = Path(mounts[0], NAME)
    directory.mkdir()
    yield str(directory)
    directory.rmdir()


def rules(*values: dict[str, Any]) -> Sequence[DeviceRule]:
    return parsed(devices=list(values)).devices


FULL_R, FULL_W = ({"type": "c", "major": 1, "minor": 7, "access": access} for access in "rw")
ALL_CHARS = {"allow": True, "type": "c", "access": "rwm"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([DENY_ALL], []),
        ([DENY_ALL, {"allow": True}], ["zero0", "full0", "full2", "kmsg0"]),
        ([DENY_ALL, ALL_CHARS], ["zero0", "full0", "full2", "kmsg0"]),
        ([DENY_ALL, {**ALL_CHARS, "type": "b"}], []),
        ([DENY_ALL, {**ALL_CHARS, "major": 1}], ["zero0", "full0", "full2", "kmsg0"]),
        ([DENY_ALL, {**ALL_CHARS, "minor": 5}], ["zero0"]),
        ([DENY_ALL, {**FULL_R, "allow": True}], ["full0"]),
        ([DENY_ALL, {**FULL_R, "allow": True}, {**FULL_W, "allow": True}], ["full0", "full2"]),
        ([DENY_ALL, ALL_CHARS, {**FULL_W, "allow": False}], ["zero0", "full0", "kmsg0"]),
        ([DENY_ALL, {**FULL_W, "allow": False}, ALL_CHARS], ["zero0", "full0", "full2", "kmsg0"]),
        ([{**FULL_R, "allow": False}], ["zero0", "kmsg0"]),
        ([{**ALL_CHARS, "major": 2**32 - 1, "allow": False}], ["zero0", "full0", "full2", "kmsg0"]),
        ([DENY_ALL, *({**ALL_CHARS, "major": 7, "minor": n} for n in range(300)), KMSG], ["kmsg0"]),
    ],
)
def test_version_2_rules_are_the_kernels(unified: str, given: list[dict[str, Any]], expected: list[str]) -> None:
    devices.apply(unified, rules(*given))
    assert opened(Cgroup({UNIFIED: unified})) == expected


def test_version_2_rules_replace_those_before(unified: str) -> None:
    cgroup = Cgroup({UNIFIED: unified})
    for given, expected in (([DENY_ALL], []), ([DENY_ALL, KMSG], ["kmsg0"]), ([{"allow": True}], 4), ([DENY_ALL], [])):
        devices.apply(unified, rules(*given))
        found = opened(cgroup)
        assert len(found) == expected if isinstance(expected, int) else found == expected
    usual = ["zero0", "full0", "full2"]  # what every container may use
    for given, expected in (
        ([DENY_ALL], usual), ([KMSG], [*usual, "kmsg0"]), ([{**KMSG, "allow": False}], usual), ([{"allow": True}], 4),
        ([{**FULL_R, "allow": False}], usual),
    ):  # fmt: skip
        cgroup.apply(parsed(devices=given))
        found = opened(cgroup)
        assert len(found) == expected if isinstance(expected, int) else found == expected


def test_the_verifiers_words_are_in_the_error(unified: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bytes([0x95, 0, 0, 0, 0, 0, 0, 0])  # exits without an answer
    monkeypatch.setattr(devices, "program", lambda rules: broken)
    with pytest.raises(StartFailed, match=r"linux\.resources\.devices: .*verifier says: .*R0 !read_ok"):
        devices.apply(unified, rules(DENY_ALL))


def test_without_the_right_to_bpf_denying_fails(unified: str) -> None:
    """In a child that has given up CAP_SYS_ADMIN and CAP_BPF; rules that deny nothing need no program."""
    code = f"""
import os, sys
from runtime.linux import syscalls
from runtime.cgroups import devices
from runtime.spec.resources import DeviceRule
syscalls.capset(0, 0, 0)
everything = DeviceRule(True, "a", None, None, "rwm")
devices.apply({unified!r}, [everything])
try:
    devices.apply({unified!r}, [DeviceRule(False, "a", None, None, "rwm")])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("StartFailed linux.resources.devices: ")
    assert "not permitted" in done.stdout


SPIN = "print('up', flush=True)\nwhile True: pass"


@pytest.mark.parametrize("which", ["all", "unified"])
def test_freezing_waits_until_they_are_frozen(cgroup: Cgroup, unified: str, which: str) -> None:
    group = cgroup if which == "all" else Cgroup({UNIFIED: unified})
    with child(group, SPIN) as process:
        go_on(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        for _ in range(3):
            group.freeze()
            assert group.frozen
            ticks = Path(f"/proc/{process.pid}/stat").read_text().split()[13]
            time.sleep(0.05)
            assert Path(f"/proc/{process.pid}/stat").read_text().split()[13] == ticks
            group.thaw()
            assert not group.frozen
        group.freeze()
        group.kill()
        assert process.wait(10) == -9
        assert group.pids() == []


def test_what_does_not_freeze_is_thawed_again(v1: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the version 1 freezer holds does not get to where version 2's would stop it."""
    monkeypatch.setattr("runtime.cgroups.freezer.FREEZER_TIMEOUT", 0.2)
    unified = Cgroup({UNIFIED: v1.paths[UNIFIED]})
    with child(v1, "") as process:
        v1.freeze()
        with pytest.raises(DeadlineExceeded, match=r"did not freeze within 0\.2 s"):
            unified.freeze()
        assert not unified.frozen
        v1.thaw()
        unified.freeze()
        unified.thaw()
        assert v1.pids() == [process.pid]


def test_kill_ends_what_forks(cgroup: Cgroup) -> None:
    code = "for _ in range(5): os.fork()\nwhile True:\n    if os.fork() == 0: time.sleep(100)\n    time.sleep(0.001)"
    cgroup.apply(parsed(pids={"limit": 200}))
    with child(cgroup, code) as process:
        go_on(process)
        deadline = time.monotonic() + 20
        while len(cgroup.pids()) < 40:
            assert time.monotonic() < deadline
        cgroup.kill()
        assert cgroup.pids() == []


def test_nested_cgroups_are_seen_and_removed(cgroup: Cgroup) -> None:
    for directory in cgroup.directories():
        Path(directory, "a/b").mkdir(parents=True)
        if "cpuset" in cgroup.paths and directory == cgroup.paths["cpuset"]:
            for name in ("a", "a/b"):
                for which in ("cpuset.cpus", "cpuset.mems"):
                    Path(directory, name, which).write_text(Path(directory, which).read_text())
    below = Cgroup({key: f"{path}/a/b" for key, path in cgroup.paths.items()})
    with child(below, "") as process:
        assert cgroup.pids() == [process.pid]


def test_one_more_process_where_the_container_has_cgroups_of_its_own(cgroup: Cgroup) -> None:
    """A version 2 cgroup whose children have controllers takes no processes itself."""
    directory = Path(cgroup.paths[UNIFIED])
    there = (directory / "cgroup.controllers").read_text().split()
    if not there:
        pytest.skip("the version 2 hierarchy has no controllers here")
    with child(cgroup, "") as init, child(Cgroup({}), "") as another:
        (directory / "inside").mkdir()
        (directory / "inside" / "cgroup.procs").write_text(str(init.pid))
        (directory / "cgroup.subtree_control").write_text(f"+{there[0]}")
        with pytest.raises(ContainerError, match="cannot take process"):
            cgroup.add(another.pid)
        cgroup.add(another.pid, near=init.pid)
        pids = [int(line) for line in (directory / "inside" / "cgroup.procs").read_text().split()]
        assert sorted(pids) == sorted([init.pid, another.pid])
        assert cgroup.pids() == sorted(pids)


def test_a_cgroup_in_use_is_not_taken(cgroup: Cgroup) -> None:
    with child(cgroup, "") as process:
        with pytest.raises(Conflict, match=f"in use by process {process.pid}"):
            Cgroup.create(NAME, None)
        assert cgroup.pids() == [process.pid]
    cgroup.kill()
    cgroup.freeze()
    with pytest.raises(Conflict, match="frozen"):
        Cgroup.create(NAME, None)
    cgroup.thaw()


def test_one_that_another_container_is_about_to_enter_is_not_taken() -> None:
    """Both would believe it theirs, and the first to be deleted would kill the other."""
    first = Cgroup.create(NAME, None, owner=b"first")
    try:
        with pytest.raises(Conflict, match="another container that is being created uses"):
            Cgroup.create(NAME, None, owner=b"second")
        assert {owner_of(path) for path in first.directories()} == {b"first"}
    finally:
        first.remove()
    Cgroup.create(NAME, None, owner=b"second").remove()
    assert not any(map(os.path.exists, first.directories()))


def test_names_of_systemd_need_systemd() -> None:
    with pytest.raises(ContainerError, match=r"linux\.cgroupsPath"):
        Cgroup.create(NAME, "system.slice:a:b")
    if not Path("/run/systemd/system").exists():
        with pytest.raises(ContainerError, match="systemd does not run"):
            Cgroup.create(NAME, "system.slice:a:b", systemd=True)


# Another runtime, at its worst: it makes the parent, has not set it up yet, and removes it, as fast as it can.
_CHURN = """
import os, sys
print(flush=True)
while True:
    for path in sys.argv[1:]:
        try: os.mkdir(path)
        except OSError: pass
        try: os.rmdir(path)
        except OSError: pass
"""


def test_parents_come_and_go_meanwhile() -> None:
    parents = [f"{hierarchy.mountpoint}/{NAME}" for hierarchy in discover()]
    churn = subprocess.Popen([sys.executable, "-ISc", _CHURN, *parents], stdout=subprocess.PIPE)
    try:
        assert churn.stdout is not None
        churn.stdout.readline()
        for number in range(150):
            Cgroup.create(NAME, f"/{NAME}/{number}").remove()
    finally:
        churn.kill()
        churn.communicate()
        for parent in parents:
            if os.path.exists(parent):
                os.rmdir(parent)


def test_a_parent_that_another_has_made_and_not_set_up_yet(v1: Cgroup) -> None:
    """A version 1 cpuset without processors takes no process."""
    parent = Path(v1.paths["cpuset"], "parent")
    parent.mkdir()
    relative = os.path.relpath(parent, next(h.mountpoint for h in discover() if "cpuset" in h.controllers))
    with child(v1, "") as process:
        inside = Cgroup.create(NAME, f"/{relative}/inside")
        try:
            inside.add(process.pid)
            assert inside.pids() == [process.pid]
        finally:
            inside.kill()
            inside.remove()


def test_stats_tell_what_is_used(v1: Cgroup) -> None:
    v1.apply(parsed(memory={"limit": 64 * MIB}, pids={"limit": 9}, cpu={"cpus": "0"}))
    spin = "t = time.process_time()\nwhile time.process_time() < t + 0.1: pass"
    with child(v1, f"x = bytearray(20 << 20)\n{spin}\nprint('done', flush=True)\ninput()") as process:
        go_on(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        stats = v1.stats()
    usage = stats["cpu"]["usage"]
    assert usage["total"] > 90_000_000
    assert sum(usage["percpu"]) == usage["total"]
    assert stats["cpuset"]["cpus"] == [0]
    assert (stats["cpuset"]["sched_load_balance"], stats["cpuset"]["sched_relax_domain_level"]) == (1, -1)
    assert 20 * MIB < stats["memory"]["usage"]["usage"] <= stats["memory"]["usage"]["max"] <= 64 * MIB
    assert stats["memory"]["usage"]["limit"] == 64 * MIB
    assert stats["memory"]["swap"]["limit"] == 2**64 - 1
    assert stats["memory"]["raw"]["rss"] > 20 * MIB
    assert stats["pids"] == {"current": 1, "limit": 9}


def test_running_out_of_memory_is_told(v1: Cgroup) -> None:
    v1.apply(parsed(memory={"limit": 20 * MIB, "swap": 20 * MIB}))
    with child(v1, "x = bytearray(100 << 20)") as process:
        events = v1.oom_events(0.05)
        assert not next(events)  # nothing happens for an interval
        go_on(process)
        found = list(itertools.islice(events, 100))  # it ends, as the only process did
        assert True in found
        assert process.wait(10) == -9
    with child(v1, "x = bytearray(100 << 20)") as process:
        events = v1.oom_events(0.05)
        next(events)
        go_on(process)
        assert process.wait(10) == -9  # nobody is left when it is looked at
        assert list(events) == [True]


def test_the_end_without_running_out_of_memory(v1: Cgroup) -> None:
    with child(v1, "") as process:
        events = v1.oom_events()
        go_on(process)
        assert list(events) == []
