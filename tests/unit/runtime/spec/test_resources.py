"""linux.resources: what is read, and what becomes of it in files and in properties of a unit."""

from pathlib import Path
from typing import Any

import pytest

from runtime.cgroups import gvariant, systemd, v1, v2
from runtime.errors import ContainerError, NotSupported, SpecError
from runtime.spec.fields import Fields
from runtime.spec.resources import Resources, parse_resources

MIB = 1 << 20


def parsed(**resources: Any) -> Resources:
    return parse_resources(Fields(resources, "config.json", "linux.resources"))


EVERYTHING: dict[str, Any] = {
    "devices": [{"allow": False}, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}],
    "memory": {"limit": 2 * MIB, "reservation": MIB, "swap": 3 * MIB, "kernel": -1, "swappiness": 5,
               "disableOOMKiller": True, "useHierarchy": True, "kernelTCP": 7, "checkBeforeUpdate": True},
    "cpu": {"shares": 512, "quota": 50000, "burst": 1000, "period": 100000, "realtimeRuntime": 5, "realtimePeriod": 6,
            "cpus": "0-1", "mems": "0", "idle": 0},
    "pids": {"limit": 9},
    "blockIO": {"weight": 300, "leafWeight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 500}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}]},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],
    "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
    "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10}},
    "unified": {"memory.high": "5"},
}  # fmt: skip


def test_all_of_it_becomes_version_1_files() -> None:
    paths = dict.fromkeys(("memory", "cpu", "blkio"), "/nonexistent")
    found = {file: value for _, _, file, value in v1.writes(parsed(**EVERYTHING), paths)}
    assert found == {
        "memory.use_hierarchy": "1", "memory.limit_in_bytes": str(2 * MIB),
        "memory.memsw.limit_in_bytes": str(3 * MIB), "memory.soft_limit_in_bytes": str(MIB),
        "memory.kmem.tcp.limit_in_bytes": "7", "memory.swappiness": "5", "memory.oom_control": "1", "cpu.idle": "0",
        "cpu.shares": "512", "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000", "cpu.cfs_burst_us": "1000",
        "cpu.rt_period_us": "6", "cpu.rt_runtime_us": "5", "cpuset.cpus": "0-1", "cpuset.mems": "0", "pids.max": "9",
        "net_cls.classid": "1048577", "blkio.bfq.weight": "300", "blkio.leaf_weight": "10",
        "blkio.bfq.weight_device": "8:0 500", "blkio.throttle.read_bps_device": "8:0 600",
        "blkio.throttle.write_iops_device": "8:16 0", "hugetlb.2MB.limit_in_bytes": str(4 * MIB),
        "net_prio.ifpriomap": "eth0 500", "rdma.max": "mlx5_1 hca_handle=3 hca_object=10",
    }  # fmt: skip


def test_what_version_2_has_becomes_its_files(tmp_path: Path) -> None:
    for name in ("memory.swap.max", "hugetlb.2MB.rsvd.max"):
        (tmp_path / name).write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    there = {key: EVERYTHING[key] for key in ("pids", "hugepageLimits", "rdma")}
    there["memory"] = {key: EVERYTHING["memory"][key] for key in ("limit", "reservation", "swap", "checkBeforeUpdate")}
    there["cpu"] = {key: value for key, value in EVERYTHING["cpu"].items() if not key.startswith("realtime")}
    there["blockIO"] = {key: value for key, value in EVERYTHING["blockIO"].items() if key != "leafWeight"}
    found = [(file, value) for _, _, file, value in v2.writes(parsed(**there), str(tmp_path))]
    assert sorted(found) == sorted([
        ("memory.swap.max", str(MIB)), ("memory.max", str(2 * MIB)), ("memory.low", str(MIB)), ("cpu.idle", "0"),
        ("cpu.max", "50000 100000"), ("cpu.max.burst", "1000"), ("cpuset.cpus", "0-1"), ("cpuset.mems", "0"),
        ("pids.max", "9"), ("cpu.weight", "59"), ("io.weight", "2930"), ("io.weight", "8:0 4950"),
        ("io.max", "8:0 rbps=600"), ("io.max", "8:16 wiops=max"), ("hugetlb.2MB.max", str(4 * MIB)),
        ("hugetlb.2MB.rsvd.max", str(4 * MIB)), ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10"),
    ])  # fmt: skip


def test_the_files_differ_where_bfq_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "io.bfq.weight").write_text("default 100\n")
    resources = parsed(blockIO={"weight": 300})
    assert [(file, value) for _, _, file, value in v2.writes(resources, str(tmp_path))] == [("io.bfq.weight", "300")]


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"memory": {"swappiness": 0}}, "memory.swappiness"),
        ({"memory": {"disableOOMKiller": True}}, "memory.disableOOMKiller"),
        ({"memory": {"useHierarchy": False}}, "memory.useHierarchy"),
        ({"memory": {"kernelTCP": 5}}, "memory.kernelTCP"),
        ({"cpu": {"realtimeRuntime": 5}}, "cpu.realtimeRuntime"),
        ({"cpu": {"realtimePeriod": 5}}, "cpu.realtimePeriod"),
        ({"blockIO": {"leafWeight": 5}}, "blockIO.leafWeight"),
        ({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 5}]}}, "weightDevice[0].leafWeight"),
        ({"network": {"classID": 5}}, "network.classID"),
        ({"network": {"priorities": [{"name": "lo", "priority": 1}]}}, "network.priorities"),
    ],
)
def test_version_2_refuses_what_it_cannot_do(resources: dict[str, Any], field: str) -> None:
    with pytest.raises(NotSupported) as caught:
        list(v2.writes(parsed(**resources), "/nonexistent"))
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"memory": {"limit": 5, "swap": 4}}, "memory.swap: is 4, below"),
        ({"memory": {"limit": "5"}}, "memory.limit: must be an integer"),
        ({"memory": {"swappiness": 101}}, "memory.swappiness"),
        ({"cpu": {"quota": 10, "burst": 11}}, "cpu.burst: is 11"),
        ({"cpu": {"idle": 2}}, "cpu.idle"),
        ({"blockIO": {"weightDevice": [{"major": 8, "minor": 0}]}}, "blockIO.weightDevice[0].weight: is missing"),
        ({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0}]}}, "throttleReadBpsDevice[0].rate"),
        ({"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]}, "hugepageLimits[0].pageSize"),
        ({"network": {"priorities": [{"name": "a b", "priority": 1}]}}, "network.priorities[0].name"),
        ({"rdma": {"mlx": {}}}, "rdma.mlx.hcaHandles: is missing"),
        ({"unified": {"../x.y": "1"}}, "unified.../x.y"),
        ({"unified": {"nodot": "1"}}, "unified.nodot"),
        ({"devices": [{"allow": True, "type": "p"}]}, "devices[0].type"),
    ],
)
def test_the_field_is_named(resources: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parsed(**resources)
    assert words in str(caught.value)
    assert "linux.resources." in str(caught.value)


def test_nothing_said_is_nothing_written() -> None:
    empty = {"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0}, "blockIO": {"weight": 0}}
    for resources in (parsed(), parsed(**empty)):
        assert list(v1.writes(resources, {})) == list(v2.writes(resources, "/nonexistent")) == []


@pytest.mark.parametrize(("shares", "weight"), [(0, 1), (2, 1), (1024, 100), (262144, 10000), (10**9, 10000)])
def test_weights_meet_at_both_ends_and_at_what_is_normal(shares: int, weight: int) -> None:
    assert v2.cpu_weight(shares) == weight


def test_weights_rise() -> None:
    weights = [v2.cpu_weight(shares) for shares in range(2, 262145, 97)]
    assert weights == sorted(weights)
    assert (v2.io_weight(10), v2.io_weight(1000)) == (1, 10000)


def test_swap_alone_needs_the_limit_that_holds(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{MIB}\n")
    (tmp_path / "memory.swap.max").write_text("max\n")
    swap = parsed(memory={"swap": 3 * MIB})
    assert [(file, value) for _, _, file, value in v2.writes(swap, str(tmp_path))] == [
        ("memory.swap.max", str(2 * MIB))
    ]
    (tmp_path / "memory.max").write_text("max\n")
    with pytest.raises(ContainerError, match=r"memory\.swap"):
        list(v2.writes(swap, str(tmp_path)))


def test_a_period_alone_keeps_the_quota(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("5000 100000\n")
    assert [w[3] for w in v2.writes(parsed(cpu={"period": 50000}), str(tmp_path))] == ["5000 50000"]
    assert [w[3] for w in v2.writes(parsed(cpu={"quota": -1}), str(tmp_path))] == ["max"]


def test_a_limit_below_what_is_in_use_is_refused_when_asked(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text(f"{MIB + 1}\n")
    with pytest.raises(ContainerError, match=r"memory\.limit"):
        list(v2.writes(parsed(memory={"limit": MIB, "checkBeforeUpdate": True}), str(tmp_path)))
    assert list(v2.writes(parsed(memory={"limit": MIB}), str(tmp_path)))


def device_lines(current: str, *rules: dict[str, Any]) -> list[str]:
    writes = v1.device_writes(parsed(devices=list(rules)).devices, current)
    return [f"{file.removeprefix('devices.')} {value}" for _, _, file, value in writes]


DENY_ALL = {"allow": False}
KVM = {"allow": True, "type": "c", "major": 10, "minor": 232, "access": "rw"}


def test_version_1_device_lines_are_only_what_differs() -> None:
    assert device_lines(v1.EVERYTHING, DENY_ALL, KVM) == ["deny a", "allow c 10:232 rw"]
    assert device_lines("c 10:232 rw", DENY_ALL, KVM) == []
    assert device_lines("c 10:232 rwm\nb *:* m", DENY_ALL, KVM) == ["deny c 10:232 m", "deny b *:* m"]
    assert device_lines(v1.EVERYTHING, KVM | {"allow": False}) == ["deny c 10:232 rw"]
    assert device_lines("c 10:232 rw", DENY_ALL, {"allow": True}) == ["deny a", "allow a"]


def test_version_1_cannot_take_one_out_of_many() -> None:
    with pytest.raises(NotSupported, match=r"devices\[2\]"):
        device_lines(v1.EVERYTHING, DENY_ALL, {"allow": True, "type": "c", "access": "rwm"}, KVM | {"allow": False})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, ("system.slice", "pymigrate-web.scope")),
        ("machine.slice:libpod:abc", ("machine.slice", "libpod-abc.scope")),
        (":runc:abc", ("system.slice", "runc-abc.scope")),
        ("a-b.slice::abc", ("a-b.slice", "abc.scope")),
        ("a.slice:x:a-b.slice", ("a.slice", "a-b.slice")),
    ],
)
def test_names_of_units(path: str | None, expected: tuple[str, str]) -> None:
    name = systemd.UnitName.parse("web", path)
    assert (name.slice, name.unit) == expected


@pytest.mark.parametrize(
    "path", ["/a/b", "a:b", "a:b:c:d", "a.slice:b:", "a:b:c", "a--b.slice:b:c", "a.slice:b:c/d", "a.slice:b:c+d"]
)
def test_bad_names_of_units(path: str) -> None:
    with pytest.raises(SpecError, match=r"linux\.cgroupsPath"):
        systemd.UnitName.parse("web", path)


def test_slices_lie_in_each_other() -> None:
    assert systemd.expand_slice("a-b-c.slice") == "a.slice/a-b.slice/a-b-c.slice"
    assert systemd.expand_slice("-.slice") == ""


def test_limits_as_properties() -> None:
    resources = parsed(
        memory={"limit": 2 * MIB, "swap": 2 * MIB, "reservation": -1}, pids={"limit": -1},
        cpu={"quota": 12345, "cpus": "0,9", "shares": 1024}, unified={"memory.high": "5"},
    )  # fmt: skip
    assert systemd.resource_properties(resources, "") == {
        "MemoryMax": ("t", 2 * MIB), "MemoryLow": ("t", 2**64 - 1), "MemoryHigh": ("t", 5), "MemorySwapMax": ("t", 0),
        "CPUWeight": ("t", 100), "TasksMax": ("t", 2**64 - 1), "AllowedCPUs": ("ay", b"\x01\x02"),
        "CPUQuotaPeriodUSec": ("t", 100000), "CPUQuotaPerSecUSec": ("t", 130000),
    }  # fmt: skip
    assert systemd.resource_properties(parsed(memory={"limit": MIB}, cpu={"shares": 5}), None) == {
        "MemoryLimit": ("t", MIB), "CPUShares": ("t", 5),
    }  # fmt: skip
    properties = systemd.resource_properties(parsed(devices=[DENY_ALL, KVM]), None)
    assert properties["DevicePolicy"] == ("s", "strict")
    assert {("/dev/char/10:232", "rw"), ("char-136", "mrw"), ("block-*", "m")} < set(properties["DeviceAllow"][1])
    for rules in ([{"allow": True}, KVM | {"allow": False}], [DENY_ALL, {"allow": True, "type": "c", "minor": 7}]):
        with pytest.raises(NotSupported, match=r"linux\.resources\.devices: systemd"):
            systemd.resource_properties(parsed(devices=rules), None)
    with pytest.raises(ContainerError, match=r"linux\.resources\.unified"):
        systemd.resource_properties(parsed(unified={"pids.max": "many"}), "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", ("b", True)), ("5", ("i", 5)), ("-5", ("i", -5)), ("uint64 0x10", ("t", 16)), ("@q 7", ("q", 7)),
        ("'a b'", ("s", "a b")), (r'"it\'s"', ("s", "it's")), ("1.5", ("d", 1.5)), ("byte 255", ("y", 255)),
        ("['a', 'b']", ("as", ["a", "b"])), ("@as []", ("as", [])), ("[uint32 1, 2]", ("au", [1, 2])),
    ],
)  # fmt: skip
def test_gvariant_text(text: str, value: object) -> None:
    assert gvariant.parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5 6",
        "'a",
        "[1",
        "[]",
        "[1, 'a']",
        "byte 256",
        "(1, 2)",
        "{'a': 1}",
        "<5>",
        "nothing",
        "a",
        "[[1]]",
        "string 5",
    ],
)
def test_what_is_not_supported_gvariant_text(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - all of them are meant
        gvariant.parse(text)


def test_annotated_properties() -> None:
    prefix = systemd.ANNOTATION
    found = systemd.annotated({f"{prefix}TimeoutStopSec": "5", f"{prefix}CollectMode": "'inactive'", "other": "x"})
    assert found == {"TimeoutStopUSec": ("t", 5_000_000), "CollectMode": ("s", "inactive")}
    for key, text in (("A-B", "1"), ("Wants", "(1,)"), ("TimeoutStopSec", "'x'")):
        with pytest.raises(SpecError) as caught:
            systemd.annotated({prefix + key: text})
        assert f"annotations.{prefix}{key}" in str(caught.value)
